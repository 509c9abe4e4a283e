"""Penalties that make weights small enough to prune: HALO, SWS and MCP."""

import math
import weakref

import keras
from keras import ops

from keras_sparsity.bounds import Bounds
from keras_sparsity.checks import check_number
from keras_sparsity.selection import Governed, full_precision
from keras_sparsity.steering import Steering, scale_to_fall

SWS_SCALE_FLOOR = 1e-3


class KernelPenalty(keras.Layer, keras.regularizers.Regularizer):
    """Base of the penalties: a regularizer that is a layer, and so may own weights.

    A `keras.Layer` that is assigned to an attribute of another, as `Dense` does with
    its `kernel_regularizer`, is tracked, trained, saved and restored with it.

    A subclass computes the penalty of a float32 tensor in `penalty(w)`. If it has
    weights of its own, it creates them from the kernel's shape in `build(shape)`.
    """

    def __init__(self, trainable=True):
        # No name among the arguments: copies must not end up with the same one,
        # since on torch a variable is known by its path.
        super().__init__(trainable=trainable, dtype="float32")
        # Weak, because a variable as an attribute would become a weight of this layer.
        self._kernel = lambda: None

    def penalty(self, w):
        raise NotImplementedError

    def __call__(self, x):
        if isinstance(x, keras.Variable):
            self.bind(x)
        if not self.built:
            self.build(tuple(x.shape))
        return self.penalty(ops.cast(x, "float32"))

    def build(self, input_shape):
        """Creates the penalty's own weights from the kernel's shape."""

    def bind(self, kernel):
        """Makes `kernel` the one that is regularized, or raises for a second one."""
        bound = self._kernel()
        if bound is None:
            self._kernel = weakref.ref(kernel)
        elif bound is not kernel:
            name = type(self).__name__
            raise ValueError(
                f"One {name} must regularize one kernel. This one has "
                f"'{bound.path}' of shape {tuple(bound.shape)}. Received a second, "
                f"'{kernel.path}' of shape {tuple(kernel.shape)}. Make a new {name} "
                f"for every kernel, or use `Penalized(layer, {name}(...))` for all the "
                f"kernels of a layer, `sparsify(model, {name}(...))` for a model's."
            )

    def governed_weights(self):
        """The kernel that was regularized, if any: see `selection.Governed`."""
        kernel = self._kernel()
        if kernel is None:
            return []
        return [Governed(kernel, type(self).__name__, full_precision(kernel))]

    def load_own_variables(self, store):
        # A penalty that has not met its kernel yet learns the shape from the file.
        if not self.built and "0" in store.keys():  # noqa: SIM118, HDF5 is no dict
            self.build(tuple(store["0"].shape))
        super().load_own_variables(store)

    def get_config(self):
        return {"trainable": self.trainable}


