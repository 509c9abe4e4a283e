"""The trail tells what each epoch's model was, and gives it back."""

import itertools
import json
import os
import sys
import zipfile

import keras
import numpy as np
import pytest

from keras_sparsity.record import Trail, pareto_front
from keras_sparsity.regularizers import HALO
from keras_sparsity.trail import SparsityTrail
from keras_sparsity.wrappers import LTP

RNG = np.random.default_rng(0)
Y = np.arange(96) % 3
X = (np.eye(3)[Y] @ RNG.normal(size=(3, 6)) + RNG.normal(size=(96, 6))).astype("f4")
VALIDATION = (X[64:], Y[64:])
PATHS = ["hidden/hidden/kernel", "logits/logits/kernel"]


def make_model(units=16, method=lambda layer: LTP(layer, l0=0.01), optimizer="sgd"):
    """Hidden and output layer under `method`, compiled."""
    keras.utils.set_random_seed(1)
    layers = [
        method(keras.layers.Dense(units, activation="relu", name="hidden")),
        keras.layers.Dropout(0.1, name="dropout"),
        method(keras.layers.Dense(3, name="logits")),
    ]
    model = keras.Sequential([keras.Input((6,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def plain(layer):
    return layer


def fit(model, *callbacks, epochs=1, **kwargs):
    kwargs = {"validation_data": VALIDATION, "verbose": 0} | kwargs
    return model.fit(X[:64], Y[:64], epochs=epochs, callbacks=callbacks, **kwargs)


def files(directory):
    return sorted(path.name for path in directory.iterdir())


class Watch(keras.callbacks.Callback):
    """Keeps what the model predicts at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.predictions = []

    def on_epoch_end(self, epoch, logs=None):
        self.predictions.append(np.asarray(self.model.predict(X, verbose=0)))


class Run:
    """Four epochs with a trail that keeps everything."""

    def __init__(self, directory):
        self.directory = directory / "trail"
        self.csv = directory / "log.csv"
        self.watch = Watch()
        self.model = make_model()
        trail = SparsityTrail(self.directory, keep="all")
        csv = keras.callbacks.CSVLogger(self.csv)
        self.history = fit(self.model, trail, csv, self.watch, epochs=4).history
        self.trail = Trail(self.directory)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("run"))


def write_trail(directory, pairs, mode="max", kept=(), paths=("kernel",)):
    """A trail written by hand; `pairs` of sparsity and metric, epochs from 1."""
    monitor = {"max": "val_accuracy", "min": "val_loss"}[mode]
    lines = [{"format": 1, "monitor": monitor, "mode": mode, "weights": []}]
    for epoch, (sparsity, metric) in enumerate(pairs, 1):
        row = {"sparsity": sparsity, "near_zero": sparsity, "threshold": None}
        lines.append(
            {
                "epoch": epoch,
                "seconds": 2.0 * epoch,
                "sparsity": sparsity,
                "near_zero": sparsity,
                "weights": {path: row for path in paths},
                "metrics": {monitor: metric, "loss": 0.5},
            }
        )
    directory.mkdir(exist_ok=True)
    (directory / "trail.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    for epoch in kept:
        (directory / f"epoch-{epoch:04d}.keras").touch()
    return Trail(directory)


# What is recorded


def test_sparsity_is_that_of_the_finalized_model(run):
    for point in run.trail.points:
        loaded = point.load()
        kernels = [loaded.get_layer(name).kernel for name in ("hidden", "logits")]
        zeros = [np.asarray(keras.ops.convert_to_numpy(k)) == 0 for k in kernels]
        assert [point.weights[p]["sparsity"] for p in PATHS] == [
            np.mean(z) for z in zeros
        ]
        assert point.sparsity == sum(z.sum() for z in zeros) / (16 * 6 + 16 * 3)
    assert run.trail.points[-1].sparsity > run.trail.points[0].sparsity > 0


def test_thresholds_are_those_that_weights_are_compared_with(run):
    kernel = keras.ops.convert_to_numpy(run.model.get_layer("hidden").layer.kernel)
    last = run.trail.points[-1].weights[PATHS[0]]
    assert np.mean(np.square(kernel) <= last["threshold"]) == last["sparsity"]


def test_metrics_are_those_of_the_history(run):
    for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
        recorded = [point.metrics[name] for point in run.trail.points]
        assert recorded == run.history[name]
    assert [point.metric for point in run.trail.points] == run.history["val_accuracy"]


def test_sparsity_reaches_history_and_csv(run):
    recorded = [point.sparsity for point in run.trail.points]
    header, *lines = run.csv.read_text().splitlines()
    column = header.split(",").index("sparsity")
    assert run.history["sparsity"] == recorded
    assert [float(line.split(",")[column]) for line in lines] == recorded


def test_point_loads_the_model_of_its_epoch(run):
    for point, predicted in zip(run.trail.points, run.watch.predictions, strict=True):
        loaded = point.load().predict(X, verbose=0)
        np.testing.assert_allclose(loaded, predicted, rtol=1e-6, atol=1e-6)


def test_point_loads_code_when_asked_to(tmp_path):
    model = make_model(method=plain)
    doubled = keras.Sequential([model, keras.layers.Lambda(lambda x: 2 * x)])
    doubled.compile("sgd", loss=model.loss, metrics=["accuracy"])
    fit(doubled, SparsityTrail(tmp_path))
    (point,) = Trail(tmp_path).points
    with pytest.raises(ValueError, match="safe_mode"):
        point.load()
    loaded = point.load(safe_mode=False).predict(X, verbose=0)
    np.testing.assert_allclose(loaded, doubled.predict(X, verbose=0), rtol=1e-6)


def test_checkpoint_needs_nothing_of_the_package(run):
    with zipfile.ZipFile(run.trail.points[-1].path) as file:
        assert "keras_sparsity" not in file.read("config.json").decode()


def test_near_zero_where_there_are_no_zeros(tmp_path):
    def halo(layer):
        layer.kernel_regularizer = HALO(xi=0.0, psi=0.0)
        return layer

    model = make_model(method=halo, optimizer=keras.optimizers.SGD(0.0))
    kernel = np.full((6, 16), 0.5, "float32")
    kernel[:3] = 0.5 * 2.0**-10
    model.get_layer("hidden").kernel.assign(kernel)
    fit(model, SparsityTrail(tmp_path))
    (point,) = Trail(tmp_path).points
    assert point.sparsity == 0
    assert point.weights["hidden/kernel"]["near_zero"] == 0.5
    assert json.loads((tmp_path / "trail.jsonl").read_text().splitlines()[0])[
        "near_zero"
    ] == ("abs(w) <= 0.0009765625 * max(abs(w)) of its tensor")


def test_model_without_a_method_counts_its_kernels(tmp_path):
    model = make_model(method=plain, optimizer=keras.optimizers.SGD(0.0))
    kernel = RNG.normal(size=(6, 16))
    kernel[:2] = 0
    model.get_layer("hidden").kernel.assign(kernel)
    fit(model, SparsityTrail(tmp_path))
    assert Trail(tmp_path).points[0].sparsity == 2 * 16 / (6 * 16 + 16 * 3)


def test_weights_of_one_name_are_counted_apart(tmp_path):
    class Twins(keras.layers.Layer):
        def build(self, input_shape):
            self.dense = keras.layers.Dense(3, name="dense", kernel_initializer="zeros")
            self.other = keras.layers.Dense(5, name="dense", kernel_initializer="ones")
            self.dense.build(input_shape)
            self.other.build((None, 3))

        def call(self, x):
            return self.other(self.dense(x))

    model = keras.Sequential([keras.Input((6,)), Twins()])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    trail = SparsityTrail(tmp_path, "loss", keep="none")
    model.fit(X, X[:, :5], verbose=0, callbacks=[trail])
    (point,) = Trail(tmp_path).points
    assert [row["sparsity"] for row in point.weights.values()] == [1.0, 0.0]
    assert point.sparsity == 6 * 3 / (6 * 3 + 3 * 5)


def test_model_that_its_first_batch_builds(tmp_path):
    model = keras.Sequential([LTP(keras.layers.Dense(3), l0=0.01)])
    model.compile("sgd", "mse", metrics=["mae"])
    trail = SparsityTrail(tmp_path, "mae")
    model.fit(X, X[:, :3], verbose=0, callbacks=[trail])
    expected = model.predict(X, verbose=0)
    loaded = Trail(tmp_path).select().load().predict(X, verbose=0)
    np.testing.assert_allclose(loaded, expected, rtol=1e-6, atol=1e-6)


def test_metric_that_is_not_finite_is_recorded_and_never_chosen(tmp_path):
    model = make_model(optimizer=keras.optimizers.SGD(float("nan")))
    fit(model, SparsityTrail(tmp_path, monitor="val_loss", keep="pareto"))
    trail = Trail(tmp_path)
    assert np.isnan(trail.points[0].metric)
    assert "NaN" not in (tmp_path / "trail.jsonl").read_text()
    assert files(tmp_path) == ["trail.jsonl"]
    with pytest.raises(ValueError, match="There are 0 points"):
        trail.select()


def test_a_weight_that_is_nan_is_no_zero(tmp_path):
    model = make_model(optimizer=keras.optimizers.SGD(float("nan")))
    fit(model, SparsityTrail(tmp_path, keep="none"))
    (point,) = Trail(tmp_path).points
    assert np.isfinite(point.metric)  # hard gates close, and nothing else is heard
    assert (point.sparsity, point.near_zero) == (0, 0)


def test_checkpoints_of_averaged_weights_are_those_evaluated(tmp_path):
    optimizer = keras.optimizers.SGD(0.5, use_ema=True)
    model = make_model(method=plain, optimizer=optimizer)
    averages = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    fit(model, averages, SparsityTrail(tmp_path, keep="all"), epochs=2)
    for point in Trail(tmp_path).points:
        loaded = point.load()
        loaded.compile(loss=model.loss)
        loss = loaded.evaluate(*VALIDATION, verbose=0)
        assert point.metrics["val_loss"] == pytest.approx(loss, rel=1e-5)


def test_training_is_the_same_without_a_trail(tmp_path):
    with_trail, without = make_model(), make_model()
    fit(with_trail, SparsityTrail(tmp_path), epochs=2)
    keras.utils.set_random_seed(1)
    fit(without, epochs=2)
    for a, b in zip(with_trail.get_weights(), without.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# Which checkpoints are kept


@pytest.mark.parametrize("mode", ["max", "min"])
def test_pareto_front_against_brute_force(tmp_path, mode):
    # Few distinct values, so that ties of one and of both are frequent.
    pairs = RNG.integers(0, 8, size=(60, 2)) / 8
    points = write_trail(tmp_path, pairs.tolist(), mode).points
    sign = 1 if mode == "max" else -1

    def beats(a, b):
        a, b = (a.sparsity, sign * a.metric), (b.sparsity, sign * b.metric)
        return a != b and a[0] >= b[0] and a[1] >= b[1]

    def repeats(a, b):
        return (a.sparsity, a.metric) == (b.sparsity, b.metric) and a.epoch < b.epoch

    expected = [
        p for p in points if not any(beats(q, p) or repeats(q, p) for q in points)
    ]
    assert pareto_front(points, mode) == expected


def test_pareto_keeps_the_checkpoints_of_the_front(tmp_path):
    model = make_model()
    fit(model, SparsityTrail(tmp_path, monitor="val_loss"), epochs=6)
    trail = Trail(tmp_path)
    front = [point.path.name for point in pareto_front(trail.points, "min")]
    assert 0 < len(front) < 6
    assert files(tmp_path) == [*front, "trail.jsonl"]


def test_all_keeps_every_checkpoint(run):
    expected = [f"epoch-000{epoch}.keras" for epoch in (1, 2, 3, 4)]
    assert files(run.directory) == [*expected, "trail.jsonl"]


def test_none_keeps_the_record_alone(tmp_path):
    fit(make_model(), SparsityTrail(tmp_path, keep="none"))
    assert files(tmp_path) == ["trail.jsonl"]
    with pytest.raises(FileNotFoundError, match="epoch 1 was not kept"):
        Trail(tmp_path).select().load()


# The record goes on


def test_second_run_continues_the_record(tmp_path):
    model = make_model()
    fit(model, SparsityTrail(tmp_path), epochs=2)
    before = (tmp_path / "trail.jsonl").read_text()
    fit(model, SparsityTrail(tmp_path), epochs=2)
    assert (tmp_path / "trail.jsonl").read_text().startswith(before)
    points = Trail(tmp_path).points
    assert [point.epoch for point in points] == [1, 2, 3, 4]
    assert all(a.seconds < b.seconds for a, b in itertools.pairwise(points))


@pytest.mark.parametrize("writes", [1, 2, 3, 4, 5])
def test_kill_loses_the_epoch_under_way(tmp_path, monkeypatch, writes):
    class Killed(BaseException):
        pass

    left = itertools.count(writes, -1)
    replace = os.replace

    def replace_until_killed(*args):
        if next(left) == 1:
            raise Killed
        replace(*args)

    model = make_model()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", replace_until_killed)
        fit(model, SparsityTrail(tmp_path, keep="all"), epochs=3)
    # An epoch takes two writes, the checkpoint and then the record.
    complete = (writes - 1) // 2
    if complete:
        assert [p.epoch for p in Trail(tmp_path).points if p.load()] == [
            *range(1, complete + 1)
        ]
    fit(model, SparsityTrail(tmp_path, keep="all"))
    assert len(Trail(tmp_path).points) == complete + 1


def test_cut_last_line_is_left_out_and_replaced(tmp_path):
    model = make_model()
    fit(model, SparsityTrail(tmp_path), epochs=2)
    record = tmp_path / "trail.jsonl"
    record.write_text(record.read_text()[:-20])
    with pytest.warns(UserWarning, match="last line .* is cut"):
        assert [point.epoch for point in Trail(tmp_path).points] == [1]
    with pytest.warns(UserWarning, match="last line .* is cut"):
        fit(model, SparsityTrail(tmp_path))
    assert [point.epoch for point in Trail(tmp_path).points] == [1, 2]


# Bad input


@pytest.mark.parametrize("argument", [{"mode": "up"}, {"keep": 3}, {"resume": 1}])
def test_argument_is_refused_by_name(tmp_path, argument):
    with pytest.raises(ValueError, match=f"`{next(iter(argument))}`"):
        SparsityTrail(tmp_path, **argument)


def test_mode_auto_is_that_of_keras_metrics():
    m = keras.metrics
    metrics = [
        m.AUC(),
        m.BinaryAccuracy(),
        m.TopKCategoricalAccuracy(),
        m.BinaryIoU(),
        m.MeanIoU(2),
        m.OneHotIoU(2, [0]),
        m.ConcordanceCorrelation(),
        m.PearsonCorrelation(),
        m.CosineSimilarity(),
        m.F1Score(),
        m.FBetaScore(),
        m.R2Score(),
        m.Precision(),
        m.RecallAtPrecision(0.5),
        m.SensitivityAtSpecificity(0.5),
        m.SpecificityAtSensitivity(0.5),
        m.CategoricalCrossentropy(),
        m.Hinge(),
        m.KLDivergence(),
        m.LogCoshError(),
        m.MeanAbsoluteError(),
        m.MeanAbsolutePercentageError(),
        m.MeanSquaredLogarithmicError(),
        m.Poisson(),
        m.RootMeanSquaredError(),
    ]
    for metric in metrics:
        expected = {"up": "max", "down": "min"}[metric._direction]
        assert SparsityTrail("", f"val_{metric.name}").mode == expected
    for name, expected in [("val_loss", "min"), ("mse", "min"), ("acc", "max")]:
        assert SparsityTrail("", name).mode == expected


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [
        ("val_error_type_accuracy", "max"),
        ("val_heatmap_accuracy", "max"),
        ("val_accuracy_head_loss", "min"),
        ("val_score_rmse", "min"),
        ("val_error_type_auc_1", "max"),
    ],
)
def test_mode_auto_looks_at_the_metric_and_not_at_the_output(monitor, mode):
    assert SparsityTrail("", monitor).mode == mode


@pytest.mark.parametrize("monitor", ["val_quality", "val_map", "val_error_type_dice"])
def test_mode_auto_refuses_to_guess(monitor):
    with pytest.raises(ValueError, match=f"`mode`.*{monitor}"):
        SparsityTrail("", monitor)


def test_monitor_that_is_missing_lists_those_there(tmp_path):
    with pytest.raises(ValueError, match="`monitor`.*: accuracy, loss .*val_auc"):
        fit(make_model(), SparsityTrail(tmp_path, "val_auc"), validation_data=None)
    assert files(tmp_path) == []


def test_trail_of_another_model_is_refused_before_training(tmp_path):
    fit(make_model(), SparsityTrail(tmp_path))
    record = (tmp_path / "trail.jsonl").read_bytes()
    other = make_model(units=8)
    before = other.get_weights()
    with pytest.raises(ValueError, match=r"`directory`.*\(6, 16\).*\(6, 8\)"):
        fit(other, SparsityTrail(tmp_path))
    np.testing.assert_array_equal(other.get_weights()[0], before[0])
    assert (tmp_path / "trail.jsonl").read_bytes() == record


def test_trail_of_another_metric_is_refused(tmp_path):
    fit(make_model(), SparsityTrail(tmp_path))
    with pytest.raises(ValueError, match="with val_accuracy where .* val_loss"):
        fit(make_model(), SparsityTrail(tmp_path, monitor="val_loss"))


def test_directory_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").touch()
    model, watch = make_model(), Watch()
    before = model.get_weights()
    with pytest.raises(OSError, match="`directory`.*file/trail"):
        fit(model, watch, SparsityTrail(tmp_path / "file" / "trail"))
    assert watch.predictions == []
    np.testing.assert_array_equal(model.get_weights()[0], before[0])


def test_model_that_cannot_be_finalized_is_refused_before_training(tmp_path):
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = LTP(keras.layers.Dense(3), l0=0.01)

        def call(self, x):
            return self.dense(x)

    model, watch = Subclassed(), Watch()
    model(X)
    model.compile("sgd", "mse")
    with pytest.raises(TypeError, match="subclassed"):
        model.fit(X, X[:, :3], verbose=0, callbacks=[watch, SparsityTrail(tmp_path)])
    assert watch.predictions == []


def test_trail_needs_a_trail(tmp_path):
    with pytest.raises(FileNotFoundError, match="`directory`"):
        Trail(tmp_path)


@pytest.mark.parametrize("text", ["", "{}\n", "notes\n", '{"format": 2}\n'])
def test_other_file_is_no_trail(tmp_path, text):
    (tmp_path / "trail.jsonl").write_text(text)
    with pytest.raises(ValueError, match="trail.jsonl"):
        Trail(tmp_path)


def test_damage_before_the_last_line_is_an_error(tmp_path):
    write_trail(tmp_path, [(0.1, 0.9), (0.2, 0.9)])
    record = tmp_path / "trail.jsonl"
    record.write_text(record.read_text().replace('"epoch": 1', '"epoch"'))
    with pytest.raises(ValueError, match="Line 2"):
        Trail(tmp_path)


# Selecting, and looking

PAIRS = [(0.0, 0.98), (0.5, 0.99), (0.7, 0.99), (0.9, 0.98), (0.95, 0.90)]


@pytest.mark.parametrize(
    ("conditions", "epoch"),
    [
        ({}, 3),
        ({"max_sparsity": 0.6}, 2),
        ({"min_sparsity": 0.8}, 4),
        ({"min_sparsity": 0.95}, 5),
        ({"min_sparsity": 0.1, "max_sparsity": 0.5}, 2),
        ({"max_drop": 0.0}, 3),
        ({"max_drop": 0.01}, 4),
        ({"max_drop": 0.5}, 5),
        ({"min_metric": 0.98}, 4),
        ({"min_metric": 0.985, "max_drop": 0.5}, 3),
        ({"min_metric": 0.5, "max_drop": 0.005}, 3),
        ({"min_metric": 0.9, "max_sparsity": 0.8}, 3),
        ({"max_drop": 0.01, "min_sparsity": 0.0, "max_sparsity": 0.4}, 1),
    ],
)
@pytest.mark.parametrize("mode", ["max", "min"])
def test_select(tmp_path, conditions, epoch, mode):
    if mode == "min":
        pairs = [(sparsity, 1 - metric) for sparsity, metric in PAIRS]
        if "min_metric" in conditions:
            conditions = conditions | {"min_metric": 1 - conditions["min_metric"]}
    else:
        pairs = PAIRS
    trail = write_trail(tmp_path, pairs, mode)
    assert trail.select(**conditions).epoch == epoch


def test_select_bounds_hold_in_float32(tmp_path):
    pairs = [(s, float(np.float32(m))) for s, m in [(0.5, 0.89), (0.9, 0.88)]]
    assert write_trail(tmp_path, pairs).select(min_metric=0.88).epoch == 2
    assert write_trail(tmp_path, pairs).select(max_drop=0.01).epoch == 2


def test_select_takes_what_can_be_loaded(tmp_path):
    trail = write_trail(tmp_path, PAIRS, kept=[1, 3, 5])
    assert trail.select(max_sparsity=0.6).epoch == 1
    assert trail.select(max_drop=0.01).epoch == 3


def test_select_with_nothing_to_select_says_what_there_is(tmp_path):
    trail = write_trail(tmp_path, PAIRS)
    with pytest.raises(ValueError, match="0.0000 to 0.9500.*0.9000 to 0.9900"):
        trail.select(min_sparsity=0.99)


def test_to_dataframe_has_a_row_per_epoch(run):
    frame = run.trail.to_dataframe()
    assert frame["epoch"].tolist() == [1, 2, 3, 4]
    assert frame["val_accuracy"].tolist() == run.history["val_accuracy"]
    for path in PATHS:
        expected = [point.weights[path]["sparsity"] for point in run.trail.points]
        assert frame[f"weights/{path}/sparsity"].tolist() == expected


@pytest.mark.parametrize("layers", [3, 60])
def test_plot_gives_every_weight_a_line_of_its_own(tmp_path, layers):
    from matplotlib.image import imread

    paths = [f"block_{i}/conv/kernel" for i in range(layers)]
    trail = write_trail(tmp_path, PAIRS, paths=paths)
    trail.plot(tmp_path / "trail.png")
    height, width, _ = imread(tmp_path / "trail.png").shape
    assert width == 1080
    assert height > 600 + 20 * layers
    assert len(np.unique(imread(tmp_path / "trail.png"))) > 100


@pytest.mark.parametrize("package", ["pandas", "matplotlib"])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, package):
    trail = write_trail(tmp_path, PAIRS)
    for name in [n for n in sys.modules if n.split(".")[0] == package] or [package]:
        monkeypatch.setitem(sys.modules, name, None)
    look = {"pandas": trail.to_dataframe, "matplotlib": lambda: trail.plot("x.png")}
    with pytest.raises(ImportError, match=rf"{package}.*keras-sparsity\[examples\]"):
        look[package]()
