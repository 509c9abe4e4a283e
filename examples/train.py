"""Trains an image classifier, prunes it, and compares it with the dense one.

Without any flag: a small convolutional network on scikit-learn's handwritten
digits, pruned by LTP. `--helpshort` lists the other methods, networks and settings.
"""

import functools
import json
import math
import pathlib
import re
import sys
import tempfile
import time

import data as data_sets
import devices
import imagenet
import keras
import models
import provenance
import recipes
import settings
from absl import app, flags, logging

import keras_sparsity as ks
from keras_sparsity.replicas import is_chief

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(devices)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

flags.DEFINE_enum(
    "method",
    "ltp",
    ["ltp", "halo", "l1", "magnitude", "dense"],
    "How to find the weights that are not needed. dense: train as usual.",
)
flags.DEFINE_enum(
    "recipe",
    None,
    list(recipes.RECIPES),
    "A published experiment: its settings are the defaults of the other flags.",
)
flags.DEFINE_string(
    "model",
    "small_cnn",
    f"Network to train: {', '.join(models.NETWORKS)}, or keras_cv/ and a preset of "
    "keras-cv.",
)
flags.DEFINE_string(
    "weights",
    None,
    "Weights to start from: a .keras or .weights.h5 file of the same network, or "
    "imagenet for those that Keras or keras-cv has. Default: new ones.",
)
flags.DEFINE_string(
    "filters", None, "Regular expression on the names of the layers to make sparse."
)
flags.DEFINE_float(
    "sparsity",
    None,
    "Part of the kernel weights to make zero, in [0, 1). Default: with ltp what l0 "
    "leads to, 0.9 with halo, l1 and magnitude, no pruning with dense. With ltp, the "
    "best epoch that has at least this sparsity is taken, or the last with --steer.",
)
flags.DEFINE_bool(
    "steer",
    False,
    "Lead ltp or halo to --sparsity: l0, or xi and psi, are only where it begins.",
)
flags.DEFINE_list(
    "curve",
    [],
    "Sparsities, such as 0.9,0.95,0.99. Reports the test accuracy after one global "
    "prune to each, without fine-tuning.",
)
flags.DEFINE_string(
    "output", None, "Directory to write to. Default: runs/<dataset>-<model>-<method>."
)
flags.DEFINE_bool(
    "resume",
    False,
    "Keep the state of the training in the output directory, and go on from it: the "
    "same command again finishes a run that was killed. Settings that lead to another "
    "result are refused.",
)

flags.DEFINE_string(
    "dataset",
    "digits",
    "digits, or an image classification data set of tensorflow-datasets.",
)
flags.DEFINE_string("data_dir", None, "Where tensorflow-datasets keeps its data.")
flags.DEFINE_bool("download", False, "Let tensorflow-datasets download the data set.")
flags.DEFINE_integer(
    "image_size", None, "Height and width to resize images to.", lower_bound=1
)
flags.DEFINE_enum(
    "augment",
    "none",
    ["none", "crop_flip", "random_resized_crop"],
    "What is done to training images: the standard of CIFAR, or that of ImageNet, "
    "whose images are read from disk while the model trains.",
)
flags.DEFINE_float(
    "validation_split", 0.1, "Part of the training images held out, in (0, 1)."
)
flags.DEFINE_integer(
    "images", None, "Train with so many images of the others at most.", lower_bound=1
)

flags.DEFINE_integer("epochs", 30, "Epochs with the method.", lower_bound=1)
flags.DEFINE_integer(
    "pretrain_epochs",
    None,
    "Epochs of dense training before. Default: 10 with ltp and magnitude, which start "
    "from a dense network, 0 with the others.",
    lower_bound=0,
)
flags.DEFINE_integer(
    "finetune_epochs", 0, "Epochs after, with the zeros kept.", lower_bound=0
)
flags.DEFINE_integer("batch_size", 32, "Images per step.", lower_bound=1)
flags.DEFINE_enum(
    "optimizer", "sgd", ["sgd", "adam", "adamw"], "Optimizer of the weights."
)
flags.DEFINE_float(
    "learning_rate",
    0.05,
    "Learning rate at the start of each phase (dense training, method, fine-tuning).",
    lower_bound=0,
)
flags.DEFINE_enum(
    "schedule",
    "steps",
    ["steps", "cosine"],
    "How each phase lowers the learning rate: at --drops, or along a cosine to zero.",
)
flags.DEFINE_list(
    "drops",
    ["0.5", "0.75"],
    "Where in each phase steps divides the learning rate by 10, as parts of it.",
)
flags.DEFINE_float(
    "momentum", 0.9, "Momentum of sgd, everywhere.", lower_bound=0, upper_bound=1
)
flags.DEFINE_float("weight_decay", 0, "Weight decay of the weights.", lower_bound=0)
flags.DEFINE_integer("seed", 0, "Seed of everything that is random.")
flags.DEFINE_enum(
    "precision",
    "float32",
    ["float32", "mixed_bfloat16", "mixed_float16"],
    "Keras dtype policy.",
)
flags.DEFINE_enum(
    "jit_compile", "auto", ["auto", "true", "false"], "Whether to compile with XLA."
)
flags.DEFINE_enum(
    "verbose", "1", ["0", "1", "2"], "Keras progress: none, bars, or lines."
)

