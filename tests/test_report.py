"""The report says what is in a model, and why nothing governs the rest."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_sparsity as ks

RNG = np.random.default_rng(0)
LTP = functools.partial(ks.LTP, l0=1e-6)
HALO = ks.HALO(xi=1e-3, psi=1e-3)
BITE = 3.0  # a threshold, in variances, that closes about half of the gates


def make_model():
    """Kernels of 54, 576 and 32 weights; one row per weight tensor makes ten."""
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(3, 3, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.Flatten(name="flat"),
            layers.Dense(12, activation="relu", name="hidden"),
            layers.Dense(4, name="logits"),
        ]
    )


def make_sparse():
    """LTP on the convolution, HALO on the hidden layer, nothing on the last."""
    model = ks.sparsify(make_model(), LTP, filters="conv")
    model.get_layer("conv").thresholds[0].assign(BITE)
    return ks.sparsify(model, HALO, filters="hidden")


def values(variable):
    return ops.convert_to_numpy(variable)


def rows(model):
    """The rows of its report by the last two parts of the path, outer name first."""
    return {"/".join(row.path.split("/")[-2:]): row for row in ks.report(model).rows}


def put(variable, index, value):
    array = values(variable).copy()
    array[index] = value
    variable.assign(array)


def test_every_weight_of_the_model_has_one_row():
    model = make_model()
    received = [(row.path, row.shape) for row in ks.report(model).rows]
    assert received == [(w.path, tuple(w.shape)) for w in model.weights]


def test_a_method_adds_no_rows():
    dense, sparse = ks.report(make_model()), ks.report(make_sparse())
    assert [row.shape for row in sparse.rows] == [row.shape for row in dense.rows]
    assert [row.layer for row in sparse.rows] == [row.layer for row in dense.rows]
    assert [row.layer_type for row in sparse.rows] == [v.layer_type for v in dense.rows]


def test_a_shared_layer_has_one_row():
    dense, x = layers.Dense(4), keras.Input((4,))
    tower = keras.Sequential([keras.Input((4,)), dense])
    report = ks.report(keras.Model(x, tower(tower(dense(x)))))
    assert report.parameters == 20 and len(report.rows) == 2


def test_rows_count_by_hand():
    model = make_model()
    kernel = model.get_layer("hidden").kernel
    kernel.assign(np.where(np.arange(48 * 12).reshape(48, 12) % 4 == 0, 0.0, 0.5))
    row = rows(model)["hidden/kernel"]
    assert (row.layer, row.layer_type, row.shape) == ("hidden", "Dense", (48, 12))
    assert (row.size, row.nonzeros, row.sparsity) == (576, 432, 0.25)
    assert (row.macs, row.effective_macs, row.bytes) == (576, 432, 4 * 576)
    assert row.method is row.threshold is None


def test_macs_follow_the_positions():
    model = make_model()
    put(model.get_layer("conv").kernel, (0, 0, 0, 0), 0.0)
    row = rows(model)["conv/kernel"]
    assert (row.macs, row.effective_macs) == (16 * 54, 16 * 53)


def test_totals_count_by_hand():
    model = make_model()
    put(model.get_layer("conv").kernel, np.s_[:, :, 0], 0.0)  # 27 of 54
    put(model.get_layer("logits").kernel, np.s_[:10], 0.0)  # 40 of 48
    report = ks.report(model)
    biases, zero_biases = 3 + 4 * 3 + 12 + 4, 3 + 2 * 3 + 12 + 4
    size = 54 + 576 + 48
    assert report.parameters == size + biases
    assert report.nonzeros == size - 67 + biases - zero_biases
    assert report.sparsity == pytest.approx(67 / size)
    assert report.total_sparsity == pytest.approx((67 + zero_biases) / (size + biases))
    assert report.macs == 16 * 54 + 576 + 48
    assert report.effective_macs == 16 * 27 + 576 + 8


def test_sparsity_is_that_of_the_governed_weights():
    model = make_sparse()
    found = rows(model)
    governed = [found["conv/kernel"], found["hidden/kernel"]]
    assert [row.method for row in governed] == ["LTP", "HALO"]
    nonzeros = sum(row.nonzeros for row in governed)
    assert ks.report(model).sparsity == pytest.approx(1 - nonzeros / (54 + 576))
    assert 0 < ks.report(model).sparsity < ks.report(ks.prune(model, 0.9)).sparsity


def test_sparsity_of_a_frozen_model():
    model = ks.prune(make_model(), 0.5)
    model.get_layer("hidden").trainable = False
    hidden = rows(model).pop("hidden/kernel")
    half = 0.5 * (54 + 576 + 48)
    assert ks.report(model).sparsity == pytest.approx(
        (half - 576 + hidden.nonzeros) / (54 + 48)
    )
    model.trainable = False
    assert ks.report(model).sparsity == 0.5


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_sparsity_of_quantized_weights():
    inputs = keras.Input((5, 4))
    # Its biases are of rank 2 too, and stay trainable.
    attended = layers.MultiHeadAttention(2, 3)(inputs, inputs)
    model = ks.prune(keras.Model(inputs, layers.Dense(8)(attended)), 0.8)
    model.quantize("int8")
    biases = [w for w in model.trainable_weights if len(w.shape) == 2]
    kernels = [w for w in model.weights if w.dtype == "int8"]
    assert (len(biases), len(kernels)) == (3, 5)
    counted = np.concatenate([values(w).ravel() for w in biases + kernels])
    assert ks.report(model).sparsity == pytest.approx((counted == 0).mean())
    assert (counted == 0).sum() >= int(0.8 * counted.size) == 116


@pytest.mark.parametrize("units", ["variance", "absolute"])
def test_a_weight_is_kept_where_its_square_is_above_the_threshold(units):
    model = ks.sparsify(make_model(), functools.partial(LTP, threshold_units=units))
    for name in ("conv", "hidden", "logits"):
        layer = model.get_layer(name)
        variance = np.var(np.abs(values(layer.layer.kernel)))
        layer.thresholds[0].assign(BITE if units == "variance" else BITE * variance)
        row = rows(model)[f"{name}/kernel"]
        squares = np.square(values(layer.layer.kernel))
        assert row.threshold == pytest.approx(BITE * variance, rel=1e-5)
        assert row.nonzeros == (squares > np.float32(row.threshold)).sum()
        assert 0.2 < row.sparsity < 0.8


def test_the_report_is_that_of_the_finalized_model():
    sparse = make_sparse()
    before, after = ks.report(sparse), ks.report(ks.finalize(sparse))
    for name in ("nonzeros", "parameters", "macs", "effective_macs", "total_sparsity"):
        assert getattr(before, name) == getattr(after, name), name
    assert [r.nonzeros for r in before.rows] == [r.nonzeros for r in after.rows]


def only_recurrent(variable):
    return "recurrent" in variable.name


def test_reasons():
    x = keras.Input((5,), dtype="int32")
    y = layers.Embedding(9, 4, name="frozen", trainable=False)(x)
    y = layers.LSTM(3, name="partly")(y)
    y = layers.Dense(3, name="unasked")(y)
    y = layers.Conv1D(2, 2, name="failing")(layers.Reshape((3, 1))(y))
    model = keras.Model(x, layers.Dense(3, name="governed")(y))
    method = functools.partial(LTP, variables=only_recurrent)
    model = ks.sparsify(model, method, filters="frozen|partly|failing")
    found = rows(ks.sparsify(model, HALO, filters="governed"))
    assert found["lstm_cell/recurrent_kernel"].method == "LTP"
    assert found["governed/kernel"].method == "HALO"
    assert found["governed/kernel"].reason is None
    reasons = {
        "frozen/embeddings": "frozen",
        "lstm_cell/kernel": "left out by the method",
        "lstm_cell/bias": "rank 1",
        "unasked/kernel": "no method was given",
        "failing/kernel": "could not handle",
    }
    for path, reason in reasons.items():
        assert found[path].method is None
        assert reason in found[path].reason
    assert "nothing to govern" in found["failing/kernel"].reason


def test_integer_weights_have_a_reason():
    model = make_model()
    model.quantize("int8", filters="^hidden$")
    row = rows(model)["hidden/kernel"]
    assert "int8" in row.reason and row.bytes == 576


def test_a_model_with_lora_can_be_looked_at():
    model = make_model()
    model.get_layer("hidden").enable_lora(2)
    assert rows(model)["hidden/lora_kernel_a"].shape == (48, 2)


@pytest.mark.parametrize("make", [make_model, make_sparse])
@pytest.mark.parametrize("path", ["conv/kernel", "hidden/kernel", "norm/moving_mean"])
def test_a_weight_that_is_nan_is_an_error_that_names_it(make, path):
    model = make()
    (weight,) = [w for w in model.weights if w.path.endswith(path)]
    put(weight, (0,) * len(weight.shape), np.nan)
    with pytest.raises(ValueError, match=f"{path}' must be free of NaN. Received"):
        ks.report(model)


def test_a_threshold_that_is_nan_is_an_error():
    model = make_sparse()
    model.get_layer("conv").thresholds[0].assign(np.nan)
    with pytest.raises(ValueError, match="conv.*NaN"):
        ks.report(model)


def test_an_unbuilt_model_is_an_error():
    with pytest.raises(ValueError, match="`model` of `report` must be built"):
        ks.report(keras.Sequential([layers.Dense(3)]))


def test_a_subclassed_model_is_an_error():
    class Subclassed(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(TypeError, match="`report`.*subclassed model Subclassed"):
        ks.report(Subclassed())


def test_what_is_no_model_is_an_error():
    with pytest.raises(TypeError, match="`report` must be a `keras.Model`"):
        ks.report(layers.Dense(3))


def test_text_shows_every_kernel_and_the_totals():
    report = ks.report(make_sparse())
    text = str(report)
    for row in report.rows:
        if row.method:
            (line,) = [v for v in text.splitlines() if v.startswith(row.path + " ")]
            assert row.method in line and f"{row.nonzeros:,}" in line
            assert f"{row.sparsity:.1%}" in line and f"{row.effective_macs:,}" in line
        elif len(row.shape) > 1:
            assert f"{row.path}: {row.reason}" in text
    for total in (
        report.parameters,
        report.nonzeros,
        report.macs,
        report.effective_macs,
    ):
        assert f"{total:,}" in text
    assert f"{report.sparsity:.2%}" in text and f"{report.compressed_bytes:,}" in text


def test_text_of_unknown_macs():
    model = keras.Sequential([keras.Input((None, 3)), layers.Conv1D(2, 2)])
    assert ks.report(model).macs is ks.report(model).effective_macs is None
    assert "MACs unknown of unknown" in str(ks.report(model))


def test_a_model_without_weights():
    report = ks.report(keras.Sequential([keras.Input((4, 4)), layers.Flatten()]))
    assert report.rows == [] and report.macs == report.parameters == 0
    assert report.sparsity == report.total_sparsity == 0.0
    assert str(report)


def test_dataframe_has_the_rows():
    pytest.importorskip("pandas", reason="pandas is an extra")
    report = ks.report(make_sparse())
    frame = report.to_dataframe()
    assert len(frame) == len(report.rows)
    for column in ("path", "layer", "layer_type", "shape", "nonzeros", "bytes"):
        assert list(frame[column]) == [getattr(row, column) for row in report.rows]


def saved_bytes(model, path):
    """Size of the file that `save_model` writes of the finalized model."""
    ks.save_model(ks.finalize(model), path)
    return path.stat().st_size


@pytest.mark.parametrize("sparsity", [0.0, 0.9, 0.95])
def test_compressed_bytes_are_those_of_the_file(sparsity, tmp_path):
    stack = [layers.Dense(units, activation="relu") for units in (300, 100, 10)]
    model = ks.prune(keras.Sequential([keras.Input((784,)), *stack]), sparsity)
    for method in (None, LTP, HALO):
        same = model if method is None else ks.sparsify(model, method)
        expected = saved_bytes(same, tmp_path / "model.keras")
        assert ks.report(same).compressed_bytes == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    "stack",
    [
        [layers.Dense(3)],
        [layers.Dense(8) for _ in range(10)],
        [layers.Reshape((4, 4, 1)), layers.Conv2D(8, 3), layers.BatchNormalization()],
    ],
    ids=["one", "ten", "conv"],
)
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_compressed_bytes_of_small_files(stack, sparsity, tmp_path):
    stack = [type(layer).from_config(layer.get_config()) for layer in stack]
    model = ks.prune(keras.Sequential([keras.Input((16,)), *stack]), sparsity)
    expected = saved_bytes(model, tmp_path / "model.keras")
    assert ks.report(model).compressed_bytes == pytest.approx(expected, rel=0.1)


def test_a_report_changes_nothing():
    model = make_sparse()
    before = [values(v).copy() for v in model.variables]
    str(ks.report(model))
    for value, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(values(variable), value)
