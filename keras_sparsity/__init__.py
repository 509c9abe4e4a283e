"""Prune Keras 3 models while they train: learned scales and learned thresholds."""

from keras_sparsity.optimizers import SparsityOptimizer
from keras_sparsity.regularizers import HALO, MCP, SWS
from keras_sparsity.report import SparsityReport, report
from keras_sparsity.schedules import ConstantSparsity, CubicSparsity
from keras_sparsity.transform import finalize, prune, pruning_curve, sparsify
from keras_sparsity.wrappers import LTP, KeepZeros, MagnitudePruning, Penalized

__version__ = "0.1.0"
