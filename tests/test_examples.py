"""The examples: their data and benchmark, and the script from end to end."""

import json
import os
import pathlib
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver

import keras_sparsity as ks

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import data  # noqa: E402
import denormals  # noqa: E402
import models  # noqa: E402
import settings  # noqa: E402
import train  # noqa: E402


@pytest.fixture
def run(tmp_path):
    """`run(*flags)` runs the script; the results that it wrote as JSON."""

    def run(*arguments):
        quick = ("--pretrain_epochs=1", "--epochs=2", "--batch_size=64", "--verbose=0")
        keras.utils.clear_session()  # names of layers begin anew, as in a process
        with flagsaver.flagsaver():
            flags.FLAGS(["train.py", f"--output={tmp_path}", *quick, *arguments])
            train.main([])
        return json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])

    return run


def zeros(model):
    """Part of the zeros in the kernels."""
    kernels = [w.numpy() for w in model.weights if w.name == "kernel"]
    return sum((k == 0).sum() for k in kernels) / sum(k.size for k in kernels)


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="XLA does it in some of its threads"
)
def test_no_backend_computes_with_denormal_numbers():
    # Few enough for one thread: those that run already keep their way on torch.
    small = keras.ops.convert_to_tensor(np.full(10_000, 1e-20, "float32"))
    try:
        denormals.flush()
        product = keras.ops.convert_to_numpy(small * 1e-20)
    finally:
        if keras.backend.backend() == "torch":  # the tests' own process
            import torch

            torch.set_flush_denormal(False)
    assert not product.any()


def test_digits_are_standardized_and_split_by_seed():
    digits, others = data.load("digits", seed=0), data.load("digits", seed=1)
    images, labels = digits.train
    assert images.shape[1:] == (8, 8, 1) and images.dtype == "float32"
    np.testing.assert_allclose([images.mean(), images.std()], [0, 1], atol=1e-5)
    assert [len(y) for _, y in digits[:3]] == [1294, 144, 359]
    assert not np.array_equal(digits.validation[1], others.validation[1])
    few = data.load("digits", seed=0, count=50)
    assert few.count == len(few.train[1]) == 50
    np.testing.assert_array_equal(few.train[1], digits.train[1][:50])
    np.testing.assert_array_equal(few.validation[1], digits.validation[1])
    np.testing.assert_array_equal(digits.test[1], others.test[1])


def test_sets_of_tensorflow_datasets_are_read(tmp_path):
    pytest.importorskip("tensorflow")
    tfds = pytest.importorskip("tensorflow_datasets")
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3), dtype="uint8")

    class TinyImages(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=images.shape[1:])
            label = tfds.features.ClassLabel(num_classes=3)
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({"image": image, "label": label}),
                supervised_keys=("image", "label"),
                disable_shuffling=True,
            )

        def _split_generators(self, manager):
            return {
                "train": self._examples(0, 40),
                "validation": self._examples(40, 60),
            }

        def _examples(self, first, last):
            for row in range(first, last):
                yield row, {"image": images[row], "label": row % 3}

        _generate_examples = _examples

    TinyImages(data_dir=tmp_path).download_and_prepare()
    tiny = data.load("tiny_images", tmp_path, validation=0.25)

    def normal(x):
        return (x - x.mean((0, 1, 2))) / x.std((0, 1, 2))

    np.testing.assert_allclose(normal(tiny.test[0]), normal(images[40:]), atol=1e-5)
    np.testing.assert_array_equal(tiny.test[1], np.arange(40, 60) % 3)
    assert (len(tiny.train[1]), len(tiny.validation[1]), tiny.classes) == (30, 10, 3)
    resized = data.load("tiny_images", tmp_path, image_size=8)
    assert resized.train[0].shape[1:] == (8, 8, 3)


