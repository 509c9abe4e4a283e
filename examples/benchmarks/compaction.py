"""What `compact` gains: units, parameters, MACs and inference time, paired.

    python examples/benchmarks/compaction.py --prune=0.9,0.95 runs/halo/unpruned.keras
    python examples/benchmarks/compaction.py runs/ltp/sparse.keras

The inputs are random, since neither the time nor the difference of the outputs depends
on them. Both models take turns in one process, so that whatever else the machine does
meets them alike; a time is the median of the rounds, as is the ratio of those of a
round. TensorFlow and JAX run a compiled function, torch runs eagerly.
"""

import json
import statistics

import keras
import machine
import numpy as np
from absl import app, flags
from keras import ops

import keras_sparsity as ks
from keras_sparsity.timing import inference, paired_medians

FLAGS = flags.FLAGS

flags.DEFINE_list("prune", [], "Sparsities to prune to first. Default: as it is.")
flags.DEFINE_list("batch_size", ["1", "256"], "Images at a time.")
flags.DEFINE_integer("rounds", 7, "Rounds of which to take the median.", lower_bound=1)


def main(argv):
    _, *paths = argv
    if not paths:
        raise app.UsageError("Give the `.keras` files of the models.")
    print(json.dumps(machine.setting()))
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
        x = ops.cast(generator.uniform(size=(size, *shape)), "float32")
        runs = [inference(m, x) for m in (model, small)]
        expected, outputs = (run() for run in runs)
        row["difference"] = float(abs(outputs - expected).max())
        rounds = [paired_medians(runs) for _ in range(FLAGS.rounds)]
        row[f"ms at {size}"] = np.round(1e3 * np.median(rounds, axis=0), 4).tolist()
        ratio = statistics.median(slow / fast for slow, fast in rounds)
        row[f"faster at {size}"] = round(ratio, 3)
    return row


def units(model):
    """How many units each layer with a kernel has, without the outputs."""
    *hidden, _ = [layer for layer in model.layers if hasattr(layer, "kernel")]
    return "-".join(str(layer.kernel.shape[-1]) for layer in hidden)


if __name__ == "__main__":
    app.run(main)
