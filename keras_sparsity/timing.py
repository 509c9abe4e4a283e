"""Times of layers and models in inference, measured in turns."""

import statistics
import time
from collections.abc import Callable, Sequence

import keras

from keras_sparsity.selection import to_array

# Of one comparison, after two calls to compile and to warm up.
_SECONDS = 0.3
_ROUNDS = range(7, 50)


def inference(layer, x) -> Callable:
    """A function that runs `layer` on `x` as `predict` would, and waits for it."""
    run = _INFERENCE[keras.backend.backend()](layer, x)
    return lambda: to_array(run())


def paired_medians(functions: Sequence[Callable]) -> list[float]:
    """The median seconds of each function, of rounds in which all have their turn."""

    def seconds(function):
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    for function in functions:
        function()
    rounds = int(_SECONDS / sum(map(seconds, functions)))
    rounds = min(max(rounds, _ROUNDS.start), _ROUNDS.stop)
    times = [list(map(seconds, functions)) for _ in range(rounds)]
    return list(map(statistics.median, zip(*times, strict=True)))


def _tensorflow_inference(layer, x):
    import tensorflow as tf

    function = tf.function(layer, autograph=False).get_concrete_function(x)
    return lambda: function(x)


def _jax_inference(layer, x):
    import jax

    # Its variables are arguments: constants, XLA would prepare while it compiles.
    function = jax.jit(lambda *state_and_x: layer.stateless_call(*state_and_x)[0])
    state = [
        [variable.value for variable in variables]
        for variables in (layer.trainable_variables, layer.non_trainable_variables)
    ]
    return lambda: function(*state, x)


def _torch_inference(layer, x):
    import torch

    return torch.no_grad()(lambda: layer(x))


_INFERENCE = {
    "jax": _jax_inference,
    "tensorflow": _tensorflow_inference,
    "torch": _torch_inference,
}
