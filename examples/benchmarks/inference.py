"""Times the inference of sparse models, accelerated and dense, paired.

    KERAS_BACKEND=torch taskset -c 0 python examples/benchmarks/inference.py

`taskset -c 0` gives it one core of a Linux machine, and so every backend one thread.

Networks of random weights, pruned to the same sparsity in every layer, are accelerated
for each batch size. The table shows each layer alone, the line below it the whole
network: calls of both models in turns in one process, as `predict` would run them, but
without its input pipeline. A ratio is of medians in the same round.
"""

import json
import pathlib
import statistics
import sys

import keras
import machine
import numpy as np
from absl import app, flags, logging
from keras import layers

import keras_sparsity as ks
from keras_sparsity.timing import inference, paired_medians

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import models  # noqa: E402

FLAGS = flags.FLAGS


def mlp():
    return keras.Sequential(
        [
            keras.Input((784,)),
            layers.Dense(4096, activation="relu"),
            layers.Dense(4096, activation="relu"),
            layers.Dense(10),
        ]
    )


def pointwise():
    """Eight convolutions of one pixel, as wide as the middle of a MobileNet."""
    model = keras.Sequential([keras.Input((14, 14, 512))])
    for _ in range(8):
        model.add(layers.Conv2D(512, 1, use_bias=False))
        model.add(layers.BatchNormalization())
        model.add(layers.ReLU())
    return model


# And the batch sizes at which to time them.
NETWORKS = {
    "mlp": (mlp, (1, 64)),
    "vgg_like": (lambda: models.build("vgg_like", (32, 32, 3), classes=10), (1, 32)),
    "pointwise": (pointwise, (1, 32)),
}

flags.DEFINE_multi_enum("network", list(NETWORKS), list(NETWORKS), "What to time.")
flags.DEFINE_multi_integer("batch_size", None, "Default: those of the network.")
flags.DEFINE_float("sparsity", 0.95, "Of every layer.")
flags.DEFINE_integer("rounds", 7, "Rounds of which to take the median.", lower_bound=1)
flags.DEFINE_bool("json", False, "Print a line of JSON too.")


def main(argv):
    del argv
    setting = machine.print_setting(sparsity=FLAGS.sparsity)
    results = [
        benchmark(network, batch_size)
        for network in FLAGS.network
        for batch_size in FLAGS.batch_size or NETWORKS[network][1]
    ]
    if FLAGS.json:
        print(json.dumps({**setting, "results": results}))


def benchmark(network, batch_size):
    """Times a network and its layers, printed as a table."""
    keras.utils.set_random_seed(0)
    dense = ks.prune(NETWORKS[network][0](), FLAGS.sparsity, scope="layer")
    fast = ks.accelerate(dense, batch_size)
    print(f"\n{network}\n{fast.acceleration}")
    x = keras.random.normal((batch_size, *dense.input_shape[1:]), seed=1)
    runs = [inference(dense, x), inference(fast, x)]
    expected, received = (run() for run in runs)
    difference = float(np.abs(received - expected).max() / np.abs(expected).max())
    rounds = [paired_medians(runs) for _ in range(FLAGS.rounds)]
    gains = [dense_seconds / seconds for dense_seconds, seconds in rounds]
    dense_ms, fast_ms = 1e3 * np.median(rounds, axis=0)
    gain = statistics.median(gains)
    print(
        f"all layers: dense {dense_ms:.3f} ms, accelerated {fast_ms:.3f} ms, gain "
        f"{gain:.2f} ({min(gains):.2f} to {max(gains):.2f} in {FLAGS.rounds} rounds), "
        f"largest difference {difference:.1e} of the largest output",
        flush=True,
    )
    return {
        "network": network,
        "batch_size": batch_size,
        "dense_ms": dense_ms,
        "accelerated_ms": fast_ms,
        "gain": gain,
        "lowest": min(gains),
        "highest": max(gains),
        "difference": difference,
        "sparse_layers": sum(row.is_sparse for row in fast.acceleration.rows),
    }


if __name__ == "__main__":
    # TensorFlow warns that every model makes a function of its own.
    FLAGS.set_default("verbosity", logging.ERROR)
    app.run(main)
