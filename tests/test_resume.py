"""Trainings that are killed and go on: real processes, real kills."""

import functools
import json
import os
import pathlib
import resource
import shutil
import signal
import sys
import time

import keras
import numpy as np
import pytest
from keras import layers
from processes import PROCESSES

import keras_sparsity as ks

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 6)).astype("float32")
Y = RNG.integers(0, 3, size=48)

METHODS = {
    "LTP": functools.partial(ks.LTP, l0=1e-3),
    "LTP absolute": functools.partial(ks.LTP, l0=1e-4, threshold_units="absolute"),
    "HALO": ks.HALO(xi=1e-3, psi=1e-2),
    "MagnitudePruning": functools.partial(
        ks.MagnitudePruning, schedule=ks.CubicSparsity(0.8, 9, frequency=2)
    ),
}


@pytest.fixture(autouse=True)
def _policy_restored():
    yield
    keras.config.set_dtype_policy("float32")


def train(
    directory, method="LTP", epochs=4, callbacks=(), optimizer="sgd", keep="pareto"
):
    """The same command each time: everything follows from the seed."""
    keras.utils.set_random_seed(0)
    method, _, policy = method.partition(", ")
    keras.config.set_dtype_policy(policy or "float32")
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Reshape((2, 3, 1)),
            layers.RandomFlip(),
            layers.Flatten(),
            layers.Dense(8, name="first"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dropout(0.3),
            layers.Dense(3, name="second"),
        ]
    )
    model = ks.sparsify(model, METHODS[method])
    schedule = keras.optimizers.schedules.ExponentialDecay(0.05, 4, 0.8)
    optimizers = {
        "sgd": lambda: keras.optimizers.SGD(schedule, momentum=0.9),
        "adam": lambda: keras.optimizers.Adam(1e-2),
    }
    model.compile(
        ks.SparsityOptimizer(optimizers[optimizer]()),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    trail = ks.SparsityTrail(directory, keep=keep, resume=True)
    history = model.fit(
        X,
        Y,
        batch_size=16,
        epochs=epochs,
        # TensorFlow begins its order anew, whatever the state of its generators.
        shuffle=keras.backend.backend() != "tensorflow",
        validation_data=(X, Y),
        callbacks=[trail, *callbacks],
        verbose=0,
    )
    return model, history


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """`wholes(method)`: the values and the directory of a run that was not killed."""

    @functools.cache
    def whole(method="LTP"):
        directory = tmp_path_factory.mktemp("whole")
        model, _ = train(directory, method)
        return values(model), directory

    return whole


@pytest.fixture
def finished(wholes, tmp_path):
    """A directory of a run that came to its end, to be changed."""
    _, directory = wholes()
    return shutil.copytree(directory, tmp_path / "finished")


def values(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [keras.ops.convert_to_numpy(variable).copy() for variable in variables]


def record(directory):
    """The lines of a trail, without the time that they took."""
    lines = (directory / "trail.jsonl").read_text().splitlines()
    return [{**json.loads(line), "seconds": None} for line in lines]


def files(directory):
    return sorted(path.name for path in directory.iterdir())


def assert_same(received, expected):
    for a, b in zip(received, expected, strict=True):
        np.testing.assert_array_equal(a, b)


class KillAt(keras.callbacks.Callback):
    def __init__(self, epoch, batch):
        super().__init__()
        self.moment = (epoch, batch)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.moment:
            os.kill(os.getpid(), signal.SIGKILL)


def run(target, *args):
    process = PROCESSES.Process(target=target, args=args)
    process.start()
    process.join()
    return process.exitcode


def train_and_die(directory, method, epoch, batch):
    train(directory, method, callbacks=[KillAt(epoch, batch)])


@pytest.mark.parametrize("method", [*METHODS, "LTP, mixed_float16"])
def test_killed_in_the_middle_of_an_epoch(wholes, tmp_path, method):
    expected, whole = wholes(method)
    cut = tmp_path / "cut"
    assert run(train_and_die, cut, method, 2, 1) == -signal.SIGKILL
    assert len(ks.Trail(cut).points) == 2

    model, history = train(cut, method)
    assert history.epoch == [2, 3]
    assert_same(values(model), expected)
    assert record(cut) == record(whole)
    assert files(cut) == files(whole)
    for point in ks.Trail(cut).points:
        if point.path.exists():
            reference = keras.saving.load_model(whole / point.path.name)
            assert_same(point.load().get_weights(), reference.get_weights())


def steered(directory):
    """The model, and the strengths at the end of each epoch that was trained."""
    strengths = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            found = [v for v in self.model.weights if v.name == "ltp_strength"]
            strengths.append([keras.ops.convert_to_numpy(v).copy() for v in found])

    model, _ = train(directory, callbacks=[ks.SparsityTarget(0.5), Look()])
    return model, np.array(strengths)


def train_to_a_target_and_die(directory):
    train(directory, callbacks=[ks.SparsityTarget(0.5), KillAt(2, 1)])


@pytest.mark.filterwarnings("ignore:`SparsityTarget` was to lead")  # in 4 epochs
def test_a_steered_training_goes_on(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected, strengths = steered(whole)
    assert np.all(strengths != 1)
    assert run(train_to_a_target_and_die, cut) == -signal.SIGKILL
    model, rest = steered(cut)
    np.testing.assert_array_equal(rest, strengths[2:])
    assert_same(values(model), values(expected))
    assert record(cut) == record(whole)


def test_state_of_another_backend_is_refused(tmp_path):
    train(tmp_path, epochs=1)
    with np.load(tmp_path / "state.npz") as state:
        arrays = {k: v for k, v in state.items() if k != "random/torch"}
    if keras.backend.backend() != "torch":
        arrays["random/torch"] = np.zeros(5056, "uint8")
    np.savez(tmp_path / "state.npz", **arrays)
    with pytest.raises(ValueError, match="random/torch"):
        train(tmp_path)


def test_a_finished_training_is_not_repeated(wholes, finished):
    expected, whole = wholes()
    model, history = train(finished)
    assert history.epoch == []
    assert_same(values(model), expected)
    assert record(finished) == record(whole)
    model.fit(X, Y, epochs=1, verbose=0)  # begins at its own first epoch
    assert model.history.epoch == [0]


def test_a_trained_model_that_has_no_epoch_left_is_told(tmp_path):
    model, _ = train(tmp_path, epochs=2)
    trail = ks.SparsityTrail(tmp_path, resume=True)
    with pytest.warns(UserWarning, match="the state after 2 epochs.*epochs=2"):
        model.fit(X, Y, epochs=2, verbose=0, callbacks=[trail])
    assert model.history.epoch == []


def test_more_epochs_go_on(wholes, tmp_path):
    expected, whole = wholes()
    train(tmp_path, epochs=2)
    model, _ = train(tmp_path)
    assert_same(values(model), expected)
    assert record(tmp_path) == record(whole)


def test_killed_between_the_state_and_the_record(wholes, tmp_path):
    expected, whole = wholes()
    train(tmp_path, epochs=2)
    *lines, _ = (tmp_path / "trail.jsonl").read_text().splitlines()
    (tmp_path / "trail.jsonl").write_text("\n".join([*lines, ""]))
    model, _ = train(tmp_path)
    assert_same(values(model), expected)
    assert record(tmp_path) == record(whole)


def train_until_killed(directory, is_on, moment, finished_epochs):
    class Tell(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.tell("batch")

        def on_epoch_end(self, epoch, logs=None):
            finished_epochs.value = epoch + 1
            self.tell("epoch")

        def tell(self, what):
            if what == moment:
                is_on.set()

    train(directory, epochs=1_000_000, callbacks=[Tell()])


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    generator = np.random.default_rng(1)
    finished_epochs = PROCESSES.Value("i", 0)
    cut = tmp_path / "cut"
    for _ in range(50):
        is_on = PROCESSES.Event()
        # After its first batch, or its first epoch: however slow the machine is, the
        # runs get on.
        moment = generator.choice(["batch", "epoch"])
        process = PROCESSES.Process(
            target=train_until_killed, args=(cut, is_on, moment, finished_epochs)
        )
        process.start()
        assert is_on.wait(120)
        time.sleep(generator.uniform(0, 0.4))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL

        finished = finished_epochs.value
        if not (cut / "trail.jsonl").exists():
            assert finished == 0
            continue
        trail = ks.Trail(cut)
        # Killed after an epoch was recorded and before this was told, one more.
        assert len(trail.points) - finished in (0, 1)
        with np.load(cut / "state.npz") as state:
            assert int(state["epoch"]) - len(trail.points) in (0, 1)
        kept = [point for point in trail.points if point.path.exists()]
        assert trail.select() in kept
        for point in kept:
            assert np.isfinite(point.load().predict(X, verbose=0)).all()
        finished_epochs.value = len(trail.points)
    epochs = finished_epochs.value + 2
    assert epochs > 10
    model, _ = train(cut, epochs=epochs)
    expected, _ = train(tmp_path / "whole", epochs=epochs)
    assert_same(values(model), values(expected))
    assert record(cut) == record(tmp_path / "whole")
    assert files(cut) == files(tmp_path / "whole")


def train_on_a_full_disk(directory, name, errors):
    def fill(event, args):
        # From here on no file may grow beyond what the disk still takes.
        if event == "open" and pathlib.Path(str(args[0])).name == name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))

    class Fill(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                sys.addaudithook(fill)

    try:
        train(directory, callbacks=[Fill()], keep="all")
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        errors.put(str(error))


@pytest.mark.parametrize("name", ["epoch-0003.keras", "state.npz", "trail.jsonl"])
def test_full_disk(wholes, tmp_path, name):
    expected, whole = wholes()
    errors = PROCESSES.SimpleQueue()
    assert run(train_on_a_full_disk, tmp_path, name, errors) == 0
    error = errors.get()
    assert f"'{tmp_path / name}' could not be written; what was written" in error
    assert record(tmp_path) == record(whole)[:3]
    assert not list(tmp_path.glob("unfinished*"))
    for point in ks.Trail(tmp_path).points:
        assert np.isfinite(point.load().predict(X, verbose=0)).all()

    model, _ = train(tmp_path, keep="all")  # there is room again
    assert_same(values(model), expected)
    assert record(tmp_path) == record(whole)


@pytest.mark.parametrize("other", [{"method": "HALO"}, {"optimizer": "adam"}])
def test_state_of_another_training_is_refused(finished, other):
    before = record(finished)
    with pytest.raises(ValueError, match="`directory` must be new or hold the tra"):
        train(finished, **other)
    assert record(finished) == before


def test_trail_without_a_state_is_refused(finished):
    (finished / "state.npz").unlink()
    with pytest.raises(ValueError, match="recorded without `resume=True`"):
        train(finished)


def test_records_without_a_state_are_not_lost(finished):
    lines = (finished / "trail.jsonl").read_text()
    (finished / "trail.jsonl").write_text(lines + lines.splitlines()[-1] + "\n")
    with pytest.raises(ValueError, match="a trail with 5 epochs.*that of epoch 4"):
        train(finished)
    assert len(record(finished)) == 6


def test_a_training_that_is_refused_leaves_the_model_alone(finished):
    (finished / "trail.jsonl").unlink()
    (finished / "trail.jsonl").symlink_to(finished / "nowhere" / "trail.jsonl")
    callback = keras.callbacks.Callback()
    with pytest.raises(OSError, match="could not be written"):
        train(finished, callbacks=[callback])
    callback.model.fit(X, Y, epochs=1, verbose=0)
    assert callback.model.history.epoch == [0]


def test_damaged_state_is_refused(finished):
    state = finished / "state.npz"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(ValueError, match="'.*state.npz' is damaged"):
        train(finished)


def train_with_backup(directory, method, die, *others):
    keras.utils.set_random_seed(0)
    if method == "HALO of the layers":
        dense = [layers.Dense(n, kernel_regularizer=ks.HALO()) for n in (8, 3)]
        model = keras.Sequential([keras.Input((6,)), *dense])
    else:
        model = keras.Sequential([keras.Input((6,)), layers.Dense(8), layers.Dense(3)])
        model = ks.sparsify(model, METHODS[method])
    optimizer = ks.SparsityOptimizer(keras.optimizers.SGD(0.05, momentum=0.9))
    model.compile(optimizer, "mse")
    targets = np.eye(3, dtype="float32")[Y]
    backup = keras.callbacks.BackupAndRestore(directory, delete_checkpoint=False)
    callbacks = [backup, *others, *([KillAt(2, 1)] if die else [])]
    model.fit(X, targets, 16, 4, 0, callbacks, shuffle=False)
    return model


@pytest.mark.parametrize("method", [*METHODS, "HALO of the layers"])
def test_restart_under_backup_and_restore(tmp_path, method):
    expected = train_with_backup(tmp_path / "whole", method, die=False)
    killed = run(train_with_backup, tmp_path / "cut", method, True)
    assert killed == -signal.SIGKILL
    model = train_with_backup(tmp_path / "cut", method, die=False)
    assert_same(values(model), values(expected))
    shutil.rmtree(tmp_path)


def test_a_trail_leaves_backup_and_restore_alone(tmp_path):
    assert run(train_with_backup, tmp_path, "LTP", True) == -signal.SIGKILL
    trail = ks.SparsityTrail(tmp_path / "trail", "loss")
    model = train_with_backup(tmp_path, "LTP", False, trail)
    assert model.history.epoch == [2, 3]