flags.DEFINE_float("l0", 3e-5, "LTP: the price of one weight.", lower_bound=0)
flags.DEFINE_float("temperature", 1e-2, "LTP: softness of the gate, > 0.")
flags.DEFINE_float("initial_threshold", 0, "LTP: first threshold.", lower_bound=0)
flags.DEFINE_enum(
    "threshold_units", "variance", ["variance", "absolute"], "LTP: its units."
)
flags.DEFINE_float("xi", 3e-7, "HALO: the pull on the weights.", lower_bound=0)
flags.DEFINE_float("psi", 5e-4, "HALO: the pull on the scales.", lower_bound=0)
flags.DEFINE_float("scale_decay", 0, "HALO: decay of the scales.", lower_bound=0)
flags.DEFINE_float("l1", 1e-4, "L1: the pull on the weights.", lower_bound=0)
flags.DEFINE_float(
    "multiplier",
    1,
    "Learning rate of thresholds and scales over that of the weights, > 0.",
)
flags.DEFINE_enum(
    "sparsity_optimizer", "sgd", ["sgd", "adam"], "Optimizer of thresholds and scales."
)

flags.register_validator(
    "sparsity", lambda value: value is None or 0 <= value < 1, "must be in [0, 1)"
)
for name in ("curve", "drops"):
    flags.register_validator(
        name,
        lambda values: all(re.fullmatch(r"0?\.\d+|0", value) for value in values),
        "must be numbers in [0, 1), such as 0.9",
    )
flags.register_validator(
    "model",
    models.is_known,
    f"must be one of {', '.join(models.NETWORKS)}, or keras_cv/PRESET",
)
flags.register_validator(
    "validation_split", lambda value: 0 < value < 1, "must be in (0, 1)"
)
for name in ("temperature", "multiplier"):
    flags.register_validator(name, lambda value: value > 0, "must be > 0")
flags.register_multi_flags_validator(
    ["steer", "method", "sparsity"],
    lambda values: (
        not values["steer"]
        or (values["method"] in ("ltp", "halo") and values["sparsity"])
    ),
    "--steer leads ltp or halo to a --sparsity above 0: give both",
)


def main(argv):
    del argv
    fill_defaults()
    with devices.scope():
        run()