def test_a_data_set_that_is_not_there_is_refused_with_what_is(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    for kept in ("cifar10/3.0.2", "coco_captions/2014/1.1.0"):
        (tmp_path / kept).mkdir(parents=True)
        (tmp_path / kept / "dataset_info.json").touch()
    for cut_off in ("downloads", "mnist/3.0.1.incompleteABC"):
        (tmp_path / cut_off).mkdir(parents=True)
    with pytest.raises(
        ValueError, match="`mnist` is not .*: cifar10, coco_captions[.]"
    ):
        data.load("mnist", tmp_path)
    with pytest.raises(ValueError, match="`glue` is not for image classification"):
        data.load("glue", tmp_path, download=True)
    with pytest.raises(ValueError, match="No data set is called `nothing`.*cifar10"):
        data.load("nothing", tmp_path)
    with pytest.raises(ValueError, match="`mnist:99.0.0` is not there"):
        data.load("mnist:99.0.0", tmp_path)


@pytest.mark.parametrize("channels", [(), (3,)])
def test_arrays_of_a_file(tmp_path, channels):
    generator, shape = np.random.default_rng(1), (8, 6, *channels)
    images = {
        part: generator.integers(0, 256, (40, *shape)) for part in ("train", "test")
    }
    labels = np.arange(40)[:, None] % 4
    path = tmp_path / "mine.npz"
    arrays = {f"x_{part}": x for part, x in images.items()}
    np.savez(path, y_train=labels, y_test=labels, **arrays)
    mine = data.load(str(path), validation=0.25)
    assert mine.image_shape == (8, 6, *(channels or (1,))) and mine.classes == 4
    assert (len(mine.train[1]), len(mine.validation[1])) == (30, 10)
    np.testing.assert_array_equal(mine.test[1], labels.ravel())
    kept = images["train"][np.random.default_rng(0).permutation(40)[:30]]
    kept, test = (x.reshape(-1, *mine.image_shape) for x in (kept, images["test"]))
    expected = (test - kept.mean((0, 1, 2))) / kept.std((0, 1, 2))
    np.testing.assert_allclose(mine.test[0], expected, rtol=1e-4, atol=1e-5)

    np.savez(path, x_train=images["train"], y_train=labels)
    with pytest.raises(ValueError, match="must have .*y_test. Received: x_train, y_tr"):
        data.load(str(path))
    with pytest.raises(ValueError, match="There is no file `.*nothing.npz`"):
        data.load(str(tmp_path / "nothing.npz"))


@pytest.mark.parametrize("left", [0, 10, 2000, -1])
def test_a_file_of_arrays_that_is_cut_is_refused(tmp_path, left):
    names = [f"{kind}_{part}" for kind in "xy" for part in ("train", "test")]
    path = tmp_path / "mine.npz"
    np.savez(path, **{name: np.ones((40, 8, 6)) for name in names})
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match="`.*mine.npz` is no .npz file, or is cut"):
        data.load(str(path))


@pytest.mark.parametrize(
    ("shape", "labels"), [((40, 48), 40), ((40, 8, 6), 39), ((0, 8, 6), 0)]
)
def test_arrays_that_are_no_images_with_labels_are_refused(tmp_path, shape, labels):
    arrays = {f"x_{part}": np.ones(shape) for part in ("train", "test")}
    arrays |= {f"y_{part}": np.ones(labels, int) for part in ("train", "test")}
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(ValueError, match=rf"images of shape .*{labels} labels"):
        data.load(str(tmp_path / "mine.npz"))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"y_train": np.arange(40) - 1}, "whole numbers from 0. .*int64 from -1"),
        ({"y_train": np.arange(40.0)}, "whole numbers from 0. .*float64 from 0.0"),
        ({"y_test": np.arange(1, 41)}, "image of every class. .*to 39 .*to 40 to test"),
        ({"x_test": np.ones((40, 6, 8))}, r"of one shape. .*\(8, 6, 1\) and \(6, 8, 1"),
    ],
    ids=["negative", "floats", "classes", "shapes"],
)
def test_arrays_that_do_not_fit_each_other_are_refused(tmp_path, wrong, why):
    arrays = {f"x_{part}": np.ones((40, 8, 6)) for part in ("train", "test")}
    arrays |= {f"y_{part}": np.arange(40) for part in ("train", "test")}
    np.savez(tmp_path / "mine.npz", **arrays | wrong)
    with pytest.raises(ValueError, match=why):
        data.load(str(tmp_path / "mine.npz"))


def test_only_data_sets_of_tensorflow_datasets_are_resized():
    with pytest.raises(ValueError, match="--image_size=32 --dataset=digits"):
        data.load("digits", image_size=32)


@pytest.mark.parametrize("validation", [1e-4, 0.9999])
def test_some_images_to_train_with_and_some_to_choose_by(validation):
    with pytest.raises(ValueError, match="some to choose by. Received: 1438 images"):
        data.load("digits", validation=validation)


