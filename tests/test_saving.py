"""Small files: the same model for Keras and LiteRT, and what must not be written."""

import functools
import os
import pathlib
import resource
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_sparsity as ks
from keras_sparsity.files import write_archive, written_whole

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 12)).astype("float32")
Y = RNG.normal(size=(8, 3)).astype("float32")
LTP = functools.partial(ks.LTP, l0=1e-6)

ON_TENSORFLOW = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="LiteRT needs TensorFlow"
)


@keras.saving.register_keras_serializable("test_saving")
class Labels(layers.Layer):
    """A layer with a file of its own in the model's archive."""

    text = "none"

    def call(self, x):
        return x

    def save_assets(self, folder):
        pathlib.Path(folder, "labels.txt").write_text(self.text)

    def load_assets(self, folder):
        self.text = pathlib.Path(folder, "labels.txt").read_text()


def make_model(*more, units=64):
    return keras.Sequential(
        [
            keras.Input((12,)),
            *more,
            layers.Dense(units, activation="relu", name="hidden"),
            layers.Dense(3),
        ]
    )


def arrays(variables):
    return [ops.convert_to_numpy(variable) for variable in variables]


def test_keras_loads_the_same_model_with_its_optimizer_and_assets(tmp_path):
    model = ks.prune(make_model(Labels(name="labels")), 0.9)
    model.get_layer("labels").text = "three"
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(X, Y, verbose=0)
    ks.save_model(model, tmp_path / "small.keras")
    loaded = keras.saving.load_model(tmp_path / "small.keras")
    assert loaded.get_layer("labels").text == "three"
    for ours, theirs in (
        (model.variables, loaded.variables),
        (model.optimizer.variables, loaded.optimizer.variables),
    ):
        for array, other in zip(arrays(ours), arrays(theirs), strict=True):
            np.testing.assert_array_equal(array, other)
    np.testing.assert_array_equal(
        model.predict(X, verbose=0), loaded.predict(X, verbose=0)
    )
    assert loaded.evaluate(X, Y, verbose=0) == model.evaluate(X, Y, verbose=0)


LOAD = """
import sys
sys.modules["keras_sparsity"] = None  # importing it fails
import keras, numpy
numpy.savez("weights.npz", *keras.saving.load_model("small.keras").get_weights())
"""


def test_the_file_loads_without_this_package(tmp_path):
    sparse = ks.sparsify(make_model(), LTP, filters="hidden")
    small = ks.finalize(ks.sparsify(sparse, ks.HALO(1e-3, 1e-3)))
    ks.save_model(small, tmp_path / "small.keras")
    subprocess.run([sys.executable, "-c", LOAD], cwd=tmp_path, check=True)
    loaded = np.load(tmp_path / "weights.npz")
    for array, name in zip(small.get_weights(), loaded.files, strict=True):
        np.testing.assert_array_equal(array, loaded[name])


def test_a_file_with_95_percent_zeros_is_a_thirteenth(tmp_path):
    # LeNet-300-100, with weights and biases like trained ones.
    sizes = [layers.Dense(units) for units in (300, 100, 10)]
    model = keras.Sequential([keras.Input((784,)), *sizes])
    model.set_weights([RNG.normal(size=w.shape) for w in model.get_weights()])
    model = ks.prune(model, 0.95)
    model.save(tmp_path / "plain.keras")
    ks.save_model(model, str(tmp_path / "small.keras"))
    plain, small = (tmp_path / name for name in ("plain.keras", "small.keras"))
    assert small.stat().st_size <= 0.08 * plain.stat().st_size


def with_optimizer(model):
    model.compile(ks.SparsityOptimizer("sgd"), "mse")
    return model


@pytest.mark.parametrize(
    ("sparse", "found"),
    [
        (lambda model: ks.sparsify(model, LTP), "LTP"),
        (lambda model: ks.sparsify(model, ks.HALO(1e-3, 1e-3)), "HALO"),
        (lambda model: ks.finalize(ks.prune(model, 0.5), True), "KeepZeros"),
        (with_optimizer, "SparsityOptimizer"),
    ],
)
def test_models_with_parts_of_this_package_are_refused(sparse, found, tmp_path):
    model = sparse(make_model())
    with pytest.raises(ValueError, match=f"one with {found} in it: call `finalize`"):
        ks.save_model(model, tmp_path / "small.keras")
    if found != "SparsityOptimizer":
        with pytest.raises(ValueError, match=f"one with {found} in it"):
            ks.export_litert(model, tmp_path / "small.tflite")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [ks.save_model, ks.export_litert])
