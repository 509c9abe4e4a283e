"""A smaller model that computes the same: without its dead units."""

import keras
import numpy as np

from keras_sparsity.influence import smaller_layers
from keras_sparsity.rebuild import Rebuilt, check_rebuildable, clone, copy_state
from keras_sparsity.selection import check_plain, check_weights


def compact(model):
    """A new, smaller model without the units that cannot influence the outputs.

    A neuron, filter or channel goes if all weights that lead out of it are zero, or if
    all that lead into it are: then it is constant, and what it adds is put into the
    biases of the layers that follow. That is exact, so that the outputs in inference
    are equal but for rounding, and it is complete: another `compact` finds nothing.

    Known are `Dense`, `Conv1D` to `Conv3D`, `DepthwiseConv1D` and `2D`,
    `BatchNormalization`, activations that take one number at a time, pooling, dropout,
    `ZeroPadding1D` to `3D`, `Flatten`, `Concatenate`, `Add`, `Average` and `Subtract`,
    each called once. All that goes into another layer, such as a softmax or layer
    normalization, stays, and of every layer one unit. A unit stays if what it is added
    to stays; a constant that is not 0 stays if a convolution that follows pads with
    zeros. What stays is in `report(model).dead_units`, with the reason: in that of this
    model before, with what goes, and in that of the smaller model after. The report is
    there and not here since it is about a model, whoever made it.

    Args:
        model: A built Sequential or Functional `keras.Model` without methods: what
            `finalize` or `prune` returned. Models in it are made smaller too.

    Returns:
        An uncompiled model of the same layers, of the same names, that shares nothing
        with `model`. A layer without a bias has one if it takes up constants.

    Raises:
        TypeError: If the model is subclassed.
        ValueError: If the model is not built, a method governs its weights, or a weight
            is NaN.

    Example:

    ```python
    small = ks.compact(ks.prune(model, 0.95))
    print(ks.report(small))
    ```
    """
    check_rebuildable(model, "compact")
    check_plain(model, "compact")
    check_weights(model)
    smaller = smaller_layers(model)

    def convert(layer):
        if id(layer) not in smaller:
            return clone(layer)
        arguments, _ = smaller[id(layer)]
        return clone(layer, **_initializers(layer), **arguments)

    def fill(layer, new):
        if id(layer) in smaller:
            _, weights = smaller[id(layer)]
            for weight in new.weights:
                weight.assign(weights[weight.name])
        else:
            copy_state(layer, new)

    return Rebuilt(model, convert, fill, clones=False).model


def _initializers(layer):
    """Others in place of arrays, which have the size of the layer as it was."""
    return {
        name: "zeros"
        for name, value in vars(layer).items()
        if isinstance(value, keras.initializers.Constant) and np.ndim(value.value)
    }
