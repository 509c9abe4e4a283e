"""The smallest weights go, so many as asked for, and nothing else changes."""

import keras
import numpy as np
import pytest
from graphs import (
    HALO,
    LTP,
    assert_equal,
    close_gates,
    features,
    mlp,
    shared,
    total,
    values,
    zeros,
)
from keras import layers, ops

import keras_sparsity as ks


def pooled(model):
    """All weights of rank 2 or more of an `mlp`, in order."""
    return np.concatenate([w.ravel() for w in values(model.weights) if w.ndim >= 2])


@pytest.mark.parametrize("sparsity", [0, 0.01, 0.3, 0.5, 0.95, 0.999])
@pytest.mark.parametrize(
    "make", [mlp, lambda: ks.sparsify(mlp(), HALO)], ids=["plain", "HALO"]
)
def test_prune_zeroes_the_smallest_of_all(make, sparsity):
    model = make()
    before = pooled(ks.finalize(model))
    after = pooled(ks.prune(model, sparsity))
    count = int(np.floor(sparsity * before.size))
    expected = before.copy()
    expected[np.argsort(np.abs(before))[:count]] = 0
    np.testing.assert_array_equal(after, expected)
    assert (after == 0).sum() == count


def test_prune_breaks_ties_by_position():
    model = mlp()
    for layer in model.layers:
        layer.kernel.assign(np.where(features(*layer.kernel.shape) > 0, 0.5, -0.5))
    after = pooled(ks.prune(model, 0.5))
    half = after.size // 2
    assert (after[:half] == 0).all() and (after[half:] != 0).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_prune_counts_closed_gates_and_never_opens_them(sparsity):
    sparse = ks.sparsify(mlp(), LTP)
    close_gates(sparse)
    gated = pooled(ks.finalize(sparse))
    closed = int((gated == 0).sum())
    assert 0.3 * gated.size < closed < 0.9 * gated.size
    after = pooled(ks.prune(sparse, sparsity))
    assert (after[gated == 0] == 0).all()
    assert (after == 0).sum() == max(int(np.floor(sparsity * gated.size)), closed)


def test_prune_by_layer():
    small = ks.prune(mlp(), 0.3, scope="layer")
    counts = [int((w == 0).sum()) for w in values(small.weights) if w.ndim >= 2]
    assert counts == [int(0.3 * 24), int(0.3 * 30), int(0.3 * 15)]


def test_prune_of_filtered_layers_leaves_the_others():
    model = mlp()
    small = ks.prune(model, 0.5, filters=["first", "logits"])
    after, before = values(small.weights), values(model.weights)
    assert (after[0] == 0).sum() + (after[4] == 0).sum() == (24 + 15) // 2
    assert_equal(after[1:4], before[1:4])


def test_prune_of_filtered_layers_bakes_the_gates_of_the_others():
    sparse = ks.sparsify(mlp(), LTP)
    close_gates(sparse)
    small, plain = ks.prune(sparse, 0.999, filters="logits"), ks.finalize(sparse)
    assert_equal(values(small.weights)[:4], values(plain.weights)[:4])
    assert (values(small.weights)[4] == 0).sum() == 14


def test_prune_takes_governed_weights_alone_where_there_are_some():
    model = ks.sparsify(mlp(), HALO, filters="second")
    small = ks.prune(model, 0.5)
    assert [int((w == 0).sum()) for w in values(small.weights)[::2]] == [0, 15, 0]


def test_prune_leaves_frozen_layers():
    model = mlp()
    model.get_layer("second").trainable = False
    small = ks.prune(model, 0.999)
    assert [int((w == 0).sum()) for w in values(small.weights)[::2]] == [24, 0, 14]


@pytest.mark.parametrize(
    "make", [mlp, lambda: ks.sparsify(mlp(), LTP)], ids=["plain", "LTP"]
)
def test_prune_works_on_a_copy(make):
    model = make()
    before = values(model.weights)
    small = ks.prune(model, 0.9)
    assert_equal(values(model.weights), before)
    assert zeros(small) == int(0.9 * 69)
    assert "keras_sparsity" not in small.to_json() and not small.compiled


def test_shared_layers_are_pruned_once():
    model, _ = shared()
    small = ks.prune(model, 0.5)
    assert zeros(small) == (16 + 16) // 2
    assert len(small.weights) == len(model.weights)


@pytest.mark.parametrize(
    "sparsity", [1.0, 1.5, -0.1, np.nan, np.inf, "0.5", None, True]
)
def test_a_sparsity_out_of_range_is_an_error(sparsity):
    with pytest.raises(
        ValueError, match="Argument `sparsity` must be .* Received: sparsity="
    ):
        ks.prune(mlp(), sparsity)


def test_an_unknown_scope_is_an_error():
    with pytest.raises(
        ValueError, match='`scope` must be "global" or "layer".*\'all\''
    ):
        ks.prune(mlp(), 0.5, scope="all")


def test_nothing_to_prune_is_an_error():
    model = keras.Sequential(
        [keras.Input((4,)), layers.BatchNormalization(name="norm")]
    )
    with pytest.raises(ValueError, match="Nothing to prune.*'norm'"):
        ks.prune(model, 0.5)
    frozen = mlp()
    frozen.trainable = False
    with pytest.raises(ValueError, match="a trainable weight of rank 2"):
        ks.prune(frozen, 0.5)
    other = ks.sparsify(mlp(), HALO, filters="second")
    with pytest.raises(ValueError, match="a weight that a method governs.*'logits'"):
        ks.prune(other, 0.5, filters="logits")


