"""The comparison of methods: what it trains, records, chooses and draws."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from processes import wait_until

import keras_sparsity as ks

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import curves  # noqa: E402
import data as data_sets  # noqa: E402
import methods  # noqa: E402

ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{EXAMPLES}:{EXAMPLES.parent}"}
RNG = np.random.default_rng(0)


def images(count):
    labels = RNG.integers(0, 3, count)
    x = RNG.normal(labels[:, None], 1, size=(count, 12)).astype("float32")
    return x.reshape(count, 2, 6, 1), labels


DATA = data_sets.Data(images(160), images(40), images(40), 3, (2, 6, 1), 160)
TRAINING = methods.Training(
    epochs=4,
    batch_size=16,
    learning_rate=0.05,
    momentum=0.9,
    weight_decay=1e-3,
    finetune=0.25,
    recalibrate=True,
)
STEERED = "halo_steered", "ltp"


def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((2, 6, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(20),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dense(3),
        ]
    )


@pytest.mark.parametrize("name", sorted({*methods.METHODS} - {"dense", *STEERED}))
def test_every_method_comes_to_the_sparsity(name):
    method = methods.METHODS[name]
    points = methods.curve(
        network, DATA, method, method.settings[0], [0.5, 0.8], TRAINING
    )
    assert [point["target"] for point in points] == [0.5, 0.8]
    for point in points:
        # Each of two kernels, of 240 and 60 weights, may round down.
        assert point["target"] - 2 / 300 <= point["sparsity"] <= point["target"]
        assert len(point["layers"]) == 2
        # A third is chance. After 30 steps the moving statistics are far off.
        assert 0.6 < point["recalibrated"]["test"] <= 1


class Planned(methods.Training):
    """Trains nothing, and remembers which epochs it was to train, and how."""

    def fit(self, model, data, epochs, multiplier=1.0, callbacks=(), falls_from=0.0):
        model.phases = [*getattr(model, "phases", []), (epochs, multiplier, falls_from)]


def test_every_method_has_the_same_epochs(monkeypatch):
    """From the first dense one to the last of fine-tuning, whatever is shared."""
    histories = []

    def passing_on(transform):
        def passed(model, *arguments):
            new = transform(model, *arguments)
            new.phases = list(getattr(model, "phases", []))
            return new

        return passed

    for name in ("sparsify", "finalize"):
        monkeypatch.setattr(ks, name, passing_on(getattr(ks, name)))
    monkeypatch.setattr(
        methods, "accuracies", lambda model, data: histories.append(model.phases) or {}
    )
    for name, finetune in itertools.product(methods.METHODS, (0.0, 0.2)):
        training = Planned(20, 16, 0.05, 0.9, 0.0, finetune, recalibrate=False)
        method = methods.METHODS[name]
        method = dataclasses.replace(method, cut=passing_on(method.cut))
        settings = {**method.settings[0], "multiplier": 7.0}
        histories.clear()
        points = methods.curve(network, DATA, method, settings, [0.5, 0.8], training)
        assert len(histories) == len(points) == (1 if name == "dense" else 2)
        for history in histories:
            assert sum(epochs for epochs, _, _ in history) == 20
            assert history[-1][2] < 1  # the last phase ends with a rate of zero
            with_method = history[-2 if finetune else -1]
            assert with_method[1] == 7.0


def test_dense_has_one_point():
    dense = methods.METHODS["dense"]
    (point,) = methods.curve(network, DATA, dense, {}, [0.5, 0.8], TRAINING)
    assert point["target"] == point["sparsity"] == 0


def test_ltp_is_steered():
    method = methods.METHODS["ltp"]
    (point,) = methods.curve(network, DATA, method, {"l0": 1e-4}, [0.3], TRAINING)
    assert abs(point["sparsity"] - 0.3) < 0.02
    assert point["reached"] == pytest.approx(point["sparsity"])
    assert 0 <= point["shifted_from"] <= 1


def test_halo_is_steered_and_then_pruned():
    method = methods.METHODS["halo_steered"]
    with pytest.warns(UserWarning, match="SparsityTarget"):  # 30 steps are too few
        points = methods.curve(
            network, DATA, method, method.settings[0], [0.5, 0.8], TRAINING
        )
    assert [point["sparsity"] for point in points] == [0.5, 0.8]
    assert all(0 <= point["reached"] < point["target"] for point in points)


def test_batch_statistics_are_gathered_anew_beside():
    pruned, copies = [], []

    def cut(model, target):
        pruned.append(ks.prune(model, target))
        copies.append(ks.finalize(pruned[-1]))
        copies[-1].compile(loss=methods.LOSS, metrics=["accuracy"])
        return pruned[-1]

    method = dataclasses.replace(methods.METHODS["magnitude"], cut=cut)
    training = dataclasses.replace(TRAINING, finetune=0.0)
    (point,) = methods.curve(network, DATA, method, {}, [0.8], training)
    assert point["test"] == methods.accuracies(copies[0], DATA)["test"]
    ks.recalibrate(copies[0], DATA.train[0], TRAINING.batch_size)
    assert point["recalibrated"] == methods.accuracies(copies[0], DATA)
    for a, b in zip(pruned[0].get_weights(), copies[0].get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)

    training = dataclasses.replace(training, recalibrate=False)
    (other,) = methods.curve(network, DATA, method, {}, [0.8], training)
    assert "recalibrated" not in other
    assert all(
        other[name] == point[name] for name in ("sparsity", "validation", "test")
    )


def test_settings_may_tell_how_a_method_trains():
    ltp = methods.METHODS["ltp"]
    settings = {"l0": 1e-3, "pretrain": 0.25, "multiplier": 3, "falls_from": 0.6}
    method, arguments = methods.configured(ltp, settings)
    assert arguments == {"l0": 1e-3}
    assert method.multiplier == 3 != ltp.multiplier
    assert method.falls_from == 0.6 != ltp.falls_from
    assert methods.phases(method, 20, 0.2) == (5, 11, 4)
    assert methods.phases(ltp, 20, 0.2) == (10, 6, 4)


@pytest.mark.parametrize("falls_from", [0.0, 0.5, 1.0])
def test_the_learning_rate_falls_from_there_on(falls_from):
    model, rates = network(), []
    training = dataclasses.replace(TRAINING, epochs=4)
    steps = training.steps(DATA, 4)

    class Rates(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            rates.append(float(self.model.optimizer.learning_rate))

    training.fit(model, DATA, 4, callbacks=[Rates()], falls_from=falls_from)
    start = falls_from * steps
    parts = np.clip((np.arange(steps) - start) / max(steps - start, 1), 0, 1)
    expected = training.learning_rate * (1 + np.cos(np.pi * parts)) / 2
    # 1 + cos is computed in float32: near its end it is small, and its error is not.
    rounding = np.finfo("float32").eps * training.learning_rate
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=rounding)


def test_one_cut_for_all_weights():
    model = ks.sparsify(network(), ks.KeepZeros)
    callback = methods.GlobalMagnitude(ks.ConstantSparsity(0.7))
    callback.set_model(model)
    callback.prune(0.7)
    masks = [mask for layer in model.layers for mask in getattr(layer, "masks", ())]
    kept = np.concatenate([keras.ops.convert_to_numpy(m).ravel() for m in masks])
    assert kept.sum() == 300 - 210
    expected = ks.prune(network(), 0.7)
    small = ks.finalize(model)
    for a, b in zip(small.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_cut_reaches_into_models_within_the_model():
    inner = network()
    inputs = keras.Input((2, 6, 1))
    model = keras.Model(inputs, keras.layers.Dense(2)(inner(inputs)))
    model = ks.sparsify(model, ks.KeepZeros)
    callback = methods.GlobalMagnitude(ks.ConstantSparsity(0.5))
    callback.set_model(model)
    callback.prune(0.5)
    assert ks.report(ks.finalize(model)).sparsity == 0.5


def line(method="halo", seed=0, settings=None, **points):
    curve = [
        {"target": 0.9, "sparsity": 0.9, "layers": {"a/kernel": 0.9}, **point}
        for point in points.values()
    ]
    return {
        "format": curves.FORMAT,
        "method": method,
        "settings": settings or {},
        "finetune": 0.0,
        "seed": seed,
        "curve": curve,
    }


def test_settings_are_chosen_on_validation_images():
    lines = [
        line(settings={"xi": xi}, seed=seed, p={"validation": v, "test": t})
        for xi, seed, v, t in [
            *((1, 0, 0.9, 0.5), (1, 1, 0.7, 0.6)),
            *((2, 0, 0.85, 0.4), (2, 1, 0.85, 0.4)),
            (3, 0, 0.95, 0.7),
        ]
    ]
    # 0.8 on average is less than 0.85, whatever the test images say, and one seed is
    # less than two.
    points = curves.chosen(lines)["halo", 0.0][0.9]
    assert [point["settings"] for point in points] == [{"xi": 2}] * 2


def test_a_repetition_counts_once_and_comparisons_stay_apart():
    one = line(p={"validation": 0.8, "test": 0.8})
    again = {**line(p={"validation": 0.8, "test": 0.7}), "recalibrate": True}
    ((points,),) = (curve.values() for curve in curves.chosen([one, again]).values())
    assert [point["test"] for point in points] == [0.7]
    other = {**one, "model": "lenet5", "epochs": 10}
    groups = curves.comparisons([one, other, again])
    assert groups == {"": [one, again], "epochs=10, model=lenet5": [other]}


def test_table_and_plot(tmp_path):
    lines = [
        line(seed=seed, p={"validation": 0.8, "test": t})
        for seed, t in [(0, 0.8), (1, 0.9)]
    ]
    assert curves.table(lines).splitlines()[2] == "| halo | 0% | 85.00 ± 7.07 |"
    point = {"validation": 0.8, "test": 0.7}
    anew = line(p={**point, "recalibrated": {"validation": 0.9, "test": 0.85}})
    rows = curves.table([anew]).splitlines()[2:]
    assert rows == [
        "| halo | 0% | 70.00 |",
        "| halo, recalibrated | 0% | 85.00 |",
    ]
    dense = line("dense", p={"validation": 0.9, "test": 0.9, "target": 0.0})
    tuned = [{**each, "finetune": 0.2} for each in lines]
    for drawn in (lines, [dense], [anew], [dense, *lines, *tuned]):
        curves.plot(drawn, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_differences_are_taken_seed_by_seed():
    tests = {
        "halo": {0: 0.9, 1: 0.8, 2: 0.7},
        "magnitude": {1: 0.75, 0: 0.88, 3: 0.1},
        "ltp": {3: 0.2},
    }
    lines = [
        line(method, seed, p={"validation": 0.8, "test": test})
        for method, seeds in tests.items()
        for seed, test in seeds.items()
    ]
    # 2 and 5 points; of seed 2 there is one of them, and of fine-tuning none.
    lines.append({**lines[0], "finetune": 0.2})
    expected = [["halo", "0%", "+3.50 ± 2.12"], ["ltp", "0%", "+10.00"]]
    rows = curves.table(lines, against="magnitude").splitlines()[2:]
    assert rows == [f"| {' | '.join(row)} |" for row in expected]

    dense = line("dense", p={"validation": 0.9, "test": 0.92, "target": 0.0})
    rows = curves.table([*lines[:3], dense], against="dense").splitlines()[2:]
    assert rows == ["| halo | 0% | -2.00 |"]


def test_what_is_whole_is_read(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    whole = line(p={"validation": 0.8, "test": 0.8})
    other = {**whole, "format": "1"}
    foreign = ["null", "[1]", '{"curve": [{}]}']
    texts = [json.dumps(whole), json.dumps(other), *foreign, json.dumps(whole)[:9]]
    texts.append("[" * 100_000)
    path.write_bytes("\n".join(texts).encode() + b"\n\xff\n" + texts[0].encode())
    assert curves.read(path) == [whole, whole]
    assert curves.read(tmp_path) == []
    said = capsys.readouterr().out
    assert "line 2 has format '1', not 1" in said
    for number in (3, 4, 5):
        assert f"line {number} is not of compare.py" in said
    assert all(f"line {number} is cut" in said for number in (6, 7, 8))


@pytest.mark.parametrize(
    "broken",
    [
        {"curve": None},
        {"curve": []},
        {"curve": [{}]},
        {"seed": [0]},
        {"seed": True},
        {"finetune": float("nan")},
        {"settings": None},
        *({"curve": [{name: None}]} for name in ("target", "sparsity", "layers")),
        *({"curve": [{"test": test}]} for test in (float("nan"), 1.1, "0.9", True)),
        *({"curve": [{"recalibrated": anew}]} for anew in (None, {"test": 0.9})),
        {"curve": [{"layers": {"dense": "0.9"}}]},
    ],
    ids=str,
)
def test_a_line_that_lacks_something_is_left_out(tmp_path, capsys, broken):
    whole = line(p={"validation": 0.8, "test": 0.8})
    (point,) = whole["curve"]
    curve = broken.get("curve")
    if curve and curve != [{}]:
        broken = {"curve": [{**point, **curve[0]}]}
    path = tmp_path / "results.jsonl"
    path.write_text(f"{json.dumps({**whole, **broken})}\n{json.dumps(whole)}\n")
    assert curves.read(path) == [whole]
    assert "line 1 is not as compare.py writes it" in capsys.readouterr().out


# In a process of its own: train.py defines flags of the same names.
PARSE = """
import sys
from absl import flags
import compare
for flag in sys.argv[1:]:
    try:
        flags.FLAGS(["compare.py", flag])
    except flags.Error as error:
        print(str(error).replace("\\n", " "))
    else:
        print("accepted")