@pytest.mark.parametrize(
    "flag",
    ["--sparsity=1", "--curve=0.5,1.5", "--l0=-1", "--model=vgg", "--epochs=0"]
    + ["--drops=0.75,0.5"],
)
def test_bad_flags_are_refused_before_training(run, flag):
    with pytest.raises(flags.IllegalFlagValueError, match=flag[2:].split("=")[0]):
        run(flag)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("--learning_rate=nan", "--learning_rate must be finite. Received: nan"),
        ("--augment=random_resized_crop", "from disk. Received: --dataset=digits"),
    ],
)
def test_flags_that_make_no_sense_are_refused_before_training(run, wrong, why):
    with pytest.raises(app.UsageError, match=why):
        run(wrong)


def test_the_main_job_writes_what_it_says(run, tmp_path, capsys):
    results = run("--l0=1e-3", "--curve=0.5")
    model = keras.saving.load_model(tmp_path / "sparse.keras")
    assert "keras_sparsity" not in json.dumps(model.get_config())
    images, labels = data.load("digits").test
    accuracy = np.mean(model.predict(images, verbose=0).argmax(-1) == labels)
    assert results["sparse"]["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert results["sparse"]["sparsity"] == pytest.approx(zeros(model)) != 0
    assert f"{accuracy:.2%}" in capsys.readouterr().out
    assert (tmp_path / "trail.png").stat().st_size > 0
    assert len(list(tmp_path.glob("*/trail/*.keras"))) > 0
    assert results["curve"][0]["sparsity"] == 0.5


@pytest.mark.parametrize(("macs", "shown"), [(None, "unknown"), (1234567, "1,234,567")])
def test_the_table_shows_macs_that_are_not_known(capsys, macs, shown):
    row = {"accuracy": 0.5, "sparsity": 0.9, "bytes": 2000, "compressed_bytes": 1000}
    train.print_table({"sparse": {**row, "macs": macs}})
    *_, line = capsys.readouterr().out.splitlines()
    assert line.split() == ["sparse", "50.00%", "90.00%", shown, "2,000", "1,000"]


@pytest.mark.parametrize("method", ["ltp", "halo", "l1", "magnitude", "dense"])
def test_every_method_reaches_the_sparsity(run, tmp_path, method):
    # One epoch from scratch; the price is such that LTP gets there in it.
    short = ("--model=lenet_300_100", "--pretrain_epochs=0", "--epochs=1", "--l0=1e-3")
    results = run(f"--method={method}", "--sparsity=0.3", *short)
    model = keras.saving.load_model(tmp_path / "sparse.keras")
    assert results["sparse"]["sparsity"] == pytest.approx(zeros(model))
    assert zeros(model) >= 0.3 - 1e-4


def test_a_recipe_of_halo_trains(run):
    other = ["--dataset=digits", "--model=small_cnn", "--images=200", "--epochs=1"]
    results = run("--recipe=halo_vgg_cifar10", *other)
    settings = results["settings"]
    assert (settings["xi"], settings["augment"]) == (1e-8, "crop_flip")
    part = 1 - 640 / (32 * 9 + 64 * 32 * 9 + 64 * 256 + 640)  # the last layer is spared
    assert results["sparse"]["sparsity"] == pytest.approx(0.95 * part, abs=1e-4)
    curve = [point["sparsity"] for point in results["curve"]]
    assert curve == pytest.approx([0.7, 0.8, 0.9, 0.95], abs=1e-4)


@pytest.mark.parametrize(("method", "epochs"), [("ltp", 12), ("halo", 30)])
def test_a_sparsity_is_steered_to(run, tmp_path, method, epochs):
    short = ("--model=lenet_300_100", "--pretrain_epochs=0", f"--epochs={epochs}")
    coefficients = ("--l0=1e-5", "--xi=3e-6", "--psi=1e-2", "--schedule=cosine")
    steer = ("--sparsity=0.9", "--steer")
    results = run(f"--method={method}", *steer, *short, *coefficients)
    # Not by the prune to 0.9 that follows HALO, nor by LTP's shift alone.
    assert results["sparse"]["reached"] == pytest.approx(0.9, abs=0.005)
    if method == "ltp":
        assert results["sparse"]["shifted_from"] == pytest.approx(0.9, abs=0.02)
    model = keras.saving.load_model(tmp_path / "sparse.keras")
    assert zeros(model) == pytest.approx(0.9, abs=0.005)
    # What steering adds: without it this price leads elsewhere.
    if method == "ltp":
        run("--method=ltp", *short, *coefficients)
        model = keras.saving.load_model(tmp_path / "sparse.keras")
        assert zeros(model) != pytest.approx(0.9, abs=0.005)


def test_steering_needs_a_sparsity(run):
    for wrong in (["--steer"], ["--steer", "--method=l1", "--sparsity=0.5"]):
        with pytest.raises(app.UsageError, match="--steer leads ltp or"):
            run(*wrong)


def test_a_recipe_may_bring_the_sparsity_to_steer_to(run):
    other = ["--dataset=digits", "--model=small_cnn", "--images=200", "--epochs=2"]
    with pytest.warns(UserWarning, match="was to lead to a sparsity of 0.95"):
        results = run("--recipe=halo_vgg_cifar10", "--steer", *other)
    assert results["settings"]["steer"]


def test_fine_tuning_keeps_the_zeros(run, tmp_path):
    run("--method=l1", "--model=lenet_300_100", "--epochs=1", "--finetune_epochs=1")
    model = keras.saving.load_model(tmp_path / "sparse.keras")
    assert zeros(model) == pytest.approx(0.9, abs=1e-4)


def test_batch_statistics_are_gathered_anew(run, tmp_path, monkeypatch):
    def normalized(x):
        x = keras.layers.Dense(16)(keras.layers.Flatten()(x))
        return keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.999)(x))

    def written():
        model = keras.saving.load_model(tmp_path / "sparse.keras")
        return model, [w.numpy() for w in model.non_trainable_variables]

    monkeypatch.setitem(models.FAMILIES, "small_cnn", normalized)
    flags = ["--method=halo", "--sparsity=0.5", "--curve=0.5"]
    stale = run(*flags)
    model, old = written()
    fresh = run(*flags, "--recalibrate")
    _, new = written()
    digits = data.load("digits", seed=0)
    ks.recalibrate(model, digits.train[0], 64)
    expected = [w.numpy() for w in model.non_trainable_variables]
    for received, before, after in zip(new, old, expected, strict=True):
        np.testing.assert_allclose(received, after, rtol=1e-5, atol=1e-6)
        assert np.abs(received - before).max() > 0.1
    images, labels = digits.test
    accuracy = np.mean(model.predict(images, verbose=0).argmax(-1) == labels)
    assert fresh["sparse"]["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert accuracy > stale["sparse"]["accuracy"] + 0.05
    for results in (stale, fresh):
        (point,) = results["curve"]
        same = results["sparse"]["accuracy"]
        assert point["accuracy"] == pytest.approx(same, abs=1e-6)


def test_other_settings_than_those_of_the_run_to_resume_are_refused(run, tmp_path):
    quick = ("--resume", "--model=lenet_300_100", "--method=l1", "--epochs=1")
    first = run(*quick)
    with pytest.raises(app.UsageError, match="seed=0 there, seed=1 here"):
        run(*quick, "--seed=1")
    with pytest.raises(app.UsageError, match="epochs=1 there, epochs=2 here"):
        run(*quick, "--epochs=2")
    if keras.backend.backend() == "tensorflow":  # which has one device here
        with pytest.raises(app.UsageError, match="strategy=none there, strategy=mir"):
            run(*quick, "--strategy=mirrored")
    # The same training, shown otherwise: it is not repeated.
    again = run(*quick, "--curve=0.5", "--verbose=2")
    assert again["sparse"] == first["sparse"]
    assert len(ks.Trail(tmp_path / "trail").points) == 1


def test_a_directory_is_that_of_one_training(tmp_path):
    model = models.build("lenet_300_100", (8, 8, 1), 10)
    settings.claim(tmp_path, {"seed": 0, "verbose": "1"}, model, resume=False)
    settings.claim(tmp_path, {"seed": 0, "verbose": "2"}, model, resume=True)
    with pytest.raises(app.UsageError, match="devices=None there, devices=2 here"):
        settings.claim(tmp_path, {"seed": 0, "devices": 2}, model, resume=True)
    with pytest.raises(app.UsageError, match="holds a training already"):
        settings.claim(tmp_path, {"seed": 0, "verbose": "1"}, model, resume=False)
    (tmp_path / "settings.json").write_text('{"KERAS_BACKEND": "theano", "seed": 0}')
    with pytest.raises(app.UsageError, match="KERAS_BACKEND=theano there"):
        settings.claim(tmp_path, {"seed": 0}, model, resume=True)


@pytest.mark.slow
def test_a_killed_run_is_finished_by_the_same_command(tmp_path):
    def start(output):
        flags = ["--resume", "--pretrain_epochs=2", "--epochs=3", "--finetune_epochs=1"]
        command = [sys.executable, EXAMPLES / "train.py", *flags, f"--output={output}"]
        environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait(300) == 0
    # Once in the dense training, and once in the training with the method.
    for phase in ("dense", "trail"):
        killed = start(tmp_path / "cut")
        while not (tmp_path / "cut" / phase / "trail.jsonl").exists():
            assert killed.poll() is None
            time.sleep(0.02)
        killed.kill()
        killed.wait()
    assert start(tmp_path / "cut").wait(300) == 0

    whole, cut = (
        keras.saving.load_model(tmp_path / name / "sparse.keras").get_weights()
        for name in ("whole", "cut")
    )
    for a, b in zip(whole, cut, strict=True):
        np.testing.assert_array_equal(a, b)


def lines_of_benchmark(script, *arguments):
    """What one of the benchmarks prints."""
    return subprocess.run(
        [sys.executable, EXAMPLES / "benchmarks" / script, *arguments],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()


def test_the_benchmark_compares_every_method_with_the_dense_step():
    small = ["--network=lenet_300_100", "--rounds=1", "--steps=2"]
    *table, line = lines_of_benchmark("step_time.py", "--json", *small)
    rows = json.loads(line)["results"]["lenet_300_100"]
    assert [row.split()[0] for row in table[-4:]] == list(rows)
    assert rows["dense"]["over dense"] == 1
    assert rows["dense"]["exp / weight"] < 1 <= rows["ltp"]["exp / weight"] < 2
    assert rows["halo"]["operations"] > rows["dense"]["operations"]


def test_file_sizes_are_compared_with_the_plain_file(tmp_path):
    model = models.build("lenet5", (28, 28, 1), 10)
    model.save(tmp_path / "model.keras")
    small = [f"--file={tmp_path / 'model.keras'}", "--sparsities=0.95", "--rounds=1"]
    *_, line = lines_of_benchmark("file_size.py", "--json", *small)
    (rows,) = json.loads(line)["results"].values()
    assert rows["save"]["over save"] == 1
    # 0.05 of 61,706 weights, by 32 bits and their entropy of 0.286 bits per weight.
    assert 0.045 < rows["reference"]["over save"] < 0.06
    assert rows["reference"]["bytes"] < rows["save_model"]["bytes"]
    assert rows["save_model"]["over save"] < 0.1


@pytest.mark.slow
def test_the_benchmark_of_inference_compares_layers_and_networks():
    small = ["--network=pointwise", "--batch_size=1", "--rounds=1"]
    *table, line = lines_of_benchmark("inference.py", "--json", *small)
    (row,) = json.loads(line)["results"]
    assert sum("  sparse" in line for line in table[-10:-2]) == row["sparse_layers"]
    assert row["difference"] <= 1e-5


@pytest.mark.slow
def test_the_benchmark_of_compaction_compares_a_model_with_what_is_left(tmp_path):
    model = keras.Sequential([keras.Input((5,)), *map(keras.layers.Dense, (4, 3, 2))])
    kernel = np.ones((5, 4))
    kernel[:, 1:] = 0
    model.layers[0].kernel.assign(kernel)
    model.save(tmp_path / "model.keras")
    small = [tmp_path / "model.keras", "--batch_size=2", "--rounds=1"]
    _, row = map(json.loads, lines_of_benchmark("compaction.py", *small))
    assert row["units"] == ["4-3", "1-3"]
    assert row["macs"] == [5 * 4 + 4 * 3 + 3 * 2, 5 + 3 + 3 * 2]
    assert row["difference"] < 1e-5
    assert min(row["ms at 2"]) > 0
