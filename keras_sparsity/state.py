"""The state of a training at the end of an epoch, to continue it exactly."""

import json
import random

import keras
import numpy as np

from keras_sparsity.replicas import scope_of
from keras_sparsity.selection import to_array


def training_state(model) -> dict[str, np.ndarray]:
    """What the next epoch of `fit` depends on, as arrays.

    That is every variable of the model, the states of seed generators (dropout) among
    them, every variable of its optimizer, and the random generators of Python, NumPy
    and torch, which the order of shuffled arrays is drawn from.
    """
    return {
        **{name: _storable(variable) for name, variable in _variables(model).items()},
        **_generators(),
    }


def restore_training_state(model, state):
    """Puts `state`, made by `training_state`, into a compiled model like that one.

    Raises:
        ValueError: If the state has other variables, before anything is changed.
    """
    if not model.optimizer.built:
        with scope_of(model):
            model.optimizer.build(model.trainable_variables)
    variables = _variables(model)
    kinds: dict = {k: tuple(variable.shape) for k, variable in variables.items()}
    kinds |= {name: generator.shape for name, generator in _generators().items()}
    # The texts of generators are arrays of no dimension, of torch's it is the size.
    found = {k: v.shape for k, v in state.items() if "/" in k}
    if kinds != found:
        differences = sorted({*kinds.items()} ^ {*found.items()})
        raise ValueError(
            "The state must be that of the same model and optimizer. Received one that "
            f"differs in {differences[:4]}."
        )
    for name, variable in variables.items():
        variable.assign(state[name])
    _restore_generators(state)


def _variables(model):
    """All the variables of a training, by owner and position.

    Their names tell no more: they contain those of layers that were not given one,
    which are numbered anew with each model that a process makes.
    """
    return {
        f"{owner}/{index}": variable
        for owner, variables in (
            ("model", model.variables),
            ("optimizer", model.optimizer.variables),
        )
        for index, variable in enumerate(variables)
    }


def _storable(variable):
    array = to_array(variable)
    # The types of machine learning, as bfloat16, are unknown to NumPy's files.
    return array.astype("float32") if array.dtype.kind == "V" else array


def _generators():
    texts = {"python": random.getstate(), "numpy": np.random.get_state(legacy=False)}
    state = {
        f"random/{name}": np.array(json.dumps(value, default=np.ndarray.tolist))
        for name, value in texts.items()
    }
    if keras.backend.backend() == "torch":
        import torch

        state["random/torch"] = torch.get_rng_state().numpy()
    return state


def _restore_generators(state):
    version, numbers, gauss = json.loads(str(state["random/python"]))
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(json.loads(str(state["random/numpy"])))
    if keras.backend.backend() == "torch":
        import torch

        torch.set_rng_state(torch.from_numpy(state["random/torch"]))
