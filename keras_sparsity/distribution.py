"""Training on several machines with TensorFlow: a strategy that Keras 3 can use."""

import keras

try:
    import tensorflow as tf
except ImportError as error:
    raise ImportError(
        "`keras_sparsity.distribution` needs TensorFlow: "
        'pip install "keras-sparsity[tensorflow]"'
    ) from error


class MultiWorkerMirroredStrategy(tf.distribute.MultiWorkerMirroredStrategy):
    """`tf.distribute.MultiWorkerMirroredStrategy`, with which Keras 3 can train.

    On several workers `fit` and `evaluate` of Keras 3.15 fail in
    `strategy.reduce`, twice: to learn the shapes of a batch, they reduce a tuple of
    tensors where the strategy takes one tensor; after each step they reduce the logs,
    which are scalars, over `axis=0`. Here `reduce` takes nested structures, and ignores
    `axis` for scalars. Nothing else is changed. With a Keras that reduces tensor by
    tensor, and scalars with `axis=None`, the class of TensorFlow will do.

    Args:
        cluster_resolver: A `tf.distribute.cluster_resolver.ClusterResolver`. Defaults
            to the one that reads the environment variable `TF_CONFIG`.
        communication_options: A `tf.distribute.experimental.CommunicationOptions`.
            Defaults to those of TensorFlow.

    Example:

    ```python
    # Every worker runs this, with its own index in TF_CONFIG.
    strategy = keras_sparsity.distribution.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = keras_sparsity.sparsify(make_model(), method)
        model.compile(...)
    model.fit(...)
    ```

    Reference:

    - [Keras, `reduce_per_replica`](
        https://github.com/keras-team/keras/blob/master/keras/src/backend/tensorflow/trainer.py)
    """

    def reduce(self, reduce_op, value, axis=None):
        """Reduces a tensor over the replicas.

        Args:
            reduce_op: A `tf.distribute.ReduceOp`, or its name.
            value: A tensor or per-replica value, or a nested structure of such.
            axis: Integer, the dimension to reduce besides, or `None` for none. Where
                the value of a replica is a scalar it has no effect.

        Returns:
            A tensor. For a structure, which is a batch whose shapes are asked for: the
            part of it that this worker's first replica has. The parts may differ in
            size, and then nothing can reduce them.
        """
        if isinstance(value, (tuple, list, dict)):
            return keras.tree.map_structure(self._first, value)
        scalar = tf.convert_to_tensor(self._first(value)).shape.rank == 0
        return super().reduce(reduce_op, value, None if scalar else axis)

    def _first(self, value):
        return self.experimental_local_results(value)[0]
