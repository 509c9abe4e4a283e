"""The networks of the examples: published sizes, and both methods on each."""

import functools
import json
import pathlib
import re
import sys

import keras
import numpy as np
import pytest

import keras_sparsity as ks

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import models  # noqa: E402
from models import mixnet  # noqa: E402

MNIST, CIFAR, IMAGENET = (28, 28, 1), (32, 32, 3), (224, 224, 3)

# All parameters that train, biases and batch-norm among them.
PARAMETERS = [
    ("lenet_300_100", MNIST, 10, 266_610),
    ("lenet5", MNIST, 10, 61_706),
    ("resnet20", CIFAR, 10, 272_474),
    ("cifar_resnet50", CIFAR, 100, 764_404),
    ("vgg_like", CIFAR, 10, 14_710_464 + 2 * 4224 + 5130),
]
LARGE = [
    ("alexnet", IMAGENET, 1000, 61_100_840),
    ("mixnet_s", IMAGENET, 1000, 4_134_606),
    # Those that do not train are statistics: 25,636,712, 3,538,984 and 5,330,571 with.
    ("ResNet50", IMAGENET, 1000, 25_583_592),
    ("MobileNetV2", IMAGENET, 1000, 3_504_872),
    ("EfficientNetB0", IMAGENET, 1000, 5_288_548),
]


def sizes(model, rank=0):
    """Numbers of parameters that train, of the weights of this rank or more."""
    return [np.prod(w.shape) for w in model.trainable_weights if len(w.shape) >= rank]


@pytest.mark.parametrize(
    ("name", "input_shape", "classes", "parameters"),
    [*PARAMETERS, *(pytest.param(*row, marks=pytest.mark.slow) for row in LARGE)],
)
def test_networks_have_the_published_number_of_parameters(
    name, input_shape, classes, parameters
):
    model = models.build(name, input_shape, classes)
    assert sum(sizes(model)) == parameters
    assert model.output.shape == (None, classes)
    if name == "vgg_like":
        assert sum(sizes(model, rank=4)) == 14_710_464
    if name == "cifar_resnet50":
        assert sum(sizes(model, rank=4)) == 754_096


def test_a_block_of_mixnet_has_the_parts_of_the_paper():
    inputs = keras.Input((6, 6, 8))
    stage = mixnet.Stage(1, (3, 5), 2, 2, 1, 6, 8, 0.5)
    model = keras.Model(inputs, mixnet.mixnet_block(inputs, stage, strides=1))
    # Expand by 6 in two halves, 3x3 and 5x5 on 24 channels each, a gate through 4
    # channels, project in two halves, and batch-norm after each.
    expand, depthwise, project = 2 * 4 * 24, 24 * 9 + 24 * 25, 2 * 24 * 4
    gate = 48 * 4 + 4 + 4 * 48 + 48
    norms = 2 * (48 + 48 + 8)
    assert sum(sizes(model)) == expand + depthwise + project + gate + norms
    check(model, inputs.shape[1:])


BACKBONES = {
    "ResNetBackbone": {
        "stackwise_filters": [4, 8],
        "stackwise_blocks": [1, 1],
        "stackwise_strides": [1, 2],
    },
    # With lambdas that refer to globals of keras-cv.
    "CSPDarkNetBackbone": {"stackwise_channels": [4, 8], "stackwise_depth": [1, 1]},
}


@pytest.fixture(params=BACKBONES)
def backbone(request, tmp_path):
    """The name of a small backbone of keras-cv: a preset in a folder."""
    keras_cv = pytest.importorskip("keras_cv")
    family = getattr(keras_cv.models, request.param)
    network = family(**BACKBONES[request.param], include_rescaling=False)
    config = keras.saving.serialize_keras_object(network)
    del config["build_config"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "weights": None}))
    return f"keras_cv/{tmp_path}"


METHODS = {
    "HALO": ks.HALO(xi=3e-7, psi=5e-4),
    # A threshold that is above some of the weights of every layer from the start.
    "LTP": functools.partial(ks.LTP, l0=1e-6, initial_threshold=1.0),
}


def paths(model):
    # Blocks of CSPDarkNet are counted, and no config has their names.
    return [re.sub(r"conv_block\d+", "conv_block", w.path) for w in model.weights]


