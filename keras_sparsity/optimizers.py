"""An optimizer that gives scales and thresholds a learning rate of their own."""

from collections.abc import Callable

import keras

from keras_sparsity.checks import check_number
from keras_sparsity.selection import is_method_variable

# Without these in common the two optimizers would not update in the same steps.
_SHARED = (
    "gradient_accumulation_steps",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
)


@keras.saving.register_keras_serializable("keras_sparsity")
class SparsityOptimizer(keras.optimizers.Optimizer):
    """Trains scales and thresholds with an optimizer and a learning rate of their own.

    ```
    weights:                optimizer,           at learning_rate
    scales and thresholds:  sparsity_optimizer,  at multiplier * learning_rate
    ```

    `learning_rate` is that of `optimizer` at every step, whatever changes it: a
    schedule, `LearningRateScheduler`, `ReduceLROnPlateau` or an assignment.

    Gradient accumulation, moving averages (a threshold belongs to the weights that it
    was learned with, so both are averaged) and loss scaling are those of `optimizer`
    too. Its weight decay and its clipping are not: scales and thresholds never decay,
    and their gradients, which are sums over kernels, are left out of its
    `global_clipnorm`. On a model without scales and thresholds this is `optimizer`.

    Tested as either: Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, Ftrl, Lamb,
    Lion, Muon, Nadam, RMSprop, ScheduleFreeAdamW and SGD.

    Args:
        optimizer: A Keras optimizer or its name, for everything but scales and
            thresholds. `LossScaleOptimizer` goes around a `SparsityOptimizer`, where
            `compile` puts it under `mixed_float16`, not inside.
        sparsity_optimizer: A Keras optimizer or its name, for scales and thresholds.
            A copy is used, in which the learning rate and what else follows
            `optimizer` is replaced and weight decay is off; momentum, clipping and
            the like are kept. Defaults to `"sgd"`.
        multiplier: Float > 0, the learning rate of scales and thresholds in units of
            the weights' learning rate. Defaults to 1.
        name: String, the name of the optimizer.

    Raises:
        ValueError: If `optimizer` or `sparsity_optimizer` is no Keras optimizer, or
            one that wraps others, or if `multiplier` is not a finite number > 0.

    Example:

    ```python
    model.compile(
        SparsityOptimizer(keras.optimizers.AdamW(1e-3), multiplier=10.0),
        loss="sparse_categorical_crossentropy",
    )
    ```
    """

    def __init__(self, optimizer, sparsity_optimizer="sgd", multiplier=1.0, name=None):
        optimizer = _single_optimizer("optimizer", optimizer)
        original = _single_optimizer("sparsity_optimizer", sparsity_optimizer)
        multiplier = check_number("multiplier", multiplier, above=0)
        super().__init__(
            learning_rate=0.0, loss_scale_factor=optimizer.loss_scale_factor, name=name
        )
        self.optimizer = optimizer
        self.multiplier = multiplier
        self._awaited: Callable[[], list] = lambda: []
        self._positions: dict[int, int] = {}
        config = original.get_config()
        # Two keys with Muon, which has an `adam_weight_decay` besides.
        decays = [key for key in config if key.endswith("weight_decay") and config[key]]
        self.sparsity_optimizer = type(original).from_config(
            config
            | {key: getattr(optimizer, key) for key in _SHARED}
            | dict.fromkeys(decays, 0.0)
            | {"learning_rate": self._sparsity_learning_rate}
        )

    def _sparsity_learning_rate(self):
        return self.multiplier * self.optimizer.learning_rate

    def _parts(self, variables, *columns):
        """Yields each optimizer with its rows of `variables` and `columns`."""
        rows = sorted(
            zip(variables, *columns, strict=True),
            key=lambda row: self._positions.get(id(row[0]), 0),
        )
        # The main optimizer comes last. Once it has counted the step, its schedule is
        # one ahead, and so would be the rate of scales and thresholds.
        yield self.sparsity_optimizer, [r for r in rows if is_method_variable(r[0])]
        yield self.optimizer, [r for r in rows if not is_method_variable(r[0])]

    def build(self, variables):
        """Builds the two optimizers, or waits for scales that are not made yet.

        A HALO that is given to a layer makes its scale in the first step, and this may
        be called before: by `load_model`, by `BackupAndRestore`.
        """
        if self.built:
            return
        if _are_complete(variables):
            self._build_all(variables)
        else:
            # A function, because variables as an attribute would be tracked.
            self._awaited = lambda: variables

    def _build_all(self, variables):
        super().build(variables)
        self._build_parts(variables)

    def _build_parts(self, variables):
        if self.optimizer.built:  # since weights were loaded
            return
        # Optimizers restore by order, which must not depend on when scales were made.
        ordered = _with_scales(variables)
        self._positions = {id(v): position for position, v in enumerate(ordered)}
        for optimizer, rows in self._parts(variables):
            optimizer.build([variable for (variable,) in rows])

    def apply(self, grads, trainable_variables=None):
        if trainable_variables is None:
            trainable_variables = self._trainable_variables or self._awaited()
        if not self.built:
            self._build_all(list(trainable_variables))
        for optimizer, rows in self._parts(trainable_variables, grads):
            # A `LossScaleOptimizer` around this one sets its factor to None.
            optimizer.loss_scale_factor = self.loss_scale_factor
            optimizer.apply([g for _, g in rows], [variable for variable, _ in rows])
            if not rows:
                # Keras does not count a step without gradients, and the schedule of a
                # main optimizer whose weights are all frozen would stand still.
                optimizer._iterations.assign_add(1)

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        if not self.built and self._awaited():
            raise ValueError(
                "The optimizer waits for scales that no penalty has made yet: read "
                "`model.losses` before `optimizer.build(model.trainable_variables)`. "
                "Received a call before."
            )
        return super().stateless_apply(optimizer_variables, grads, trainable_variables)

    def finalize_variable_values(self, var_list):
        if not self.built:
            self._build_all(list(var_list))
        for optimizer, rows in self._parts(var_list):
            optimizer.finalize_variable_values([variable for (variable,) in rows])

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        self.optimizer.exclude_from_weight_decay(var_list, var_names)

    # There is no public `optimizers`, which `LearningRateScheduler` would walk to set
    # every rate to the same value.
    @property
    def learning_rate(self):
        return self.optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.optimizer.learning_rate = learning_rate

    @property
    def iterations(self):
        return self.optimizer.iterations

    @property
    def variables(self):
        return self.optimizer.variables + self.sparsity_optimizer.variables

    @property
    def _model_variables_moving_average(self):
        # The callback `SwapEMAWeights` looks here for an average of every variable.
        if not self.built:
            raise ValueError(
                "`SwapEMAWeights` needs an optimizer that knows all variables of the "
                "model. Call `optimizer.build(model.trainable_variables)` once more "
                "after weights were loaded. Received one that waits for scales."
            )
        averages: dict = {}
        for optimizer, rows in self._parts(self._trainable_variables):
            ids = [id(variable) for (variable,) in rows]
            averages |= zip(ids, optimizer._model_variables_moving_average, strict=True)
        return [averages[id(variable)] for variable in self._trainable_variables]

    def set_weights(self, weights):
        for variable, weight in zip(self.variables, weights, strict=True):
            variable.assign(weight)

    def save_own_variables(self, store):
        """Saves nothing: Keras saves the attributes that are optimizers by itself."""

    def load_own_variables(self, store):
        """Loads nothing, but builds the two optimizers, which are loaded next.

        Keras has loaded the layers before, and if the file has their scales, these are
        there now.
        """
        variables = self._awaited()
        if variables and not self.built and _are_complete(variables):
            self._build_parts(_with_scales(variables))

    def get_config(self):
        sparsity_optimizer = keras.saving.serialize_keras_object(
            self.sparsity_optimizer
        )
        # Any number would do; it stands for a method of this object.
        sparsity_optimizer["config"]["learning_rate"] = self.multiplier
        return {
            "optimizer": keras.saving.serialize_keras_object(self.optimizer),
            "sparsity_optimizer": sparsity_optimizer,
            "multiplier": self.multiplier,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        # Not `keras.optimizers.deserialize`, which does not know Lamb.
        optimizers = {
            key: keras.saving.deserialize_keras_object(config[key], custom_objects)
            for key in ("optimizer", "sparsity_optimizer")
        }
        return cls(**{**config, **optimizers})


def _are_complete(variables):
    """Whether the penalties of `variables` have made their scales, if they need any."""
    return all(getattr(_regularizer(v), "built", True) for v in variables)


def _with_scales(variables):
    """`variables` and the scales of their penalties, each behind its kernel."""
    ordered: dict = {}
    for variable in variables:
        scales = getattr(_regularizer(variable), "trainable_variables", [])
        ordered |= {id(each): each for each in (variable, *scales)}
    return list(ordered.values())


def _regularizer(variable):
    return getattr(variable, "regularizer", None)  # a `tf.Variable` has none


def _single_optimizer(name, identifier):
    """The optimizer that the argument `name` asks for."""
    wrappers = (
        keras.optimizers.LossScaleOptimizer,
        keras.optimizers.MultiOptimizer,
        SparsityOptimizer,
    )
    try:
        optimizer = keras.optimizers.get(identifier)
    except ValueError:
        optimizer = None
    if optimizer is None or isinstance(optimizer, wrappers):
        raise ValueError(
            f"Argument `{name}` must be a Keras optimizer that wraps no other, or "
            f"the name of one. Received: {name}={identifier!r}"
        )
    return optimizer
