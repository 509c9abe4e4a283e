"""The program that JAX makes of a model's training step, to look at."""


def compiled_step(model, x, y):
    """The compiled program of `model.train_step`, and the state that it begins with."""
    import jax

    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = [[variable.value for variable in group] for group in groups]
    return jax.jit(model.train_step).lower(state, (x, y)).compile(), state