@keras.saving.register_keras_serializable("keras_sparsity")
class HALO(KernelPenalty):
    """Hierarchical adaptive lasso: a penalty that learns one scale per weight.

    ```
    penalty = xi * sum(|w| / scale**2) + psi * sum(|scale|)
              + scale_decay / 2 * sum(scale**2)
    ```

    The scales start at 1 and are trained with the weights. A scale falls, and the
    pull on its weight grows, until the weight is either held up by the loss or close
    to zero: at rest `scale = (2 * xi * |w| / psi) ** (1/3)` (for `scale_decay=0`), a
    penalty of the order of `|w| ** (1/3)`. No weight becomes exactly zero during
    training; `keras_sparsity.prune` is the last step.

    The scale is kept between `scale_floor` and `scale_ceiling`: an optimizer's update
    that leaves the range is put back to its end. Where a scale was assigned below the
    floor, the penalty and its gradients are those at the floor: neither becomes
    infinite, and the next update puts the scale back.

    The scales' learning rate matters as much as `xi` and `psi`: see
    `keras_sparsity.SparsityOptimizer`. Weight decay must not reach them.

    The scale is made when the penalty is computed first. `SparsityOptimizer` waits for
    it where it is built before, as `load_model` and, on TensorFlow, `BackupAndRestore`
    do. Other optimizers refuse it as unknown then, and the `LossScaleOptimizer` of
    mixed_float16 loses its state: read `model.losses` once before. `sparsify` and
    `SparsityTrail` do so by themselves.

    In a training loop of torch's own, read `model.losses` once and give the optimizer
    the `value` of each of `model.trainable_variables`: `parameters()` lists the scales
    only where `sparsify` or `Penalized` made them. It knows no constraints: after each
    step, assign `v.constraint(v)` to every variable `v` that has one.

    A layer of your own that gives its `add_weight` a HALO must also keep it as an
    attribute, as Keras' layers do. Without, its scale is neither trained nor saved.

    Args:
        xi: Float >= 0, the pull on the weights. A sum over weights, not a mean:
            useful values are small, 1e-7 to 1e-6. Defaults to 3e-7.
        psi: Float >= 0, the pull on the scales, 1e-4 to 4e-3. More means that scales
            settle sooner, and sparser. Defaults to 5e-4.
        scale_decay: Float >= 0, weight decay of the scales as a term of the penalty,
            which is what the published code trains with (1e-4). Defaults to 0.
        scale_floor: Float in [1e-9, 1), in units of the scale. Much lower than the
            default, and a weight that comes back throws its scale far up. Defaults to
            1e-2.
        scale_ceiling: Float > 1, in units of the scale. Defaults to 10.

    Attributes:
        scale: Float32 variable of the kernel's shape, named `halo_scale`. It exists
            once the kernel does and the layer's `losses` were read, which `fit` does.
        strength: Float32 scalar variable, 1 unless `SparsityTarget` steers it: the
            factor on the penalty.

    Raises:
        ValueError: If an argument is out of its range, or if one instance is given a
            second kernel.

    Example:

    ```python
    layer = keras.layers.Dense(300, kernel_regularizer=HALO(xi=3e-7, psi=5e-4))
    ```

    Reference:

    - [Seto et al., HALO: Learning to Prune Neural Networks with Shrinkage](
        https://arxiv.org/abs/2008.10183), equation 4. The published code sums and
        starts the scales at 1, as is done here.
    """

    # A higher strength throws weights at the floor about, and their scales rise again;
    # the lowest holds all scales where they are. Scales come down together, with the
    # optimizer's momentum, and hardly return: the last of them must be stopped in time.
    # They arrive early, while there is a learning rate to decide with who stays.
    steering = Steering(
        distance=scale_to_fall,
        lowest=1e-3,
        highest=10.0,
        approach=0.4,
        correction=0.05,
        brake=6.0,
    )

    def __init__(
        self,
        xi=3e-7,
        psi=5e-4,
        scale_decay=0.0,
        scale_floor=1e-2,
        scale_ceiling=10.0,
        trainable=True,
    ):
        super().__init__(trainable=trainable)
        self.xi = check_number("xi", xi, at_least=0)
        self.psi = check_number("psi", psi, at_least=0)
        self.scale_decay = check_number("scale_decay", scale_decay, at_least=0)
        self.scale_floor = check_number("scale_floor", scale_floor, at_least=1e-9)
        self.scale_ceiling = check_number("scale_ceiling", scale_ceiling, above=1)
        if self.scale_floor >= 1:
            raise ValueError(
                "Argument `scale_floor` must be less than 1, where scales start. "
                f"Received: scale_floor={scale_floor}"
            )

    def build(self, input_shape):
        self.scale = self.add_weight(
            name="halo_scale",
            shape=input_shape,
            initializer="ones",
            constraint=Bounds(self.scale_floor, self.scale_ceiling),
            autocast=False,
        )
        # A variable, since `SparsityTarget` changes it while training is compiled.
        self.strength = self.add_weight(
            name="halo_strength", shape=(), initializer="ones", trainable=False
        )

    @property
    def gone_below(self):
        """The scale at which a weight counts as given up."""
        return 2 * self.scale_floor

    def count_pruned(self):
        """How many weights it has given up, their scales at the floor, of how many."""
        at_floor = ops.less_equal(self.scale, self.gone_below)
        return int(ops.sum(ops.cast(at_floor, "int32"))), math.prod(self.scale.shape)

    def penalty(self, w):
        """The penalty of a float32 tensor of the kernel's shape, a scalar."""
        if tuple(w.shape) != tuple(self.scale.shape):
            raise ValueError(
                "One HALO must regularize one kernel. This one has scales of shape "
                f"{tuple(self.scale.shape)}. Received a kernel of shape "
                f"{tuple(w.shape)}. Make a new HALO for every kernel."
            )

        # In closed form, for two reasons: differentiating `scale**-2` passes through
        # powers that under- and overflow float32, and it takes more passes over the
        # weights, which is what a step of a backend that fuses nothing is made of.
        @ops.custom_gradient
        def penalty(w, scale):
            magnitude = ops.maximum(abs(scale), self.scale_floor)
            slope = ops.sign(w) / (magnitude * magnitude)
            pulls = slope * w
            value = self.xi * ops.sum(pulls) + self.psi * ops.sum(magnitude)
            if self.scale_decay:
                value = value + 0.5 * self.scale_decay * ops.sum(scale * scale)

            def grad(*args, upstream=None):
                if upstream is None:
                    (upstream,) = args
                pull = (-2.0 * self.xi * upstream) * (pulls / magnitude)
                d_scale = (pull + self.psi * upstream) * ops.sign(scale)
                if self.scale_decay:
                    d_scale = d_scale + (self.scale_decay * upstream) * scale
                return (self.xi * upstream) * slope, d_scale

            return value, grad

        return self.strength * penalty(w, ops.cast(self.scale, "float32"))

    def get_config(self):
        config = {
            "xi": self.xi,
            "psi": self.psi,
            "scale_decay": self.scale_decay,
            "scale_floor": self.scale_floor,
            "scale_ceiling": self.scale_ceiling,
        }
        return {**super().get_config(), **config}


