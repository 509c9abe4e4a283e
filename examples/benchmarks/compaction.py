"""What `compact` gains: units, parameters, MACs and inference time, paired.

    python examples/benchmarks/compaction.py --prune=0.9,0.95 runs/halo/unpruned.keras
    python examples/benchmarks/compaction.py runs/ltp/sparse.keras

The inputs are random, since neither the time nor the difference of the outputs depends
on them. Both models take turns in one process, so that whatever else the machine does
meets them alike; a time is the median of the rounds, as is the ratio of those of a
round. TensorFlow and JAX run a compiled function, torch runs eagerly.
"""

import importlib
import json
import os
import platform
import statistics
import time

import keras
import numpy as np
from absl import app, flags
from keras import ops

import keras_sparsity as ks

FLAGS = flags.FLAGS

flags.DEFINE_list("prune", [], "Sparsities to prune to first. Default: as it is.")
flags.DEFINE_list("batch_size", ["1", "256"], "Images at a time.")
flags.DEFINE_integer("rounds", 30, "Rounds of which to take the median.", lower_bound=1)


def main(argv):
    _, *paths = argv
    if not paths:
        raise app.UsageError("Give the `.keras` files of the models.")
    backend = importlib.import_module(keras.backend.backend())
    setting = {
        "backend": f"{keras.backend.backend()} {backend.__version__}",
        "keras": keras.__version__,
        "keras_sparsity": ks.__version__,
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps(setting))
    for path in paths:
        model = keras.saving.load_model(path, compile=False)
        pruned = [ks.prune(model, float(sparsity)) for sparsity in FLAGS.prune]
        for sparse in pruned or [model]:
            print(json.dumps({"path": path, **compare(sparse, ks.compact(sparse))}))


def compare(model, small):
    """A dict of pairs: of the model and of what is left of it."""
    before, after = ks.report(model), ks.report(small)
    shape = model.inputs[0].shape[1:]
    generator = np.random.default_rng(0)
    row = {
        "zeros": round(before.sparsity, 4),
        "units": [units(model), units(small)],
        "parameters": [before.parameters, after.parameters],
        "macs": [before.macs, after.macs],
        "stay": [f"{row.layer}: {row.dead}, {row.reason}" for row in after.dead_units],
    }
    for size in map(int, FLAGS.batch_size):
        x = generator.uniform(size=(size, *shape)).astype("float32")
        expected, outputs = (ops.convert_to_numpy(m(x)) for m in (model, small))
        row["difference"] = float(abs(outputs - expected).max())
        times = time_in_turns([function(m, x) for m in (model, small)])
        ratios = [one / other for one, other in zip(*times, strict=True)]
        row[f"ms at {size}"] = [round(1e3 * statistics.median(t), 4) for t in times]
        row[f"faster at {size}"] = round(statistics.median(ratios), 3)
    return row


def units(model):
    """How many units each layer with a kernel has, without the outputs."""
    *hidden, _ = [layer for layer in model.layers if hasattr(layer, "kernel")]
    return "-".join(str(layer.kernel.shape[-1]) for layer in hidden)


def function(model, x):
    """Runs the model on `x` once, and waits for the outputs."""
    x = ops.convert_to_tensor(x)
    match keras.backend.backend():
        case "jax":
            import jax

            state = [
                [variable.value for variable in variables]
                for variables in (
                    model.trainable_variables,
                    model.non_trainable_variables,
                )
            ]
            call = jax.jit(lambda *arguments: model.stateless_call(*arguments)[0])
            return lambda: call(*state, x).block_until_ready()
        case "tensorflow":
            import tensorflow as tf

            call = tf.function(lambda x: model(x, training=False))
            return lambda: call(x).numpy()
        case _:
            import torch

            call = torch.inference_mode()(lambda: model(x, training=False))
            return call


def time_in_turns(functions):
    """Seconds per call of each function in every round."""

    def seconds(function, count):
        began = time.perf_counter()
        for _ in range(count):
            function()
        return (time.perf_counter() - began) / count

    for function in functions:
        seconds(function, 3)  # compiles
    count = max(1, round(0.05 / seconds(functions[0], 10)))
    rounds = [[seconds(f, count) for f in functions] for _ in range(FLAGS.rounds)]
    return list(zip(*rounds, strict=True))


if __name__ == "__main__":
    app.run(main)
