"""Compares methods: the accuracy of one network at several sparsities.

    python compare.py --methods=halo,ltp --sparsities=0.9,0.95 --seeds=3

Appends a line of JSON to `--results` for every training: method, settings, seed, and
the accuracy on validation and test images at each sparsity. What has a line already is
not trained again, so the same command goes on where it was stopped. In the end it
prints a table of the lines, and draws them to `--plot`; `curves.py` does so later.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time

import curves
import data as data_sets
import denormals
import keras
import methods
import models
import provenance
import shared_flags
from absl import app, flags, logging

import keras_sparsity as ks

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(shared_flags)
flags.adopt_module_key_flags(curves)
FLAGS.set_default("model", "lenet_300_100")
FLAGS.set_default("weight_decay", 5e-3)

flags.DEFINE_list("methods", list(methods.METHODS), "What to compare.")
flags.DEFINE_string(
    "settings",
    "{}",
    "Settings to choose from, instead of those in methods.py: JSON, a list of dicts by "
    'the name of the method. For example \'{"halo": [{"xi": 1e-6, "psi": 1e-3}]}\'. '
    "Every method has three more: `multiplier`, the learning rate of its scales and "
    "thresholds over that of the weights; `pretrain`, the part of dense epochs; and "
    "`falls_from`, the part of the last phase after which the rate falls.",
)
flags.DEFINE_list("sparsities", ["0.9", "0.95", "0.98", "0.99"], "In [0, 1).")
flags.DEFINE_integer("seeds", 3, "Trainings of each kind.", lower_bound=1)
flags.DEFINE_integer("epochs", 20, "Epochs of every method in all.", lower_bound=2)
flags.DEFINE_list(
    "finetune",
    ["0", "0.2"],
    "Parts of the epochs that train the pruned network with its zeros kept; every "
    "method is run with each.",
)
flags.DEFINE_bool(
    "recalibrate",
    False,
    "Measure every pruned network with batch statistics gathered anew too.",
)
flags.DEFINE_integer("batch_size", 100, "Images per step.", lower_bound=1)
flags.DEFINE_float("learning_rate", 0.1, "At the start of each phase.", lower_bound=0)
flags.DEFINE_string(
    "results",
    "runs/compare.jsonl",
    "File to append lines to, of one comparison at a time.",
)
flags.DEFINE_integer(
    "jobs",
    None,
    "Trainings at a time. Default: one for each core; on a GPU give 1.",
    lower_bound=1,
)


def parts(values):
    """Whether `values` are a list of numbers in [0, 1), not an empty one."""
    try:
        return bool(values) and all(0 <= float(value) < 1 for value in values)
    except ValueError:
        return False


def lists_by_method(text):
    try:
        settings = json.loads(text)
    except json.JSONDecodeError:
        return False
    return (
        isinstance(settings, dict)
        and {*settings} <= {*methods.METHODS}
        and all(
            isinstance(each, list) and each and all(are_settings(one) for one in each)
            for each in settings.values()
        )
    )


def are_settings(one):
    return (
        isinstance(one, dict)
        and all(isinstance(value, (int, float)) for value in one.values())
        and parts([one.get("pretrain", 0), one.get("falls_from", 0)])
        and 0 < one.get("multiplier", 1) < math.inf
    )


flags.register_validator(
    "methods",
    lambda names: names and {*names} <= {*methods.METHODS},
    f"must be of {', '.join(methods.METHODS)}.",
)
for name in ("sparsities", "finetune"):
    flags.register_validator(name, parts, "must be numbers in [0, 1).")
flags.register_validator(
    "settings",
    lists_by_method,
    "must be JSON: lists of dicts of numbers by names of methods: "
    f"{', '.join(methods.METHODS)}; `pretrain` and `falls_from` in [0, 1), "
    "`multiplier` > 0.",
)


def main(argv):
    del argv
    shared_flags.check_finite(FLAGS.flag_values_dict())
    asked = list({curves.key(job): job for job in jobs()}.values())
    for job in asked:
        check_epochs(job)
    results = pathlib.Path(FLAGS.results)
    lines = curves.read(results)
    done = {curves.key(line) for line in lines}
    todo = [job for job in asked if curves.key(job) not in done]
    print(f"{len(lines)} trainings recorded in {results}, {len(todo)} to do")
    try:
        check(todo)
        if FLAGS.plot:
            curves.check_picture(FLAGS.plot)
        results.parent.mkdir(parents=True, exist_ok=True)
        end_last_line(results)
    except (ImportError, ValueError, RuntimeError, OSError) as error:
        sys.exit(f"{error}")  # it says what is missing, and what to do
    bar = keras.utils.Progbar(len(todo), unit_name="training")
    failed = []
    for job, outcome in outcomes(todo):
        if isinstance(outcome, Exception):  # the others are worth having all the same
            failed.append(f"{named(job)}: {outcome!r}")
        else:
            lines.append(outcome)
            with results.open("ab", buffering=0) as file:  # the line in one piece
                file.write(f"{json.dumps(outcome)}\n".encode())
        bar.add(1)
    same = {*curves.comparisons(asked)}
    for name, group in curves.comparisons(lines).items():
        if name in same:
            print(curves.table(group))
            if FLAGS.plot:
                curves.plot(group, FLAGS.plot)
    if failed:
        sys.exit("\n".join([f"{len(failed)} trainings failed:", *failed]))


def named(job):
    finetune, seed = job["finetune"], job["seed"]
    return f"{job['method']} {job['settings']} finetune={finetune:g} seed={seed}"


def check(todo):
    """Data, network and settings, before hours of training."""
    if not todo:
        return
    data = load(todo[0], FLAGS.data_dir, FLAGS.download)
    try:
        models.build(FLAGS.model, data.image_shape, data.classes)
    except ValueError as error:
        shape = data.image_shape
        raise ValueError(
            f"--model={FLAGS.model}, images of {shape}: {error}"
        ) from error
    small = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    # Once for all seeds, with and without fine-tuning: the first job of each.
    alike = {(job["method"], str(job["settings"])): job for job in reversed(todo)}
    for job in alike.values():
        method, arguments = methods.configured(
            methods.METHODS[job["method"]], job["settings"]
        )
        try:
            for target in job["sparsities"]:
                governs = method.governs(target, 1, **arguments)
                ks.sparsify(small, governs or ks.KeepZeros)
                method.callbacks(target, 1, job["finetune"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{named(job)}: {error}") from error


def outcomes(todo):
    """Each of the jobs with its line, or with its error, as they come."""
    with pool(min(FLAGS.jobs or provenance.cores(), len(todo) or 1)) as executor:
        futures = {executor.submit(train, job, FLAGS.data_dir): job for job in todo}
        try:
            for future in concurrent.futures.as_completed(futures):
                error = future.exception()
                if isinstance(error, concurrent.futures.process.BrokenProcessPool):
                    sys.exit(
                        "A process that trains was killed, perhaps for want of memory. "
                        "What is recorded is whole, and the same command does the "
                        "rest: with --jobs=1 it takes the least memory."
                    )
                yield futures[future], error or future.result()
        except BaseException:
            # Or the pool would do all that is left before it closes.
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def check_epochs(job):
    method, _ = methods.configured(methods.METHODS[job["method"]], job["settings"])
    _, epochs, after = methods.phases(method, job["epochs"], job["finetune"])
    if epochs < 1 or (job["finetune"] and not after):
        raise app.UsageError(
            f"--finetune must leave epochs to {job['method']}, which takes "
            f"{method.pretrain:.0%} of them to begin with (`pretrain`), and take one "
            f"itself. Received: --finetune={job['finetune']} --epochs={job['epochs']}"
        )


def end_last_line(path):
    """A line that a stop has cut must not swallow the next one."""
    with path.open("a") as file:  # before hours of training, not after
        text = path.read_bytes()
        if text and not text.endswith(b"\n"):
            file.write("\n")


def jobs():
    """All the trainings asked for, the first seed's first."""
    conditions = {"backend": keras.backend.backend()}
    conditions |= {
        name: FLAGS[name].value
        for name in ("model", "dataset", "validation_split", "epochs", "batch_size")
        + ("learning_rate", "momentum", "weight_decay", "recalibrate")
    }
    for name in ("images", "image_size", "precision"):
        if FLAGS[name].value != FLAGS[name].default:  # older lines do not name them
            conditions[name] = FLAGS[name].value
    sparsities = [float(value) for value in FLAGS.sparsities]
    chosen = json.loads(FLAGS.settings)
    for seed, finetune, name in itertools.product(
        range(FLAGS.seeds), map(float, FLAGS.finetune), FLAGS.methods
    ):
        for settings in chosen.get(name, methods.METHODS[name].settings):
            yield {
                **conditions,
                "method": name,
                "settings": settings,
                "finetune": finetune,
                "seed": seed,
                "sparsities": sparsities,
            }


