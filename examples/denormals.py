"""Numbers below 1e-38, which many processors compute a hundred times more slowly."""

import keras


def flush():
    """Takes them for zero on torch; TensorFlow does so by itself, XLA in most threads.

    Where a gate is all but closed, or a mask is, they appear among the weights, and
    stay in the momentum. To be called before anything is computed: it reaches the
    calling thread, and threads that this one starts later.
    """
    if keras.backend.backend() == "torch":
        import torch

        torch.set_flush_denormal(True)
