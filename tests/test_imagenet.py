"""The pipeline of ImageNet, on a small generated data set of the same features."""

import json
import pathlib
import sys

import keras
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

tf = pytest.importorskip("tensorflow")
tfds = pytest.importorskip("tensorflow_datasets")

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import data  # noqa: E402
import imagenet  # noqa: E402
import train  # noqa: E402

SIZES = [(32, 48), (40, 32), (24, 30), (64, 33)]
CLASSES = 4


def pictures(count, seed):
    """Pictures of several sizes, each of one color."""
    colors = np.random.default_rng(seed).integers(0, 256, (count, 3), "uint8")
    for row, color in enumerate(colors):
        image = np.full((*SIZES[row % len(SIZES)], 3), color)
        label = row % CLASSES
        yield row, {"image": image, "label": label, "file_name": f"{row}.JPEG"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where tensorflow-datasets keeps `tiny_imagenet`."""

    class TinyImagenet(tfds.core.GeneratorBasedBuilder):
        name = "tiny_imagenet"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(num_classes=CLASSES),
                "file_name": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                disable_shuffling=True,
            )

        def _split_generators(self, manager):
            # As in ImageNet, nobody knows what the test images show.
            unknown = ((k, {**e, "label": -1}) for k, e in pictures(4, seed=2))
            train = self._generate_examples()
            return {"train": train, "validation": pictures(6, seed=1), "test": unknown}

        def _generate_examples(self):
            yield from pictures(20, seed=0)

    path = tmp_path_factory.mktemp("tfds")
    TinyImagenet(data_dir=path).download_and_prepare()
    return path


@pytest.fixture
def tiny(folder):
    return imagenet.load(
        "tiny_imagenet", 4, folder, image_size=28, validation=0.2, seed=3
    )


def epoch(tiny, number):
    tiny.follow.on_epoch_begin(number, {})
    batches = list(tiny.train[0].as_numpy_iterator())
    assert len(batches) == len(tiny.train[0])
    return [np.concatenate(part) for part in zip(*batches, strict=True)]


def test_evaluation_sees_the_center_of_the_resized_image(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), "uint8")
    # Of 28 pixels is what 224 are of 256: this image needs no resizing.
    picture = tf.io.decode_jpeg(tf.io.encode_jpeg(pixels, quality=100)).numpy()
    center = imagenet.center_crop(28)(picture)
    np.testing.assert_array_equal(center, picture[2:30, 10:38])
    tall = np.repeat(np.repeat(picture[:, :32], 3, 0), 2, 1)
    assert imagenet.center_crop(28)(tall).shape == (28, 28, 3)


def test_every_set_is_what_it_should_be(tiny):
    assert (tiny.classes, tiny.image_shape, tiny.count) == (CLASSES, (28, 28, 3), 16)
    # Pictures of one color stay so, standardized, whatever is cut out of them.
    for (dataset, _), source, rows in [
        (tiny.train, pictures(20, seed=0), range(16)),
        (tiny.validation, pictures(20, seed=0), range(16, 20)),
        (tiny.test, pictures(6, seed=1), range(6)),
    ]:
        kept = [example for row, example in source if row in rows]
        batches = list(dataset.as_numpy_iterator())
        x, y = (np.concatenate(part) for part in zip(*batches, strict=True))
        assert x.dtype == "float32" and x.shape == (len(kept), 28, 28, 3)
        np.testing.assert_allclose(x, x[:, :1, :1] + 0 * x, atol=1e-4)
        colors = np.array([example["image"][0, 0] for example in kept]) / 255
        expected = (colors - imagenet.MEAN) / imagenet.DEVIATION
        found = x[:, 0, 0]
        distances = np.abs(found[:, None] - expected[None]).max(-1)
        nearest = distances.argmin(1)
        assert distances.min(1).max() < 0.05  # JPEG
        assert sorted(nearest) == list(range(len(kept)))
        np.testing.assert_array_equal(y, [kept[i]["label"] for i in nearest])


def test_an_epoch_is_a_function_of_the_seed_and_its_number(folder, tiny):
    first, second = epoch(tiny, 0), epoch(tiny, 1)
    for a, b in zip(first, epoch(tiny, 0), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[1], second[1])
    other = imagenet.load(
        "tiny_imagenet", 4, folder, image_size=28, validation=0.2, seed=4
    )
    assert not np.array_equal(epoch(other, 0)[1], first[1])


def test_training_sees_random_parts_of_the_image():
    ramp = np.broadcast_to(np.arange(64.0)[:, None], (40, 64, 1)).swapaxes(0, 1)
    image = tf.constant(np.repeat(ramp.copy(), 3, -1), tf.uint8)  # rows tell the place
    parts = np.array(
        [imagenet.random_resized_crop(image, 8, [0, i]) for i in range(200)]
    )
    assert parts.shape == (200, 8, 8, 3)
    extent = parts[:, -1, 0, 0] - parts[:, 0, 0, 0]  # of 7/8 of the part
    assert extent.min() < 20 and extent.max() > 40
    column = tf.transpose(image, (1, 0, 2))
    ahead = [imagenet.random_resized_crop(column, 8, [0, i])[0] for i in range(200)]
    mirrored = np.mean([part[0, 0] > part[-1, 0] for part in np.array(ahead)])
    assert 0.35 < mirrored < 0.65


def run_recipe(folder, output, *arguments):
    command = [
        "--recipe=ltp_mobilenetv2_imagenet",
        *("--dataset=tiny_imagenet", f"--data_dir={folder}", f"--output={output}"),
        *("--weights=", "--batch_size=8", "--finetune_epochs=1", "--verbose=0"),
    ]
    with flagsaver.flagsaver():
        flags.FLAGS(["train.py", *command, *arguments])
        train.main([])


@pytest.mark.parametrize(
    ("network", "size", "rate"),
    [
        ("lenet_300_100", 16, 1e-2),
        # Pictures of one color have no variance to normalize: at 1e-2 it diverges.
        pytest.param("MobileNetV2", 32, 1e-4, marks=pytest.mark.slow),
    ],
)
def test_a_recipe_trains_on_it(folder, tmp_path, network, size, rate):
    sized = [f"--model={network}", f"--image_size={size}", "--recalibrate"]
    length = [f"--learning_rate={rate}", "--epochs=4"]
    with pytest.warns(UserWarning, match="thresholds are shifted at once"):
        run_recipe(folder, tmp_path, *sized, *length)  # few steps lead nowhere
    results = json.loads((tmp_path / "results.jsonl").read_text())
    assert results["settings"]["l0"] == 1e-8
    assert results["sparse"]["sparsity"] == pytest.approx(1 - 1 / 1.33, abs=0.005)
    images, _ = imagenet.load("tiny_imagenet", 8, folder, image_size=size).test
    model = keras.saving.load_model(tmp_path / "sparse.keras")
    right = [
        model.predict(x, verbose=0).argmax(-1) == y
        for x, y in images.as_numpy_iterator()
    ]
    accuracy = np.mean(np.concatenate(right))
    assert results["sparse"]["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert results["sparse"]["top_5"] == 1  # there are four classes


def test_without_steering_the_sparsest_epoch_is_taken(folder, tmp_path, capsys):
    short = ["--model=lenet_300_100", "--image_size=16", "--epochs=1"]
    run_recipe(folder, tmp_path, *short, "--nosteer")
    # So short a training is not led to the sparsity that the recipe wants.
    assert "No epoch has --sparsity=0.248" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.jsonl").read_text())
    assert results["sparse"]["sparsity"] < 0.248


def test_statistics_are_those_of_the_first_epoch_whichever_came_last(tiny):
    first = [batch for batch, _ in tiny.for_statistics(4).as_numpy_iterator()]
    tiny.follow.on_epoch_begin(5, {})
    again = [batch for batch, _ in tiny.for_statistics(4).as_numpy_iterator()]
    np.testing.assert_array_equal(np.concatenate(again), np.concatenate(first))
    few = [batch for batch, _ in tiny.for_statistics(4, 5).as_numpy_iterator()]
    np.testing.assert_array_equal(np.concatenate(few), np.concatenate(first)[:8])
    np.testing.assert_array_equal(np.concatenate(first), epoch(tiny, 0)[0])


def test_a_set_that_is_not_there_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="(?s)`imagenet2012` is not there.*by hand"):
        imagenet.load("imagenet2012", 4, tmp_path)
    with pytest.raises(ValueError, match="(?s)could not be downloaded.*ILSVRC2012"):
        imagenet.load("imagenet2012", 4, tmp_path, download=True)


def test_arrays_are_cropped_and_mirrored():
    image = np.arange(1.0, 13).reshape(3, 4, 1)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    cuts = [padded[i : i + 3, j : j + 4] for i in range(3) for j in range(3)]
    cuts = np.array([*cuts, *(cut[:, ::-1] for cut in cuts)])
    images = np.repeat(image[None], 500, 0)
    drawn = data.crop_and_flip(images, np.random.default_rng(0), padding=1)
    match = (drawn[:, None] == cuts[None]).all((2, 3, 4))
    assert (match.sum(1) == 1).all()
    assert match.any(0).all()
