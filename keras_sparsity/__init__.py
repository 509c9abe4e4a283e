"""Prune Keras 3 models while they train: learned scales and learned thresholds."""

import importlib

from keras_sparsity.accelerate import accelerate
from keras_sparsity.compact import compact
from keras_sparsity.masks import KeepZeros, MagnitudePruning
from keras_sparsity.optimizers import SparsityOptimizer
from keras_sparsity.pruning import prune, pruning_curve
from keras_sparsity.recalibration import recalibrate
from keras_sparsity.record import Trail
from keras_sparsity.regularizers import HALO, MCP, SWS
from keras_sparsity.report import SparsityReport, report
from keras_sparsity.saving import export_litert, save_model
from keras_sparsity.schedules import ConstantSparsity, CubicSparsity
from keras_sparsity.target import SparsityTarget
from keras_sparsity.trail import SparsityTrail
from keras_sparsity.transform import finalize, sparsify
from keras_sparsity.wrappers import LTP, Penalized

__version__ = "0.1.0"

__all__ = [
    "HALO",
    "LTP",
    "MCP",
    "SWS",
    "ConstantSparsity",
    "CubicSparsity",
    "KeepZeros",
    "MagnitudePruning",
    "Penalized",
    "SparsityOptimizer",
    "SparsityReport",
    "SparsityTarget",
    "SparsityTrail",
    "Trail",
    "accelerate",
    "compact",
    "export_litert",
    "finalize",
    "prune",
    "pruning_curve",
    "recalibrate",
    "report",
    "save_model",
    "sparsify",
]


def __getattr__(name):
    if name == "distribution":  # not above, since it needs TensorFlow
        return importlib.import_module("keras_sparsity.distribution")
    raise AttributeError(f"module 'keras_sparsity' has no attribute '{name}'")
