"""The flags of `train.py`."""

import pathlib
import re
import sys

import devices
import recipes
import shared_flags
from absl import app, flags

FLAGS = flags.FLAGS
for module in (shared_flags, devices):
    flags.adopt_module_key_flags(module)

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
    "best epoch that has at least this sparsity is taken, or else the sparsest, or the "
    "last with --steer.",
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

flags.DEFINE_enum(
    "augment",
    "none",
    ["none", "crop_flip", "random_resized_crop"],
    "What is done to training images: the standard of CIFAR, or that of ImageNet, "
    "whose images are read from disk while the model trains.",
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
flags.DEFINE_bool(
    "recalibrate",
    False,
    "Gather batch statistics anew, of 10,000 training images, when training has ended, "
    "before networks are measured and saved: after a prune, or a short training with a "
    "momentum of 0.999, they are far off. The trail keeps those of its epochs.",
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
flags.DEFINE_integer("seed", 0, "Seed of everything that is random.")
flags.DEFINE_enum(
    "jit_compile", "auto", ["auto", "true", "false"], "Whether to compile with XLA."
)
flags.DEFINE_enum(
    "verbose", "1", ["0", "1", "2"], "Keras progress: none, bars, or lines."
)

# Of the digits, whose small network has fewer weights than most; LTP's own is 1e-6.
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
    "drops",
    lambda values: sorted(values, key=float) == values,
    "must rise, as 0.5,0.75 do",
)
for name in ("temperature", "multiplier"):
    flags.register_validator(name, lambda value: value > 0, "must be > 0")


def fill_defaults():
    """Gives a value to the flags whose default depends on other flags."""
    if FLAGS.recipe:
        for name, value in recipes.RECIPES[FLAGS.recipe].settings.items():
            FLAGS.set_default(name, value)  # what the command says stays
        print(recipes.describe(FLAGS.recipe, lambda name: FLAGS[name].value))
    shared_flags.check_finite(values())
    if FLAGS.steer and not (FLAGS.method in ("ltp", "halo") and FLAGS.sparsity):
        raise app.UsageError(
            "--steer leads ltp or halo to a --sparsity above 0: give both, or "
            f"--nosteer. Received: --method={FLAGS.method} --sparsity={FLAGS.sparsity}"
        )
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


def values():
    """The values of all these flags, by name."""
    key_flags = FLAGS.get_key_flags_for_module(sys.modules[__name__])
    return {flag.name: flag.value for flag in key_flags}