def run():
    began = time.monotonic()
    keras.utils.set_random_seed(FLAGS.seed)
    keras.config.set_dtype_policy(FLAGS.precision)
    try:
        data = load()
        model = models.build(FLAGS.model, data.image_shape, data.classes, FLAGS.weights)
    except (ImportError, ValueError, RuntimeError) as error:
        sys.exit(f"{error}")  # it says what is missing, and what to do
    output = pathlib.Path(FLAGS.output)
    together = FLAGS.resume or FLAGS.strategy == "multi_worker"
    trails = output if together else output / time.strftime("%Y%m%d-%H%M%S")
    if not is_chief(model):
        # Workers compute everything together, and the first one's files are kept.
        FLAGS.verbose = "0"
        scratch = tempfile.TemporaryDirectory()
        output = pathlib.Path(scratch.name)
    output.mkdir(parents=True, exist_ok=True)
    if together:
        shares = devices.shares(FLAGS.batch_size)
        decided = flag_values() | {"devices": shares}
        settings.claim(trails, decided, model, FLAGS.resume)

    if FLAGS.pretrain_epochs:
        fit(model, data, FLAGS.pretrain_epochs, "dense training", trails / "dense")
    dense = ks.finalize(model)  # a copy
    if FLAGS.method != "dense":
        steps = step_count(data, FLAGS.epochs)
        model = ks.sparsify(model, method(steps), FLAGS.filters)
    phase = f"method {FLAGS.method}"
    target = [ks.SparsityTarget(FLAGS.sparsity)] if FLAGS.steer else []
    fit(model, data, FLAGS.epochs, phase, trails / "trail", "pareto", target)
    sparse = pick(model, trails / "trail")
    if FLAGS.finetune_epochs:
        sparse = ks.sparsify(sparse, ks.KeepZeros)
        fit(sparse, data, FLAGS.finetune_epochs, "fine-tuning", trails / "finetune")
        sparse = ks.finalize(sparse)

    # Every choice is made. Now, and only now, the test images.
    if FLAGS.pretrain_epochs:
        results = {"dense": measure(dense, data, output / "dense.keras")}
    else:
        unpruned = ks.finalize(model)
        results = {"unpruned": measure(unpruned, data, output / "unpruned.keras")}
    results["sparse"] = measure(sparse, data, output / "sparse.keras")
    curve = [float(sparsity) for sparsity in FLAGS.curve]
    if curve:
        results["curve"] = ks.pruning_curve(model, *data.test, curve, FLAGS.batch_size)
    if not is_chief(model):
        return

    ks.Trail(trails / "trail").plot(output / "trail.png")
    record(output / "results.jsonl", results, time.monotonic() - began)
    print(f"\n{ks.report(sparse)}\n")
    print_table(results)
    folder = (trails / "trail").relative_to(output)
    written = f"sparse.keras (plain Keras), {folder}/, trail.png, results.jsonl"
    print(f"\nWritten to {output}/: {written}")


def load():
    """The data set, read as `--augment` needs it."""
    arguments = {
        "data_dir": FLAGS.data_dir,
        "download": FLAGS.download,
        "image_size": FLAGS.image_size,
        "validation": FLAGS.validation_split,
        "seed": FLAGS.seed,
    }
    if FLAGS.augment == "random_resized_crop":
        if FLAGS.images:
            raise app.UsageError(
                "--images must not be given with --augment=random_resized_crop, which "
                f"reads all images from disk. Received: --images={FLAGS.images}"
            )
        multiple = devices.shares(FLAGS.batch_size)
        return imagenet.load(
            FLAGS.dataset, FLAGS.batch_size, multiple=multiple, **arguments
        )
    data = data_sets.load(FLAGS.dataset, **arguments, count=FLAGS.images)
    return devices.shared_out(data, FLAGS.batch_size)


def fill_defaults():
    """Gives a value to the flags whose default depends on other flags."""
    if FLAGS.recipe:
        for name, value in recipes.RECIPES[FLAGS.recipe].settings.items():
            FLAGS.set_default(name, value)  # what the command says stays
        print(recipes.describe(FLAGS.recipe, lambda name: FLAGS[name].value))
    from_dense = FLAGS.method in ("ltp", "magnitude")
    by_magnitude = FLAGS.method in ("halo", "l1", "magnitude")
    model = pathlib.Path(FLAGS.model).name
    defaults = {
        "output": f"runs/{FLAGS.dataset}-{model}-{FLAGS.method}",
        "pretrain_epochs": 10 if from_dense else 0,
        "sparsity": 0.9 if by_magnitude else None,
    }
    for name, value in defaults.items():
        if FLAGS[name].value is None:
            FLAGS[name].value = value


def flag_values():
    """The values of all flags of this script, by name."""
    key_flags = FLAGS.get_key_flags_for_module(sys.modules[__name__])
    return {flag.name: flag.value for flag in key_flags}


def step_count(data, epochs):
    return epochs * math.ceil(data.count / FLAGS.batch_size)


