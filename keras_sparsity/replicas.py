"""What one of several processes or devices must know of a model's distribution."""

import contextlib

import keras


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
    strategy = getattr(model, "distribute_strategy", None)
    resolver = getattr(strategy, "cluster_resolver", None)
    if resolver is None or not (jobs := resolver.cluster_spec().jobs):
        return True
    first = "chief" if "chief" in jobs else "worker"
    return (resolver.task_type, resolver.task_id) == (first, 0)
