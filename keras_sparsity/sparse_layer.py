"""The layer that runs a Dense or convolution kernel as a sparse matrix."""

import itertools
import math
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from keras_sparsity.products import refuse_xla, sparse_product, takes_xla
from keras_sparsity.rebuild import clone
from keras_sparsity.selection import walk

_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)

# Images of fewer positions are multiplied all at once, others one by one: their
# patches then stay in the processor's cache.
_FEW_POSITIONS = 16


def why_dense(layer) -> str | None:
    """Why `SparseLayer` cannot stand for a layer with a kernel, if it cannot."""
    # Exactly these: a subclass may compute something else.
    if type(layer) not in (layers.Dense, *_CONVOLUTIONS):
        return "only Dense, Conv1D, Conv2D and Conv3D run sparse"
    if len(walk(layer)) > 1:
        return "its activation is a layer, which may have weights"
    if len(layer.weights) != 1 + layer.use_bias:  # as a quantized layer has
        return "it has weights beside its kernel and bias"
    if layer.compute_dtype != "float32":
        return f"it computes in {layer.compute_dtype}, sparse kernels in float32"
    if None in layer.get_build_config()["input_shape"][1:]:
        return "a size of its input is not known"
    return None


class SparseLayer(keras.Layer):
    """A Dense or convolution layer that multiplies the nonzeros of its kernel only.

    ```
    y = activation(sparse(kernel.T) @ x + bias)
    ```

    In a convolution the columns of `x` are the patches of one image: views of it,
    shifted by the position of each kernel tap, one upon the other. For inference, in
    memory: it has no variables, and cannot be trained, saved or loaded.

    Args:
        layer: A built layer that `why_dense` has nothing against. Its kernel and bias
            are given by `load_own_variables`, once.
    """

    def __init__(self, layer):
        super().__init__(
            name=layer.name,
            dtype=layer.dtype_policy,
            activity_regularizer=layer.activity_regularizer,
        )
        self.supports_masking = layer.supports_masking
        self.supports_jit = takes_xla()
        # A method of a copy without weights: as an attribute it would be a sublayer.
        self._output_shape_of = clone(layer).compute_output_shape
        self._activation = layer.activation
        self._product: Any = None  # until the kernel is given
        if isinstance(layer, layers.Dense):
            self._apply = self._dense
        else:
            self._apply = self._convolve
            self._kernel_size = layer.kernel_size
            self._strides = layer.strides
            self._dilation = layer.dilation_rate
            self._groups = layer.groups
            self._padding = layer.padding
            self._is_first = layer.data_format == "channels_first"

    def load_own_variables(self, store):
        if self._product is not None:
            raise ValueError(
                f"Layer '{self.name}' runs sparse in memory: its kernel cannot be "
                "replaced. Load the weights into the dense model, and call "
                "`accelerate` again."
            )
        kernel = np.asarray(store["0"])
        self._product = sparse_product(self._matrix(kernel))
        self._filters = kernel.shape[-1]
        self.built = True
        self._bias = np.asarray(store["1"]) if "1" in store else None

    def _matrix(self, kernel):
        """The kernel as a matrix of a row per output, a column per tap and input."""
        *taps, inputs, filters = kernel.shape
        groups = getattr(self, "_groups", 1)
        blocks = np.zeros(
            (groups, filters // groups, math.prod(taps), groups, inputs), kernel.dtype
        )
        kernel = kernel.reshape(-1, inputs, groups, filters // groups)
        for group in range(groups):
            blocks[group, :, :, group] = kernel[:, :, group].transpose(2, 0, 1)
        return blocks.reshape(filters, -1)

    def call(self, inputs, training=None):
        if training:
            raise ValueError(
                f"Layer '{self.name}' runs sparse, in inference only. Expected "
                "`training=False`. Received: training=True. Train the model that was "
                "given to `accelerate`, and call `accelerate` again."
            )
        refuse_xla()
        return self._activation(self._apply(ops.cast(inputs, self.compute_dtype)))

    def _dense(self, x):
        *sizes, channels = ops.shape(x)
        columns = ops.transpose(ops.reshape(x, (-1, channels)))
        y = ops.transpose(self._product(columns))
        return ops.reshape(self._biased(y), (*sizes, self._filters))

    def _convolve(self, x):
        x = x if self._is_first else ops.moveaxis(x, -1, 1)
        sizes = x.shape[2:]
        x = ops.pad(x, [(0, 0), (0, 0), *map(self._pads, range(len(sizes)), sizes)])
        counts = [
            (size - (kernel - 1) * dilation - 1) // stride + 1
            for size, kernel, dilation, stride in zip(
                x.shape[2:],
                self._kernel_size,
                self._dilation,
                self._strides,
                strict=True,
            )
        ]
        positions = math.prod(counts)
        if positions < _FEW_POSITIONS or x.shape[0] == 0:  # nothing to map over
            y = self._product(self._patches(ops.moveaxis(x, 0, 1), counts))
            y = ops.moveaxis(ops.reshape(y, (self._filters, -1, *counts)), 0, 1)
        else:
            y = ops.map(
                lambda image: self._product(self._patches(image[:, None], counts)), x
            )
            y = ops.reshape(y, (-1, self._filters, *counts))
        if self._is_first:
            return ops.moveaxis(self._biased(ops.moveaxis(y, 1, -1)), -1, 1)
        return self._biased(ops.moveaxis(y, 1, -1))

    def _pads(self, axis, size):
        """Zeros before and after `size` positions."""
        reach = (self._kernel_size[axis] - 1) * self._dilation[axis]
        if self._padding == "causal":
            return reach, 0
        if self._padding == "valid":
            return 0, 0
        steps = -(-size // self._strides[axis]) - 1
        total = max(steps * self._strides[axis] + reach + 1 - size, 0)
        return total // 2, total - total // 2

    def _patches(self, x, counts):
        """What each tap meets, upon each other; `x` is of channels, images, sizes."""
        taps = []
        for tap in itertools.product(*map(range, self._kernel_size)):
            starts = [i * d for i, d in zip(tap, self._dilation, strict=True)]
            slices = [
                slice(start, start + (count - 1) * stride + 1, stride)
                for start, count, stride in zip(
                    starts, counts, self._strides, strict=True
                )
            ]
            taps.append(x[(slice(None), slice(None), *slices)])
        patches = ops.concatenate(taps) if len(taps) > 1 else taps[0]
        return ops.reshape(patches, (patches.shape[0], -1))

    def _biased(self, y):
        return y if self._bias is None else ops.add(y, self._bias)

    def compute_output_shape(self, input_shape):
        return self._output_shape_of(input_shape)

    def get_config(self):
        raise NotImplementedError(self._no_file())

    def save_own_variables(self, store):
        raise NotImplementedError(self._no_file())

    def _no_file(self):
        return (
            f"Layer '{self.name}' runs sparse in memory, and cannot be saved or "
            "cloned, nor reported on. Save the model that was given to `accelerate`, "
            "and call `accelerate` where it is loaded; report on that model too."
        )
