"""Sparse matrix times dense matrix, by the running backend's own kernels."""

import warnings
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

NO_XLA = (
    "XLA has no kernels for TensorFlow's sparse matrices. Expected a model and a "
    "function without `jit_compile=True`. Received one that XLA compiles: leave "
    "`jit_compile` out, or compile the dense model."
)

# The kernels of JAX and TensorFlow need more time for fewer columns than for these.
_LEAST_COLUMNS = 8


def sparse_product(matrix: np.ndarray) -> Callable:
    """A function that multiplies `matrix`, kept as compressed sparse rows.

    Args:
        matrix: Array of shape `(m, k)` in float32.

    Returns:
        A function of a float32 tensor of shape `(k, n)`: their product, `(m, n)`.

    Raises:
        NotImplementedError: If the backend has no sparse kernels.
    """
    backend = keras.backend.backend()
    if backend not in _PRODUCTS:
        raise NotImplementedError(f"the backend '{backend}' has no sparse kernels")
    rows, columns = np.nonzero(matrix)
    return _PRODUCTS[backend](matrix.shape, matrix[rows, columns], rows, columns)


def takes_xla() -> bool:
    """Whether XLA has the backend's sparse kernels, or the backend no XLA."""
    return keras.backend.backend() != "tensorflow"


def refuse_xla():
    """Raises where TensorFlow compiles with XLA, which has no sparse kernels there."""
    if not takes_xla():
        import tensorflow as tf

        # There is no public way to ask.
        from tensorflow.python.ops import control_flow_util

        if control_flow_util.GraphOrParentsInXlaContext(
            tf.compat.v1.get_default_graph()
        ):
            raise ValueError(NO_XLA)


def _tensorflow_product(shape, values, rows, columns):
    import tensorflow as tf

    def build(indices, values):
        return tf.raw_ops.SparseTensorToCSRSparseMatrix(
            indices=indices, values=values, dense_shape=shape
        )

    # Made by a function, the matrix knows its shape, and so other functions can have
    # it as a constant. Made in each call it would take as long as the product.
    given = tf.constant(np.stack([rows, columns], 1)), tf.constant(values)
    matrix = tf.function(build, autograph=False).get_concrete_function(*given)(*given)

    def product(x):
        count = tf.shape(x)[1]
        if x.shape[1] is None or x.shape[1] < _LEAST_COLUMNS:
            x = tf.pad(x, [[0, 0], [0, tf.maximum(_LEAST_COLUMNS - count, 0)]])
        return tf.raw_ops.SparseMatrixMatMul(a=matrix, b=x)[:, :count]

    return product


def _jax_product(shape, values, rows, columns):
    import jax.numpy as jnp
    from jax.experimental import sparse

    matrix = sparse.BCSR(
        (jnp.asarray(values), jnp.asarray(columns, "int32"), _row_starts(shape, rows)),
        shape=shape,
    )

    def product(x):
        count = x.shape[1]
        x = jnp.pad(x, ((0, 0), (0, max(_LEAST_COLUMNS - count, 0))))
        return (matrix @ x)[:, :count]

    return product


def _torch_product(shape, values, rows, columns):
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        matrix = torch.sparse_csr_tensor(
            # Of 64 bits, they would be converted in each call.
            ops.convert_to_tensor(_row_starts(shape, rows)),
            ops.convert_to_tensor(columns.astype("int32")),
            ops.convert_to_tensor(values),
            size=shape,
            check_invariants=True,
        )
    return lambda x: matrix @ x


def _row_starts(shape, rows):
    """Where each row begins, and the last one ends, in the list of all nonzeros."""
    return np.searchsorted(rows, np.arange(shape[0] + 1)).astype("int32")


_PRODUCTS = {
    "jax": _jax_product,
    "tensorflow": _tensorflow_product,
    "torch": _torch_product,
}