def pool(processes):
    """Processes that share the cores, each with Keras and a data set of its own."""
    threads = max(1, provenance.cores() // processes)
    # Read when a backend is imported, which the processes have before them.
    os.environ["OMP_NUM_THREADS"] = os.environ["TF_NUM_INTRAOP_THREADS"] = str(threads)
    if threads == 1:
        own = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{own} --xla_cpu_multi_thread_eigen=false".strip()
    # Without `max_tasks_per_child`, with which Python 3.11 waits for ever.
    spawn = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(processes, spawn, end_with_parent)


def end_with_parent():
    """A comparison that is killed or interrupted leaves no training behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def train(job, data_dir):
    """Does one of `jobs()`: its line for the results."""
    began = time.monotonic()
    denormals.flush()
    keras.utils.clear_session()  # or all that was compiled before stays in memory
    keras.config.set_dtype_policy(job.get("precision", "float32"))
    data = load(job, data_dir)
    method = methods.METHODS[job["method"]]
    fields = [field.name for field in dataclasses.fields(methods.Training)]
    training = methods.Training(**{name: job[name] for name in fields})

    def network():
        keras.utils.set_random_seed(job["seed"])
        return models.build(job["model"], data.image_shape, data.classes)

    points = methods.curve(
        network, data, method, job["settings"], job["sparsities"], training
    )
    return {
        "format": curves.FORMAT,
        **job,
        "curve": points,
        "seconds": round(time.monotonic() - began, 1),
        **provenance.provenance(),
    }


def load(job, data_dir, download=False):
    """The data set of one of `jobs()`: the same for all of them."""
    return cached(
        job["dataset"],
        data_dir=data_dir,
        download=download,
        validation=job["validation_split"],
        count=job.get("images"),
        image_size=job.get("image_size"),
    )


cached = functools.lru_cache(1)(data_sets.load)


if __name__ == "__main__":
    FLAGS.set_default("verbosity", logging.WARNING)  # libraries log through absl
    app.run(main)
