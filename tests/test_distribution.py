"""Several devices and workers give what one gives: real processes, virtual devices."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import distributed_training
import keras
import numpy as np
import pytest
from processes import PROCESSES, wait_until

import keras_sparsity as ks

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import launch_local  # noqa: E402

BACKEND = keras.backend.backend()
ON_TENSORFLOW = BACKEND == "tensorflow"
METHODS = [
    "LTP",
    "LTP absolute",
    "HALO",
    "MagnitudePruning",
    "KeepZeros",
    "LTP, batch norm",
    "LTP, target",
]
DROPOUT = "LTP, batch norm, dropout"
DROPOUTS = [DROPOUT, "HALO, dropout", "MagnitudePruning, dropout"]
COMPILED = ["LTP, batch norm", "HALO", "MagnitudePruning"]
# With their tolerances: batches are summed in parts, each of which is rounded.
MIXED = {
    "LTP, mixed_bfloat16": 2e-2,
    "LTP, mixed_float16": 1e-2,
    "HALO, mixed_float16": 1e-2,
}
on_tensorflow = pytest.mark.skipif(
    not ON_TENSORFLOW, reason="`tf.distribute` is TensorFlow's"
)
on_several = pytest.mark.skipif(
    BACKEND == "torch", reason="Keras has no distribution for torch"
)


def start(**arguments):
    process = PROCESSES.Process(target=distributed_training.run, kwargs=arguments)
    process.start()
    return process


def start_workers(*arguments):
    """A worker for each dict of arguments."""
    addresses = launch_local.free_addresses(len(arguments))
    return [
        start(
            tf_config=launch_local.worker_config(addresses, index),
            **{"devices": 1, **each},
        )
        for index, each in enumerate(arguments)
    ]


def finish(*processes):
    for process in processes:
        process.join(600)
        assert process.exitcode == 0


def load(path):
    with np.load(path) as file:
        return dict(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every way to train, of all the methods: the results, and some trails."""
    folder = tmp_path_factory.mktemp("results")
    cases = {"one": [*METHODS, *MIXED], "two": [*METHODS, *MIXED, *DROPOUTS]}
    trails = {("two", DROPOUT): folder / "trail of two"}
    processes = []
    if ON_TENSORFLOW:
        cases |= {"strategy": METHODS, "compiled": COMPILED}
        processes += start_workers(*(worker_of(folder, index) for index in range(2)))
    processes.append(start(cases=cases, output=folder, trails=trails))
    finish(*processes)
    return folder


def worker_of(folder, index):
    return {
        "cases": {"worker": [*METHODS, *MIXED, *DROPOUTS]},
        "output": folder / f"{index}",
        "trails": {
            ("worker", DROPOUT): folder / "trail of workers",
            ("worker", "HALO, dropout"): folder / f"trail of worker {index}",
        },
    }


@pytest.fixture(scope="module")
def results(folder):
    """The results by the way to train; those of workers as `0/worker`, `1/worker`."""
    paths = folder.glob("**/*.npz")
    return {str(path.relative_to(folder).with_suffix("")): load(path) for path in paths}


def assert_equal(received, expected, case, tolerance=2e-5):
    names = [name for name in received if name.startswith(f"{case}/")]
    assert f"{case}/history/loss" in names
    for name in names:
        np.testing.assert_allclose(
            received[name], expected[name], rtol=0, atol=tolerance, err_msg=name
        )


@on_several
@pytest.mark.parametrize("case", METHODS)
def test_two_devices_equal_one(results, case):
    assert_equal(results["two"], results["one"], case)


@on_several
def test_target_steers_on_two_devices(results):
    strengths = results["two"]["LTP, target/strengths"]
    assert strengths.shape == (3, 2) and np.all(strengths != 1)