# pruning_curve


def own_loss(target, predicted):
    """A function that is not registered anywhere."""
    return ops.mean(ops.square(target - predicted), axis=-1)


@pytest.mark.parametrize(
    "method, loss",
    [(None, "mse"), (LTP, own_loss), (HALO, "mse")],
    ids=["plain", "LTP", "HALO"],
)
def test_pruning_curve_is_prune_and_evaluate(method, loss):
    model = mlp() if method is None else ks.sparsify(mlp(), method)
    x, y = features(16, 4), features(16, 3)
    model.compile("sgd", loss, metrics=["mae"], run_eagerly=True)
    before = values(model.weights)
    sparsities = [0.9, 0.5]
    curve = ks.pruning_curve(model, x, y, sparsities)
    assert [point["sparsity"] for point in curve] == sparsities
    for point in curve:
        small = ks.prune(model, point["sparsity"])
        small.compile("sgd", loss, metrics=["mae"], run_eagerly=True)
        expected = small.evaluate(x, y, verbose=0, return_dict=True)
        assert {key: point[key] for key in expected} == pytest.approx(expected)
    assert_equal(values(model.weights), before)


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_pruning_curve_leaves_the_metrics_of_the_model_alone(run_eagerly):
    # Of a function that is not registered, it cannot be made anew.
    metric = keras.metrics.MeanMetricWrapper(own_loss, name="own")
    model, (x, y) = mlp(), (features(16, 4), features(16, 3))
    model.compile("sgd", "mse", metrics=[metric], run_eagerly=run_eagerly)
    model.evaluate(x, y, verbose=0)
    before = total([metric.result()])
    full, pruned = ks.pruning_curve(model, x, y, [0.0, 0.9])
    assert full["own"] == pytest.approx(before) != pytest.approx(pruned["own"])
    assert total([metric.result()]) == before
    assert model.evaluate(x, y, verbose=0, return_dict=True)["own"] == before


@pytest.mark.parametrize(("batch_size", "batches"), [(None, 2), (5, 8), (40, 1)])
def test_pruning_curve_evaluates_in_batches(batch_size, batches):
    class Calls(keras.metrics.Sum):
        def update_state(self, y, y_pred, sample_weight=None):
            super().update_state(1.0)

    model = mlp()
    model.compile("sgd", "mse", metrics=[Calls(name="calls")], run_eagerly=True)
    x, y = features(40, 4), features(40, 3)
    (point,) = ks.pruning_curve(model, x, y, [0.5], batch_size)
    assert point["calls"] == batches


@pytest.mark.parametrize("method", [None, ks.HALO(0.1, 0.1)])
def test_pruning_curve_recalibrates_every_pruned_model(method):
    model = keras.Sequential([*mlp().layers, keras.layers.BatchNormalization()])
    model.build((None, 4))
    model = ks.sparsify(model, method) if method else model
    x, y, calibration = features(16, 4), features(16, 3), features(40, 4) + 1
    model.compile("sgd", "mse", metrics=["mae"], run_eagerly=True)
    before = values(model.weights)
    sparsities = [0.9, 0.5]
    curve = ks.pruning_curve(model, x, y, sparsities, 8, calibration)
    for point, sparsity in zip(curve, sparsities, strict=True):
        small = ks.recalibrate(ks.prune(model, sparsity), calibration, 8)
        small.compile("sgd", "mse", metrics=["mae"], run_eagerly=True)
        expected = small.evaluate(x, y, 8, verbose=0, return_dict=True)
        assert point == pytest.approx({"sparsity": sparsity, **expected})
    plainly = ks.pruning_curve(model, x, y, sparsities, 8)
    assert [p["mae"] for p in plainly] != pytest.approx([p["mae"] for p in curve])
    assert_equal(values(model.weights), before)


def test_pruning_curve_of_a_model_that_is_not_compiled_is_an_error():
    with pytest.raises(ValueError, match="must be compiled"):
        ks.pruning_curve(mlp(), features(2, 4), features(2, 3), [0.5])


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.x[index::2], self.y[index::2]


def test_pruning_curve_takes_a_dataset_but_no_generator():
    model = mlp()
    model.compile("sgd", "mse", metrics=["mae"], run_eagerly=True)
    x, y = features(16, 4), features(16, 3)
    expected = ks.pruning_curve(model, x, y, [0.5, 0.9])
    received = ks.pruning_curve(model, Batches(x, y), sparsities=[0.5, 0.9])
    for point, reference in zip(received, expected, strict=True):
        assert point == pytest.approx(reference)
    batches = ((x, y) for _ in range(2))
    with pytest.raises(TypeError, match="`x` must be arrays or a dataset"):
        ks.pruning_curve(model, batches, sparsities=[0.5, 0.9])
    with pytest.raises(TypeError, match="`calibration_data` must be arrays or a"):
        ks.pruning_curve(model, x, y, [0.5, 0.9], calibration_data=batches)
    assert len(list(batches)) == 2


@pytest.mark.parametrize("sparsities", [[0.5, 1.0], [-0.1], [np.nan], ["0.5"]])
def test_pruning_curve_checks_its_sparsities(sparsities):
    model = mlp()
    model.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(ValueError, match="Argument `sparsities`"):
        ks.pruning_curve(model, features(2, 4), features(2, 3), sparsities)