"""


def test_flags_that_are_out_of_range():
    expected = {
        "--seeds=2": "accepted",
        '--settings={"ltp": [{"l0": 1, "multiplier": 3}]}': "accepted",
        "--methods=halo,nothing": "of dense, magnitude, l1",
        "--sparsities=0.5,1": "numbers in [0, 1)",
        "--sparsities=": "numbers in [0, 1)",
        "--finetune=much": "numbers in [0, 1)",
        "--validation_split=1": "in (0, 1)",
        "--methods=": "of dense, magnitude, l1",
        '--settings={"halo": []}': "JSON: lists of dicts of numbers by names",
        '--settings={"halo": {}}': "JSON: lists of dicts of numbers by names",
        '--settings={"halo": [1]}': "JSON: lists of dicts of numbers by names",
        '--settings={"halo": [{"xi": "1"}]}': "lists of dicts of numbers by names",
        '--settings={"ltp": [{"pretrain": null}]}': "`falls_from` in [0, 1)",
        '--settings={"ltp": [{"pretrain": 1}]}': "`falls_from` in [0, 1)",
        '--settings={"ltp": [{"falls_from": 1}]}': "`falls_from` in [0, 1)",
        '--settings={"ltp": [{"multiplier": 0}]}': "`multiplier` > 0",
        '--settings={"ltp": [{"multiplier": 1e999}]}': "`multiplier` > 0",
        "--precision=half": "mixed_bfloat16",
        "--model=nothing": "lenet_300_100",
    }
    printed = subprocess.run(
        [sys.executable, "-c", PARSE, *expected],
        env=ENVIRONMENT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    for said, why in zip(printed, expected.values(), strict=True):
        assert why in said


def compare(path, *arguments):
    command = [sys.executable, EXAMPLES / "compare.py", f"--results={path}", *arguments]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


@pytest.mark.parametrize("epochs", ["--epochs=4", "--finetune=0.2"])
def test_the_method_and_fine_tuning_must_have_epochs(tmp_path, epochs):
    arguments = ["--methods=ltp", "--epochs=2", "--finetune=0.5", epochs]
    code, said = compare(tmp_path / "r.jsonl", *arguments)
    assert code == 1 and "--finetune must leave epochs to ltp" in said
    assert not (tmp_path / "r.jsonl").exists()


def test_data_that_are_not_there_are_asked_for_first(tmp_path):
    code, said = compare(tmp_path / "r.jsonl", f"--dataset={tmp_path / 'x.npz'}")
    assert code == 1 and "There is no file" in said
    assert not (tmp_path / "r.jsonl").exists()


IN_HALF_PRECISION = """
import compare, keras
compare.FLAGS(["compare.py", "--precision=mixed_bfloat16", "--images=99", "--epochs=2"])
built, build = [], compare.models.build
compare.models.build = lambda *args: built.append(build(*args)) or built[-1]
line = compare.train(next(compare.jobs()), None)
print(line["precision"], *{layer.compute_dtype for layer in built[0].layers[1:-1]})
"""


def test_precision_is_that_of_the_training():
    run = [sys.executable, "-c", IN_HALF_PRECISION]
    printed = subprocess.check_output(run, env=ENVIRONMENT, text=True)
    assert printed.split() == ["mixed_bfloat16", "bfloat16"]


def test_a_training_that_fails_leaves_the_others(tmp_path):
    settings = '{"l1": [{"l1": 1e30}, {"l1": 1e-4}]}'
    code, said = compare(
        tmp_path / "r.jsonl",
        *("--methods=l1", f"--settings={settings}", "--epochs=2", "--finetune=0"),
        *("--images=100", "--sparsities=0.5", "--seeds=1", "--jobs=1"),
    )
    (one,) = curves.read(tmp_path / "r.jsonl")
    assert one["settings"] == {"l1": 1e-4}
    failure = "1 trainings failed:\nl1 {'l1': 1e+30} finetune=0 seed=0: ValueError"
    assert code == 1 and failure in said


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ('--settings={"l1": [{"l2": 1}]}', "l1 {'l2': 1} finetune=0 seed=0: .*'l2'"),
        ('--settings={"l1": [{"l1": -1}]}', "l1 {'l1': -1} finetune=0 seed=0: .*l1=-1"),
        ("--model=alexnet", r"--model=alexnet, images of \(8, 8, 1\): .*"),
        ("--validation_split=0.0001", ".*some to choose by"),
        ("--image_size=32", "`--image_size` is for data sets of tensorflow-datasets"),
        ("--methods=ltp", r"ltp {.*} finetune=0 seed=0: .*`sparsity` must be"),
        ("--results=/proc/none/r.jsonl", ".*/proc/none"),
        ("--plot=picture.txt", r"--plot must end in one of .*\.png.* picture.txt"),
        ("--learning_rate=nan", "--learning_rate must be finite. Received: nan"),
    ],
)
def test_what_no_training_can_do_is_refused_before_the_first(tmp_path, wrong, why):
    flags = ["--methods=l1", "--finetune=0", "--sparsities=0,0.5"]
    code, said = compare(tmp_path / "r.jsonl", *flags, wrong)
    assert code == 1 and re.search(f"^{why}", said, re.MULTILINE)
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.slow
def test_it_goes_on_where_it_was_stopped(tmp_path):
    command = [
        *(sys.executable, EXAMPLES / "compare.py", "--methods=magnitude,gradual"),
        *("--epochs=2", "--finetune=0,0.0", "--sparsities=0.5", "--batch_size=64"),
        *(f"--results={tmp_path / 'r.jsonl'}", "--jobs=1"),
        f"--plot={tmp_path / 'new' / 'r.svg'}",
    ]
    (tmp_path / "r.jsonl").touch()
    for seeds in (1, 2):
        subprocess.run([*command, f"--seeds={seeds}"], env=ENVIRONMENT, check=True)
        lines = curves.read(tmp_path / "r.jsonl")
        assert len({curves.key(line) for line in lines}) == len(lines) == 2 * seeds
        (tmp_path / "new" / "r.svg").unlink()  # was drawn
        text = (tmp_path / "r.jsonl").read_text()
        assert text.startswith("{")
        # A line that a stop has cut does not swallow the next one.
        (tmp_path / "r.jsonl").write_text(text + '{"format": 1')


@pytest.mark.slow
@pytest.mark.parametrize("end", ["kill", "interrupt", "kill one that trains"])
def test_a_comparison_that_ends_leaves_no_training_behind(tmp_path, end):
    command = [
        *(sys.executable, EXAMPLES / "compare.py", "--methods=magnitude,l1"),
        *("--epochs=1000", "--jobs=2", f"--results={tmp_path / 'r.jsonl'}"),
    ]
    comparison = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        start_new_session=True,
        # Where these tests run in the background of a shell, they ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    group = comparison.pid
    try:
        # It, Python's tracker of resources, and two that train.
        wait_until(lambda: len(processes_of(group)) >= 4, seconds=120)
        if end == "interrupt":  # as a terminal does, all of them
            os.killpg(group, signal.SIGINT)
        elif end == "kill":
            comparison.kill()
        else:
            os.kill(max(map(int, processes_of(group))), signal.SIGKILL)
        comparison.wait()
        wait_until(lambda: not processes_of(group), seconds=120)
    finally:
        subprocess.run(["pkill", "-KILL", "-g", str(group)])


def processes_of(group):
    found = subprocess.run(["pgrep", "-g", str(group)], capture_output=True, text=True)
    return found.stdout.split()
