"""The command line: what it prints and writes, and one line for what goes wrong."""

import functools
import json
import pathlib
import zipfile

import keras
import numpy as np
import pytest
from keras import layers

import keras_sparsity as ks
from keras_sparsity.__main__ import main

LTP = functools.partial(ks.LTP, l0=1e-6, initial_threshold=1.0)


def make_model():
    stack = [layers.Dense(64, activation="relu", name="hidden"), layers.Dense(3)]
    return keras.Sequential([keras.Input((12,)), *stack])


@pytest.fixture
def sparse(tmp_path):
    """The file of a model with 80 % zeros, as Keras writes it."""
    path = tmp_path / "sparse.keras"
    ks.prune(make_model(), 0.8).save(path)
    return path


def error_of(*arguments):
    """The line that the command ends with, which is one."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert isinstance(end.value.code, str)  # is printed, and the status is 1
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code
    return end.value.code


def test_report_is_that_of_the_model(sparse, capsys):
    main(["report", str(sparse)])
    assert capsys.readouterr().out == f"{ks.report(keras.models.load_model(sparse))}\n"


def test_report_as_json(sparse, capsys):
    main(["report", str(sparse), "--json"])
    found = json.loads(capsys.readouterr().out)
    expected = ks.report(keras.models.load_model(sparse))
    for name in ("sparsity", "nonzeros", "effective_macs", "compressed_bytes"):
        assert found[name] == getattr(expected, name)
    assert [row["nonzeros"] for row in found["rows"]] == [
        row.nonzeros for row in expected.rows
    ]


def test_convert_writes_the_same_model_small(sparse, tmp_path, capsys):
    output = tmp_path / "small.keras"
    main(["convert", str(sparse), str(output)])
    assert f"{output}: {output.stat().st_size:,} bytes" in capsys.readouterr().out
    assert output.stat().st_size < 0.5 * sparse.stat().st_size
    pair = [keras.models.load_model(path).get_weights() for path in (sparse, output)]
    for array, other in zip(*pair, strict=True):
        np.testing.assert_array_equal(array, other)


def test_convert_in_place(sparse, capsys):
    before = sparse.stat().st_size
    main(["convert", str(sparse), str(sparse)])
    after = sparse.stat().st_size
    assert after < before and f"{after / before:.3f} of" in capsys.readouterr().out


def test_convert_finalizes_and_says_so(tmp_path, capsys):
    model = ks.sparsify(make_model(), LTP)
    model.save(tmp_path / "ltp.keras")
    main(["convert", str(tmp_path / "ltp.keras"), str(tmp_path / "small.keras")])
    assert "finalized: LTP" in capsys.readouterr().out
    small = keras.models.load_model(tmp_path / "small.keras")
    assert [type(layer) for layer in small.layers] == [layers.Dense] * 2
    assert ks.report(small).sparsity == ks.report(model).sparsity > 0


def make_gru():
    """A model with zeros before any training: the biases, of shape `(2, 24)`."""
    return keras.Sequential([keras.Input((5, 4)), layers.GRU(8)])


@pytest.mark.parametrize(
    "make",
    [make_model, make_gru, lambda: ks.sparsify(make_model(), ks.HALO(1e-3, 1e-3))],
    ids=["dense", "GRU", "HALO"],
)
def test_convert_of_a_model_without_zeros(make, tmp_path):
    output = tmp_path / "small.keras"
    make().save(tmp_path / "dense.keras")
    assert "too few" in error_of("convert", tmp_path / "dense.keras", output)
    assert not output.exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def other_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no model")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (pathlib.Path.unlink, "there is no file"),
        (lambda path: path.write_text("no model"), "is no `.keras` archive"),
        (cut, "or it is cut"),
        (flip, "holds no Keras model that can be loaded"),
        (other_archive, "holds no Keras model that can be loaded"),
    ],
)
def test_files_that_are_no_models(spoil, reason, sparse, tmp_path):
    output = tmp_path / "small.keras"
    output.write_text("older")
    spoil(sparse)
    for arguments in (("report", sparse), ("convert", sparse, output)):
        line = error_of(*arguments)
        assert reason in line and str(sparse) in line
    assert output.read_text() == "older"


class Unknown(layers.Dense):
    """A layer that a file does not tell how to load."""


def test_a_class_that_is_not_known_is_named(tmp_path):
    keras.Sequential([keras.Input((4,)), Unknown(2)]).save(tmp_path / "model.keras")
    assert "class 'Unknown'" in error_of("report", tmp_path / "model.keras")


def test_an_output_that_cannot_be_written(sparse, tmp_path):
    line = error_of("convert", sparse, tmp_path / "missing" / "small.keras")
    assert "could not be written" in line


def test_wrong_usage_has_status_2(sparse, tmp_path, capsys):
    for arguments in ([], ["convert", str(sparse), str(tmp_path / "small.onnx")]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
    assert "must end in .keras or .tflite" in capsys.readouterr().err