def check(model, input_shape):
    """Both methods govern every kernel of `model`, and `finalize` is exact."""
    # At fresh batch statistics, deep networks give almost nothing.
    x = 10 * np.random.default_rng(0).normal(size=(2, *input_shape)).astype("float32")
    kernels = [w for w in model.trainable_weights if len(w.shape) >= 2]
    for name, method in METHODS.items():
        sparse = ks.sparsify(model, method)
        governed = [row for row in ks.report(sparse).rows if row.method == name]
        assert [r.shape for r in governed] == [tuple(w.shape) for w in kernels]
        plain = ks.finalize(sparse)
        assert paths(plain) == paths(model)
        zeros = ks.report(plain).sparsity
        # Among millions of fresh weights, a few are zero.
        assert 0.2 < zeros < 0.6 if name == "LTP" else zeros < 1e-5
        expected = keras.ops.convert_to_numpy(sparse(x, training=False))
        scale = np.abs(expected).max()
        assert scale > 0
        plain = keras.ops.convert_to_numpy(plain(x, training=False))
        np.testing.assert_allclose(plain, expected, rtol=1e-6, atol=1e-6 * scale)


SMALL = [("lenet_300_100", MNIST), ("lenet5", MNIST)]
DEEP = [
    ("resnet20", (8, 8, 3)),
    ("vgg_like", CIFAR),
    ("cifar_resnet50", (8, 8, 3)),
    ("alexnet", (64, 64, 3)),
    ("mixnet_s", CIFAR),
    ("ResNet50", CIFAR),
    ("MobileNetV2", CIFAR),
    ("EfficientNetB0", CIFAR),
]


@pytest.mark.parametrize(
    ("name", "input_shape"),
    [*SMALL, *(pytest.param(*row, marks=pytest.mark.slow) for row in DEEP)],
)
def test_both_methods_govern_every_kernel(name, input_shape):
    check(models.build(name, input_shape, 10), input_shape)


def test_both_methods_govern_every_kernel_of_a_backbone(backbone):
    check(models.build(backbone, (16, 16, 3), 10), (16, 16, 3))


@pytest.mark.slow  # half a minute on JAX
def test_a_gray_image_is_one_of_three_equal_channels():
    gray = models.build("MobileNetV2", (32, 32, 1), 10)
    colored = models.build("MobileNetV2", CIFAR, 10)
    colored.set_weights(gray.get_weights())
    x = 10 * np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype("float32")
    expected = keras.ops.convert_to_numpy(colored(np.repeat(x, 3, axis=-1)))
    assert np.abs(expected).max() > 0
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(gray(x)), expected)


def test_weights_are_those_of_a_file(tmp_path):
    trained = models.build("lenet5", MNIST, 10)
    trained.save(tmp_path / "trained.keras")
    path = str(tmp_path / "trained.keras")
    model = models.build("lenet5", MNIST, 10, weights=path)
    for a, b in zip(model.get_weights(), trained.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_preset_that_is_not_there_is_refused_with_what_is(backbone):
    with pytest.raises(ValueError, match="no preset resnet5.*resnet50_v2"):
        models.build("keras_cv/resnet5", MNIST, 10)


def test_a_preset_that_cannot_be_loaded_is_refused_with_what_to_do(tmp_path):
    pytest.importorskip("keras_cv")
    (tmp_path / "config.json").write_text("{")
    message = r"(?s)could not be loaded: .* machine with a network copy the files of"
    with pytest.raises(RuntimeError, match=message):
        models.build(f"keras_cv/{tmp_path}", MNIST, 10)


def test_what_is_not_there_is_refused_with_what_is():
    with pytest.raises(ValueError, match="small_cnn.*ResNet50.*Received: name=vgg"):
        models.build("vgg", MNIST, 10)
    with pytest.raises(ValueError, match="no ImageNet weights for lenet5"):
        models.build("lenet5", MNIST, 10, weights="imagenet")
    with pytest.raises(ValueError, match="file that is there.*nowhere.keras"):
        models.build("lenet5", MNIST, 10, weights="nowhere.keras")
    with pytest.raises(ValueError, match="1000 classes. Received a data set of 10"):
        models.build("ResNet50", IMAGENET, 10, weights="imagenet")