@on_several
@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize("way", ["two", "0/worker"] if ON_TENSORFLOW else ["two"])
def test_several_equal_one_device_in_mixed_precision(results, way, case):
    names = [
        n for n in results["one"] if re.match(f"{case}/(weight|history/.*loss)", n)
    ]
    assert len(names) > 5
    for name in names:
        np.testing.assert_allclose(
            results[way][name],
            results["one"][name],
            rtol=0,
            atol=MIXED[case],
            err_msg=name,
        )


@on_several
@pytest.mark.parametrize("case", [*METHODS, *DROPOUTS, *MIXED])
def test_all_devices_agree(results, case):
    assert results["two"][f"{case}/replicas differ by"] == 0
    assert np.isfinite(results["two"][f"{case}/history/loss"]).all()


@on_tensorflow
@pytest.mark.parametrize("case", METHODS)
def test_one_device_strategy(results, case):
    assert_equal(results["strategy"], results["one"], case, tolerance=1e-7)


@on_tensorflow
def test_one_device_strategy_with_a_trail(results, tmp_path):
    trails = {("strategy", "HALO"): tmp_path / "trail"}
    finish(start(cases={"strategy": ["HALO"]}, output=tmp_path, trails=trails))
    received = load(tmp_path / "strategy.npz")
    *_, last = ks.Trail(tmp_path / "trail").points
    loss, accuracy = received["HALO/evaluate"]
    assert (last.epoch, last.metrics["val_loss"]) == (3, pytest.approx(loss))
    assert last.metric == pytest.approx(accuracy)
    expected = results["one"] | {n: received[n] for n in received if "history/val" in n}
    assert_equal(received, expected, "HALO", tolerance=1e-6)


@on_tensorflow
@pytest.mark.parametrize("case", COMPILED)
def test_one_device_strategy_with_xla(results, case):
    assert_equal(results["compiled"], results["one"], case)


@on_tensorflow
@pytest.mark.parametrize("case", METHODS)
def test_two_workers_equal_one_device(results, case):
    assert_equal(results["0/worker"], results["one"], case)


@on_tensorflow
@pytest.mark.parametrize("case", [*METHODS, *DROPOUTS, *MIXED])
def test_workers_agree(results, case):
    assert_equal(results["1/worker"], results["0/worker"], case, tolerance=0)
    assert np.isfinite(results["0/worker"][f"{case}/history/loss"]).all()


@on_tensorflow
def test_workers_with_two_devices_each_equal_one_device(results, tmp_path):
    settings = [
        {"cases": {"worker": ["LTP"]}, "output": tmp_path / f"{index}", "devices": 2}
        for index in range(2)
    ]
    finish(*start_workers(*settings))
    first, second = (load(tmp_path / f"{index}/worker.npz") for index in range(2))
    assert_equal(first, results["one"], "LTP")
    assert_equal(second, first, "LTP", tolerance=0)


@on_several
@pytest.mark.parametrize("case", [*METHODS, *DROPOUTS])
def test_finalized_models_predict_the_same(results, case):
    predicted = results["two"][f"{case}/predict"]
    assert predicted.shape == (36, 3)
    np.testing.assert_allclose(
        results["two"][f"{case}/finalized"], predicted, rtol=1e-6, atol=1e-6
    )


@on_several
def test_a_killed_training_on_two_devices_goes_on(folder, tmp_path):
    setting = {
        "cases": {"two": [DROPOUT]},
        "output": tmp_path,
        "trails": {("two", DROPOUT): tmp_path / "cut"},
    }
    killed = start(**setting, kill=True)
    killed.join(600)
    assert killed.exitcode == -signal.SIGKILL
    assert len(ks.Trail(tmp_path / "cut").points) == 1

    finish(start(**setting))
    assert_same_training(tmp_path / "two.npz", folder / "two.npz")
    assert_same_trail(tmp_path / "cut", folder / "trail of two")