@keras.saving.register_keras_serializable("keras_sparsity")
class SWS(KernelPenalty):
    """HALO's comparison with one scale for the whole kernel.

    ```
    penalty = xi * sum(|w|) / scale**2 + psi * scale**2
    ```

    The scale is a scalar, starts at 1, and is kept at or above 1e-3.

    Args:
        xi: Float >= 0, the pull on the weights.
        psi: Float >= 0, the pull on the scale.

    Attributes:
        scale: Float32 scalar variable, named `sws_scale`.

    Raises:
        ValueError: If an argument is out of its range, or if one instance is given a
            second kernel.

    Example:

    ```python
    layer = keras.layers.Dense(300, kernel_regularizer=SWS(xi=1e-5, psi=1e-2))
    ```

    Reference:

    - [Seto et al., HALO: Learning to Prune Neural Networks with Shrinkage](
        https://arxiv.org/abs/2008.10183), section 4.
    """

    def __init__(self, xi, psi, trainable=True):
        super().__init__(trainable=trainable)
        self.xi = check_number("xi", xi, at_least=0)
        self.psi = check_number("psi", psi, at_least=0)

    def build(self, input_shape):
        self.scale = self.add_weight(
            name="sws_scale",
            shape=(),
            initializer="ones",
            constraint=Bounds(SWS_SCALE_FLOOR),
            autocast=False,
        )

    def load_own_variables(self, store):
        # The file has the scale, a scalar, not the kernel's shape; none is needed.
        if not self.built and "0" in store.keys():  # noqa: SIM118, HDF5 is no dict
            self.build(())
        super().load_own_variables(store)

    def penalty(self, w):
        """The penalty of a float32 tensor of the kernel's shape, a scalar."""
        scale = ops.cast(self.scale, "float32")
        square = ops.maximum(ops.square(scale), SWS_SCALE_FLOOR**2)
        pull = self.xi * ops.sum(w * ops.sign(w)) / square
        return pull + self.psi * ops.square(scale)

    def get_config(self):
        return {**super().get_config(), "xi": self.xi, "psi": self.psi}


@keras.saving.register_keras_serializable("keras_sparsity")
class MCP(KernelPenalty):
    """Minimax concave penalty: an L1 that fades out for large weights.

    ```
    penalty = sum(lam * |w| - w**2 / (2 * gamma)    where |w| <= gamma * lam
                  gamma * lam**2 / 2                elsewhere)
    ```

    Args:
        lam: Float >= 0, the slope at zero.
        gamma: Float > 0; weights above `gamma * lam` are not pulled at all.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    ```python
    layer = keras.layers.Dense(300, kernel_regularizer=MCP(lam=1e-4, gamma=1e3))
    ```

    Reference:

    - [Zhang, Nearly unbiased variable selection under minimax concave penalty](
        https://arxiv.org/abs/1002.4734), section 2.
    """

    def __init__(self, lam, gamma, trainable=True):
        super().__init__(trainable=trainable)
        self.lam = check_number("lam", lam, at_least=0)
        self.gamma = check_number("gamma", gamma, above=0)
        self.built = True  # or `SparsityOptimizer` would wait for weights of it

    def penalty(self, w):
        """The penalty of a float32 tensor of the kernel's shape, a scalar."""
        # Not `abs(w)`, whose gradient at 0 is 1 on JAX.
        magnitude = ops.minimum(w * ops.sign(w), self.gamma * self.lam)
        return ops.sum(self.lam * magnitude - ops.square(magnitude) / (2 * self.gamma))

    def get_config(self):
        return {**super().get_config(), "lam": self.lam, "gamma": self.gamma}