def fit(model, data, epochs, phase, trail, keep="none", callbacks=()):
    """Compiles and trains `model`; the schedule spans exactly these epochs."""
    if is_chief(model):
        print(f"\n{phase.capitalize()}: {epochs} epochs")
    total, rate = step_count(data, epochs), FLAGS.learning_rate
    schedules = keras.optimizers.schedules
    if FLAGS.schedule == "cosine":
        schedule = schedules.CosineDecay(rate, total)
    else:
        ends = [int(total * float(part)) for part in (*FLAGS.drops, 1)]
        rates = [rate / 10**drops for drops in range(len(ends) + 1)]
        schedule = schedules.PiecewiseConstantDecay(ends, rates)
    optimizers = {
        "sgd": functools.partial(keras.optimizers.SGD, momentum=FLAGS.momentum),
        "adam": keras.optimizers.Adam,
        "adamw": keras.optimizers.AdamW,
    }
    optimizer = optimizers[FLAGS.optimizer](
        schedule, weight_decay=FLAGS.weight_decay or None
    )
    sparsity_optimizer = optimizers[FLAGS.sparsity_optimizer]()
    model.compile(
        ks.SparsityOptimizer(optimizer, sparsity_optimizer, FLAGS.multiplier),
        LOSS,
        metrics=["accuracy"],
        jit_compile={"true": True, "false": False}.get(FLAGS.jit_compile, "auto"),
    )
    callbacks = [*callbacks, ks.SparsityTrail(trail, keep=keep, resume=FLAGS.resume)]
    arguments = {
        "epochs": epochs,
        "validation_data": data.validation,
        "verbose": int(FLAGS.verbose),
    }
    batch_size = FLAGS.batch_size
    if data.follow:
        x, _ = data.train
        follow = data.follow
    elif keras.backend.backend() == "tensorflow" or FLAGS.augment != "none":
        # TensorFlow's own order of arrays cannot be taken up again after a kill.
        augment = data_sets.crop_and_flip if FLAGS.augment == "crop_flip" else None
        x = data_sets.Batches(*data.train, batch_size, FLAGS.seed, augment)
        follow = x.follow
    else:
        model.fit(*data.train, batch_size, callbacks=callbacks, **arguments)
        return
    model.fit(x, callbacks=[follow, *callbacks], shuffle=False, **arguments)


def method(steps):
    """What `ks.sparsify` puts in place: a regularizer, or a wrapper of layers."""
    match FLAGS.method:
        case "ltp":
            return functools.partial(
                ks.LTP,
                l0=FLAGS.l0,
                temperature=FLAGS.temperature,
                initial_threshold=FLAGS.initial_threshold,
                threshold_units=FLAGS.threshold_units,
            )
        case "halo":
            return ks.HALO(FLAGS.xi, FLAGS.psi, FLAGS.scale_decay)
        case "l1":
            return keras.regularizers.L1(FLAGS.l1)
        case "magnitude":
            # The last quarter of the steps is for recovering.
            schedule = ks.CubicSparsity(
                FLAGS.sparsity,
                end_step=max(1, steps * 3 // 4),
                frequency=max(1, steps // 100),
            )
            return functools.partial(ks.MagnitudePruning, schedule=schedule)


def pick(model, trail):
    """The plain sparse model: from the trail, or by a global magnitude prune."""
    if FLAGS.sparsity is None or (FLAGS.steer and FLAGS.method == "ltp"):
        return ks.finalize(model)
    if FLAGS.method == "ltp":
        return ks.Trail(trail).select(min_sparsity=FLAGS.sparsity).load()
    return ks.prune(model, FLAGS.sparsity)


def measure(model, data, path):
    """Saves `model` and says how good and how large it is."""
    model.save(path)
    top_5 = keras.metrics.SparseTopKCategoricalAccuracy(
        min(5, data.classes), name="top_5"
    )
    model.compile(loss=LOSS, metrics=["accuracy", top_5])
    scores = model.evaluate(*data.test, FLAGS.batch_size, verbose=0, return_dict=True)
    report = ks.report(model)
    return {
        "accuracy": scores["accuracy"],
        "top_5": scores["top_5"],
        "sparsity": report.sparsity,
        "macs": report.effective_macs,
        "bytes": path.stat().st_size,
        "compressed_bytes": report.compressed_bytes,
    }


def record(path, results, seconds):
    """Appends one line: what was asked for, with which versions, what came out."""
    entry = {
        **provenance.provenance(),
        "settings": flag_values(),
        "seconds": round(seconds, 1),
        **results,
    }
    with path.open("a") as file:
        print(json.dumps(entry), file=file)


def print_table(results):
    columns = ("accuracy", "zeros", "MACs", "bytes on disk", "compressed")
    print(" " * 10 + "".join(f"{column:>15}" for column in columns))
    for label in [label for label in results if label != "curve"]:
        row = results[label]
        macs = "unknown" if row["macs"] is None else f"{row['macs']:,}"
        print(
            f"{label:10}{row['accuracy']:15.2%}{row['sparsity']:15.2%}"
            f"{macs:>15}{row['bytes']:15,}{row['compressed_bytes']:15,}"
        )
    for point in results.get("curve", []):
        print(f"pruned to {point['sparsity']:.2%}: accuracy {point['accuracy']:.2%}")


if __name__ == "__main__":
    FLAGS.set_default("verbosity", logging.WARNING)  # libraries log through absl
    app.run(main)
