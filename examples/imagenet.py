"""The input pipeline of ImageNet, for any data set of images of several sizes.

Images are read, decoded and augmented by `tf.data` while the model trains, on every
backend. Training: a random part of 8 to 100 % of the image, resized, and mirrored half
the time. Evaluation: the shorter side resized to 256/224 of the size, and the center.
"""

import keras
import tfds_source
from data import Data

# Of the pixels of ImageNet's images, in [0, 1], per channel.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)

# Images whose files are in memory, for their order: about 1 GB of ImageNet. Those on
# disk are in a random order already.
SHUFFLED = 10_000


def load(
    name,
    batch_size,
    data_dir=None,
    download=False,
    image_size=None,
    validation=0.1,
    seed=0,
    multiple=1,
):
    """Opens a data set, and holds a validation set out of its training images.

    Tested on is its validation split, as everyone does with ImageNet, whose test
    split has no labels. The last training images that fill no batch are left out.

    Args:
        name: A data set of tensorflow-datasets, such as `"imagenet2012"`.
        batch_size: Images in a batch.
        data_dir, download, validation: See `data.load`.
        image_size: Height and width of what the network sees. Defaults to 224.
        seed: Of the order and the augmentation.
        multiple: Number of devices that share the images evenly: as many of the
            images to evaluate on as that divides are used. Defaults to 1.

    Returns:
        `Data` of `tf.data.Dataset`s. The batches of an epoch are a function of the
        seed and the epoch, if `fit` gets its callback `follow`.
    """
    builder, image, label = tfds_source.image_set(name, data_dir, download)
    import tensorflow as tf

    size = image_size or 224
    features = builder.info.features
    splits = builder.info.splits
    test = "validation" if "validation" in splits else "test"
    for split in ("train", test):
        if split not in splits:
            raise ValueError(
                f"Data set `{name}` must have a training split and one to test on. "
                f"Received the splits {', '.join(splits)}."
            )
    held_out = max(1, round(splits["train"].num_examples * validation))
    count = splits["train"].num_examples - held_out
    if count < batch_size:
        raise ValueError(
            f"Data set `{name}` must have a batch of {batch_size} images to train on. "
            f"Received {count}."
        )

    def files(split):
        import tensorflow_datasets as tfds

        return builder.as_dataset(
            split=split, decoders={image: tfds.decode.SkipDecoding()}
        )

    def decode(example):
        return features[image].decode_example(example[image])

    def batches(dataset, prepare, whole=False):
        def pair(*example):
            return standardize(prepare(*example)), example[0][label]

        dataset = dataset.map(pair, tf.data.AUTOTUNE)
        return dataset.batch(batch_size, whole).prefetch(tf.data.AUTOTUNE)

    # The number of the epoch, where the pipeline sees it.
    epoch = tf.Variable(0, dtype=tf.int64)
    examples = files(f"train[:{count}]")

    def in_order(epoch):
        # For this graph alone. At 0, TensorFlow takes no tensor for the other seed.
        tf.random.set_seed(2 * seed + 1)
        shuffled = examples.shuffle(SHUFFLED, epoch, reshuffle_each_iteration=False)
        return shuffled.enumerate().map(lambda i, example: (example, (epoch, i)))

    def augmented(example, key):
        seeds = tf.random.fold_in(tf.random.fold_in([seed, 0], key[0]), key[1])
        return random_resized_crop(decode(example), size, seeds)

    center_of = center_crop(size)

    def center(example):
        return center_of(decode(example))

    def evaluated(split, number):
        chosen = files(split).take(number // multiple * multiple)
        return batches(chosen, center), None

    training = tf.data.Dataset.from_tensors(0).map(lambda _: epoch.read_value())
    training = batches(training.flat_map(in_order), augmented, whole=True)
    steps = count // batch_size
    return Data(
        train=(training.apply(tf.data.experimental.assert_cardinality(steps)), None),
        validation=evaluated(f"train[{count}:]", held_out),
        test=evaluated(test, splits[test].num_examples),
        classes=features[label].num_classes,
        image_shape=(size, size, 3),
        count=steps * batch_size,
        follow=keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda number, logs: epoch.assign(number)
        ),
    )


def random_resized_crop(image, size, seed):
    """A random part of `image`, resized to `size` pixels, mirrored half the time."""
    import tensorflow as tf

    # Not layers of Keras: what those draw is no function of the epoch.
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.shape(image),
        tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        seed,
        min_object_covered=0,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.08, 1),
    )
    part = tf.slice(image, begin, extent)
    part = tf.image.resize(part, (size, size), antialias=True)
    return tf.image.stateless_random_flip_left_right(part, seed)


def center_crop(size):
    """A function of an image: its center, after resizing, of `size` pixels."""
    larger = round(size * 256 / 224)
    resize = keras.layers.Resizing(
        larger, larger, crop_to_aspect_ratio=True, antialias=True, dtype="float32"
    )
    crop = keras.layers.CenterCrop(size, size, dtype="float32")
    return lambda image: crop(resize(image))


def standardize(image):
    """Pixels in [0, 255], standardized as those of ImageNet."""
    return (image / 255 - MEAN) / DEVIATION
