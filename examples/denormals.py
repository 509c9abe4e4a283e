"""Numbers below 1e-38, which many processors compute a hundred times more slowly."""

import keras


def flush():
    """Takes them for zero on torch, as TensorFlow and XLA do by themselves.

    Where a gate is all but closed, or a mask is, they appear among the weights, and
    stay in the momentum.
    """
    if keras.backend.backend() == "torch":
        import torch

        torch.set_flush_denormal(True)
