"""What one of several processes or devices must know of a model's distribution."""

import contextlib

import keras
import numpy as np
from keras import ops


def scope_of(model):
    """The scope of the `tf.distribute` strategy that `model` was made in, to enter.

    Elsewhere, one that does nothing.
    """
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def is_chief(model):
    """Whether this process, of those that train `model` together, writes files."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.process_index() == 0
    resolver = _cluster(model)
    if resolver is None:
        return True
    first = "chief" if "chief" in resolver.cluster_spec().jobs else "worker"
    return (resolver.task_type, resolver.task_id) == (first, 0)


def all_workers_have(model, number):
    """Waits for the other workers of `model`: whether each `number` is this one's."""
    if _cluster(model) is None:
        return True
    strategy = model.distribute_strategy
    # All are equal if their mean is this one and their mean square is its square.
    moments = np.array([number, number**2], "float64")
    numbers = strategy.run(lambda: ops.convert_to_tensor(moments))
    sums = ops.convert_to_numpy(strategy.reduce("SUM", numbers, axis=None))
    return bool((sums == moments * strategy.num_replicas_in_sync).all())


def _cluster(model):
    """The `ClusterResolver` of the workers that train `model`; `None` with one."""
    strategy = getattr(model, "distribute_strategy", None)
    resolver = getattr(strategy, "cluster_resolver", None)
    return resolver if resolver is not None and resolver.cluster_spec().jobs else None
