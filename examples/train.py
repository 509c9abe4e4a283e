"""Trains an image classifier, prunes it, and compares it with the dense one.

Without any flag: a small convolutional network on scikit-learn's handwritten
digits, pruned by LTP. `--helpshort` lists the other methods, networks and settings.
"""

import functools
import json
import math
import pathlib
import sys
import tempfile
import time

import data as data_sets
import denormals
import devices
import imagenet
import keras
import methods
import models
import provenance
import settings
import train_flags
from absl import app, flags, logging

import keras_sparsity as ks
from keras_sparsity.replicas import is_chief

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(train_flags)


def main(argv):
    del argv
    train_flags.fill_defaults()
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
        decided = train_flags.values() | {"devices": shares}
        settings.claim(trails, decided, model, FLAGS.resume)

    if FLAGS.pretrain_epochs:
        fit(model, data, FLAGS.pretrain_epochs, "dense training", trails / "dense")
    dense = ks.finalize(model)  # a copy
    if FLAGS.method != "dense":
        steps = step_count(data, FLAGS.epochs)
        model = ks.sparsify(model, method(steps), FLAGS.filters)
    phase = f"method {FLAGS.method}"
    target = []
    if FLAGS.steer:
        target = methods.steered(FLAGS.sparsity, None, FLAGS.finetune_epochs)
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
    results["sparse"] |= methods.led_to(target)
    curve = [float(sparsity) for sparsity in FLAGS.curve]
    if curve:
        calibration_data = None
        if FLAGS.recalibrate:
            calibration_data = data.for_statistics(FLAGS.batch_size)
        results["curve"] = ks.pruning_curve(
            model, *data.test, curve, FLAGS.batch_size, calibration_data
        )
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
        if not data_sets.is_of_tfds(FLAGS.dataset):
            raise app.UsageError(
                "--augment=random_resized_crop reads a data set of tensorflow-datasets "
                f"from disk. Received: --dataset={FLAGS.dataset}"
            )
        multiple = devices.shares(FLAGS.batch_size)
        return imagenet.load(
            FLAGS.dataset, FLAGS.batch_size, multiple=multiple, **arguments
        )
    data = data_sets.load(FLAGS.dataset, **arguments, count=FLAGS.images)
    return devices.shared_out(data, FLAGS.batch_size)


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
        methods.LOSS,
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
            return methods.gradual(FLAGS.sparsity, steps)


def pick(model, trail):
    """The plain sparse model: from the trail, or by a global magnitude prune."""
    if FLAGS.sparsity is None or (FLAGS.steer and FLAGS.method == "ltp"):
        return ks.finalize(model)
    if FLAGS.method == "ltp":
        recorded = ks.Trail(trail)
        sparsest = max(p.sparsity for p in recorded.points if p.path.exists())
        if sparsest < FLAGS.sparsity and is_chief(model):
            print(
                f"\nNo epoch has --sparsity={FLAGS.sparsity:g}: the sparsest, with "
                f"{sparsest:.2%}, is taken. A larger --l0 leads further, or --steer."
            )
        return recorded.select(min_sparsity=min(sparsest, FLAGS.sparsity)).load()
    return ks.prune(model, FLAGS.sparsity)


def measure(model, data, path):
    """Saves `model` and says how good and how large it is."""
    if FLAGS.recalibrate:
        inputs = data.for_statistics(FLAGS.batch_size)
        ks.recalibrate(model, inputs, FLAGS.batch_size)
    model.save(path)
    top_5 = keras.metrics.SparseTopKCategoricalAccuracy(
        min(5, data.classes), name="top_5"
    )
    model.compile(loss=methods.LOSS, metrics=["accuracy", top_5])
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
        "settings": train_flags.values(),
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
    denormals.flush()
    FLAGS.set_default("verbosity", logging.WARNING)  # libraries log through absl
    app.run(main)