@on_tensorflow
@pytest.mark.parametrize("victim", [0, 1], ids=["chief", "other"])
def test_one_of_two_workers_is_killed(folder, tmp_path, victim):
    settings = [
        {
            "cases": {"worker": [DROPOUT]},
            "output": tmp_path / f"{index}",
            "trails": {("worker", DROPOUT): tmp_path / "cut"},
        }
        for index in range(2)
    ]
    workers = start_workers(
        *(each | {"kill": index == victim} for index, each in enumerate(settings))
    )
    workers[victim].join(600)
    assert workers[victim].exitcode == -signal.SIGKILL
    other = workers[1 - victim]
    other.kill()  # as a launcher does: it waits for the killed one
    other.join()
    assert len(ks.Trail(tmp_path / "cut").points) == 1

    finish(*start_workers(*settings))
    for index in range(2):
        path = f"{index}/worker.npz"
        assert_same_training(tmp_path / path, folder / path)
    assert_same_trail(tmp_path / "cut", folder / "trail of workers")


def assert_same_training(cut, whole):
    cut, whole = load(cut), load(whole)
    for name in cut:
        if "history" not in name:  # which begins at the second epoch
            np.testing.assert_array_equal(cut[name], whole[name], err_msg=name)


def assert_same_trail(cut, whole):
    cut, whole = ks.Trail(cut).points, ks.Trail(whole).points
    assert len(cut) == 3
    for a, b in zip(cut, whole, strict=True):
        assert (a.metrics, a.weights) == (b.metrics, b.weights)
        assert a.path.exists() == b.path.exists()


@on_tensorflow
def test_chief_alone_writes(folder):
    """The second worker was given a directory of its own, which must stay empty."""
    assert len(ks.Trail(folder / "trail of worker 0").points) == 3
    assert not (folder / "trail of worker 1").exists()


@on_several
def test_the_script_trains_on_two_devices(tmp_path):
    command = [
        *(sys.executable, EXAMPLES / "train.py"),
        f"--strategy={'mirrored' if ON_TENSORFLOW else 'data_parallel'}",
        *("--virtual_devices=2", "--model=lenet_300_100", "--method=halo"),
        *("--sparsity=0.5", "--epochs=2", "--verbose=0", f"--output={tmp_path}"),
    ]
    subprocess.run(command, check=True)
    results = json.loads((tmp_path / "results.jsonl").read_text())
    assert results["sparse"]["sparsity"] == pytest.approx(0.5, abs=1e-4)
    assert results["sparse"]["accuracy"] > 0.8


def launch(*arguments):
    return subprocess.Popen(
        [sys.executable, launch_local.__file__, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@on_tensorflow
def test_launcher_trains(tmp_path):
    launcher = launch(
        "--workers=2",
        "--",
        "--model=lenet_300_100",
        "--epochs=1",
        "--pretrain_epochs=1",
        "--virtual_devices=2",
        "--verbose=2",
        f"--output={tmp_path}",
    )
    output, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, output[-3000:]
    assert "[worker 0] sparse" in output
    assert "[worker 1] Written" not in output
    assert (tmp_path / "sparse.keras").exists()


def is_running(process):
    try:
        return (process / "cmdline").read_bytes() != b""  # a zombie has none
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def launched(tmp_path):
    """A launcher, and the paths of its two workers in `/proc`."""
    silent = ("--pretrain_epochs=500", "--verbose=0", f"--output={tmp_path}")
    with launch("--workers=2", "--", *silent) as launcher:
        children = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        wait_until(lambda: len(children.read_text().split()) == 2)
        ids = children.read_text().split()
        yield launcher, [pathlib.Path("/proc", each) for each in ids]
        launcher.kill()


@on_tensorflow
def test_launcher_ends_all_when_one_fails(launched):
    launcher, workers = launched
    os.kill(int(workers[1].name), signal.SIGKILL)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert "Worker 1 ended with code -9: all are ended." in output
    assert not any(is_running(worker) for worker in workers)


@on_tensorflow
def test_workers_end_with_a_launcher_that_is_killed(launched):
    launcher, workers = launched
    assert any("Dense training" in line for line in launcher.stdout)
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not any(is_running(worker) for worker in workers))
