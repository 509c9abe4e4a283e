"""Several devices and workers give what one gives: real processes, virtual devices."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

import keras_sparsity as ks

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import launch_local  # noqa: E402

BACKEND = keras.backend.backend()
SCRIPT = pathlib.Path(__file__).with_name("distributed_training.py")
METHODS = [
    "LTP",
    "LTP absolute",
    "HALO",
    "MagnitudePruning",
    "LTP, batch norm",
]
on_tensorflow = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="`tf.distribute` is TensorFlow's"
)
on_several = pytest.mark.skipif(
    BACKEND == "torch", reason="Keras has no distribution for torch"
)


def start(setting, **environment):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), json.dumps(setting)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_workers(settings):
    addresses = launch_local.free_addresses(len(settings))
    return [
        start(
            {"devices": 1, **setting},
            TF_CONFIG=launch_local.worker_config(addresses, index),
        )
        for index, setting in enumerate(settings)
    ]


def finish(*processes):
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]


def load(path):
    with np.load(path) as file:
        return dict(file)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of every way to train, of all the methods."""
    folder = tmp_path_factory.mktemp("results")

    def setting(name, **settings):
        return {
            "methods": METHODS,
            "output": str(folder / f"{name}.npz"),
            **settings,
        }

    finish(start(setting("one", devices=1)))
    finish(start(setting("two", devices=2)))
    if BACKEND == "tensorflow":
        finish(start(setting("strategy", devices=1, one_device_strategy=True)))
        finish(*start_workers([setting("worker 0"), setting("worker 1")]))
    return {path.stem: load(path) for path in folder.iterdir()}


def assert_equal(received, expected, method, tolerance=2e-5):
    names = [name for name in received if name.startswith(f"{method}/")]
    assert f"{method}/history/loss" in names
    for name in names:
        np.testing.assert_allclose(
            received[name], expected[name], rtol=0, atol=tolerance, err_msg=name
        )


@on_several
@pytest.mark.parametrize("method", METHODS)
def test_two_devices_equal_one(results, method):
    assert_equal(results["two"], results["one"], method)


@on_tensorflow
@pytest.mark.parametrize("method", METHODS)
def test_one_device_strategy(results, method):
    assert_equal(results["strategy"], results["one"], method, tolerance=1e-7)


@on_tensorflow
@pytest.mark.parametrize("method", METHODS)
def test_two_workers_equal_one_device(results, method):
    assert_equal(results["worker 0"], results["one"], method)
    assert_equal(results["worker 1"], results["worker 0"], method, tolerance=0)


@on_several
@pytest.mark.parametrize("method", METHODS)
def test_finalized_models_predict_the_same(results, method):
    for result in [results["one"], results["two"]]:
        predicted = result[f"{method}/predict"]
        assert predicted.shape == (36, 3)
        np.testing.assert_allclose(
            result[f"{method}/finalized"], predicted, rtol=1e-6, atol=1e-6
        )


@on_tensorflow
def test_one_of_two_workers_is_killed(tmp_path):
    def settings(name, kill):
        return [
            {
                "methods": ["LTP, batch norm"],
                "trail": str(tmp_path / name),
                "output": str(tmp_path / f"{name} {index}.npz"),
                "kill": kill and index == 1,
            }
            for index in range(2)
        ]

    finish(*start_workers(settings("whole", kill=False)))
    first, second = start_workers(settings("cut", kill=True))
    second.communicate(timeout=300)
    assert second.returncode == -signal.SIGKILL
    first.kill()  # as a launcher does: it waits for the other
    first.communicate()
    assert len(ks.Trail(tmp_path / "cut").points) == 1

    finish(*start_workers(settings("cut", kill=False)))
    assert len(ks.Trail(tmp_path / "cut").points) == 3
    for index in range(2):
        cut = load(tmp_path / f"cut {index}.npz")
        whole = load(tmp_path / f"whole {index}.npz")
        for name in whole:
            if "history" not in name:  # which begins at the second epoch
                np.testing.assert_array_equal(cut[name], whole[name], err_msg=name)
    for a, b in zip(
        ks.Trail(tmp_path / "cut").points,
        ks.Trail(tmp_path / "whole").points,
        strict=True,
    ):
        assert (a.metrics, a.weights) == (b.metrics, b.weights)
        assert a.path.exists() == b.path.exists()


@on_tensorflow
def test_chief_alone_writes(tmp_path):
    """The second worker is given a directory of its own, which must stay empty."""
    settings = [
        {
            "methods": ["HALO"],
            "trail": str(tmp_path / f"trail {index}"),
            "output": str(tmp_path / f"{index}.npz"),
        }
        for index in range(2)
    ]
    finish(*start_workers(settings))
    assert len(ks.Trail(tmp_path / "trail 0").points) == 3
    assert not (tmp_path / "trail 1").exists()


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
        "--epochs=1",
        "--pretrain_epochs=1",
        "--verbose=2",
        f"--output={tmp_path}",
    )
    output, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, output[-3000:]
    assert "[worker 0] sparse" in output
    assert "[worker 1] Written" not in output
    assert (tmp_path / "sparse.keras").exists()


@on_tensorflow
def test_launcher_ends_all_when_one_fails(tmp_path):
    launcher = launch("--workers=2", "--", "--epochs=500", f"--output={tmp_path}")
    children = f"/proc/{launcher.pid}/task/{launcher.pid}/children"
    deadline = time.monotonic() + 60
    while len(pids := pathlib.Path(children).read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(int(pids[1]), signal.SIGKILL)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert "Worker 1 ended with code -9: all are ended." in output
    for pid in pids:
        assert not pathlib.Path(f"/proc/{pid}").exists()