def test_wrong_arguments(write, tmp_path):
    with pytest.raises(ValueError, match="`path` must end in"):
        write(make_model(), tmp_path / "small.h5")
    with pytest.raises(TypeError, match="`model` of .* must be a `keras.Model`"):
        write(layers.Dense(2), tmp_path / "small.keras")
    with pytest.raises(ValueError, match="must be built"):
        write(keras.Sequential([layers.Dense(2)]), tmp_path / "small.keras")


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "folder.keras").mkdir()
    (tmp_path / "file").touch()
    for name in ("folder.keras", "missing/small.keras", "file/small.keras"):
        with pytest.raises(OSError, match=f"{name}' could not be written"):
            ks.save_model(make_model(), tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.keras"]


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "small.keras"
    ks.save_model(make_model(), path)
    before, large = path.read_bytes(), make_model(units=4000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond what a disk still takes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(OSError, match="what was written before is intact"):
            ks.save_model(large, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_other_files_links_and_permissions_stay(tmp_path):
    (tmp_path / "unfinished-small.keras").write_text("a file of the user")
    path, link = tmp_path / "small.keras", tmp_path / "link.keras"
    path.touch(mode=0o600)
    link.symlink_to(path)
    ks.save_model(make_model(), link)
    assert (tmp_path / "unfinished-small.keras").read_text() == "a file of the user"
    assert link.is_symlink() and path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("ends", [KeyboardInterrupt, OSError, ValueError])
def test_whatever_ends_the_writing_leaves_nothing(ends, tmp_path):
    with pytest.raises(ends):
        with written_whole(tmp_path / "small.keras") as beside:
            beside.write_text("half")
            assert list(tmp_path.glob("unfinished*"))
            raise ends
    assert not list(tmp_path.iterdir())


def convolutional():
    x = keras.Input((12, 12, 3))
    y = layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False)(x)
    y = layers.ReLU()(layers.BatchNormalization()(y))
    y = layers.DepthwiseConv2D(3, padding="same")(y)
    y = layers.Add()([layers.Conv2D(16, 1, activation="relu")(y), y])
    y = layers.GlobalAveragePooling2D()(y)
    return keras.Model(x, layers.Dense(3, activation="softmax")(y))


@ON_TENSORFLOW
@pytest.mark.parametrize("make", [make_model, convolutional])
def test_litert_computes_what_keras_does(make, tmp_path):
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    model = ks.prune(make(), 0.8, scope="layer")
    before = model.get_weights()
    ks.export_litert(model, tmp_path / "small.tflite")
    for array, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(array, other)
    x = RNG.normal(size=(4, *model.input_shape[1:])).astype("float32")
    outputs, tensors = run_litert(interpreter, tmp_path / "small.tflite", x)
    np.testing.assert_allclose(outputs, model.predict(x, verbose=0), atol=1e-5)
    kernels = [weight for weight in model.weights if len(weight.shape) > 1]
    encoded = [tensor for tensor in tensors if tensor["sparsity_parameters"]]
    assert len(encoded) == len(kernels)


def test_no_member_is_compressed_further_than_keras_reads(tmp_path):
    members = {"large": bytes(2**28 + 1), "small": bytes(2**20)}
    write_archive(tmp_path / "model.keras", members)
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        large, small = (archive.getinfo(name) for name in members)
    assert large.compress_size == large.file_size
    assert small.compress_size < small.file_size / 100


def run_litert(interpreter, path, x):
    """What LiteRT computes of `x`, and the tensors in the file."""
    runner = interpreter.Interpreter(str(path))
    (source,), (result,) = runner.get_input_details(), runner.get_output_details()
    runner.resize_tensor_input(source["index"], x.shape)
    runner.allocate_tensors()
    runner.set_tensor(source["index"], x)
    runner.invoke()
    return runner.get_tensor(result["index"]), runner.get_tensor_details()


class Bessel(layers.Layer):
    def call(self, x):
        import tensorflow as tf

        return tf.math.bessel_i0(x)


@ON_TENSORFLOW
def test_what_litert_has_no_operation_for_is_an_error(tmp_path):
    model = keras.Sequential([keras.Input((12,)), layers.Dense(3), Bessel()])
    path = tmp_path / "model.tflite"
    path.write_text("of before")
    with pytest.raises(RuntimeError, match="(?s)LiteRT cannot convert .*BesselI0"):
        ks.export_litert(ks.prune(model, 0.8), path)
    assert os.listdir(tmp_path) == ["model.tflite"]
    assert path.read_text() == "of before"


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="what other backends do"
)
def test_other_backends_convert_the_file_in_another_process(tmp_path):
    pytest.importorskip("tensorflow")
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    model = ks.prune(make_model(), 0.8)
    with pytest.raises(RuntimeError, match="KERAS_BACKEND=tensorflow python") as error:
        ks.export_litert(model, tmp_path / "model.tflite")
    ks.save_model(model, tmp_path / "model.keras")
    package = pathlib.Path(ks.__file__).parents[1]
    subprocess.run(
        str(error.value).partition("the file: ")[2],
        shell=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(package)},
        check=True,
    )
    outputs, _ = run_litert(interpreter, tmp_path / "model.tflite", X)
    np.testing.assert_allclose(outputs, model.predict(X, verbose=0), atol=1e-5)
