"""Sizes of the files of sparse models, and the time to write and to read each.

    KERAS_BACKEND=tensorflow python examples/benchmarks/file_size.py
    python examples/benchmarks/file_size.py --file=runs/unpruned.keras

Every network is pruned to every sparsity by `ks.prune` and written in every form: the
file of `model.save`, the same with gzip, that of `ks.save_model`, the same archive with
other compressions, and on TensorFlow that of `ks.export_litert`. To read means
`keras.saving.load_model`, after `gunzip` where there is one. The forms take turns; the
time is the median of the rounds, and `over save` the ratio to `model.save` in a round.

The reference is what the weights need by counting: 32 bits for each that is not zero,
and the entropy of where those are. Float bits compress too, so it is no bound.
"""

import functools
import gzip
import json
import math
import pathlib
import statistics
import sys
import tempfile
import time
import zipfile
import zlib

import keras
import machine
import numpy as np
from absl import app, flags, logging

import keras_sparsity as ks
from keras_sparsity.files import read_archive, write_archive

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import models  # noqa: E402

FLAGS = flags.FLAGS

# Input shape of each network.
NETWORKS = {"lenet_300_100": (28, 28, 1), "resnet20": (32, 32, 3)}

flags.DEFINE_multi_enum("network", list(NETWORKS), list(NETWORKS), "What to prune.")
flags.DEFINE_multi_string("file", [], "Models to prune in place of new networks.")
flags.DEFINE_list("sparsities", ["0.8", "0.9", "0.95", "0.98"], "Parts of zeros.")
flags.DEFINE_integer("rounds", 5, "Rounds of which to take the median.", lower_bound=1)
flags.DEFINE_bool("layers", True, "Print a line for each weight tensor too.")
flags.DEFINE_bool("json", False, "Print a line of JSON too.")


def main(argv):
    del argv
    setting = machine.print_setting()
    keras.utils.set_random_seed(0)
    results = {}
    for name in FLAGS.file or FLAGS.network:
        if FLAGS.file:
            model = keras.saving.load_model(name, compile=False)
        else:
            model = models.build(name, NETWORKS[name], classes=10)
        for sparsity in map(float, FLAGS.sparsities):
            print(f"\n{name}, {sparsity:.0%} zeros, median of {FLAGS.rounds} rounds")
            results[f"{name} {sparsity}"] = benchmark(ks.prune(model, sparsity))
    if FLAGS.json:
        print(json.dumps({**setting, "results": results}))


def benchmark(model):
    """Size and times of every form of the file of `model`, printed as a table."""
    weights = [keras.ops.convert_to_numpy(weight) for weight in model.weights]
    if FLAGS.layers:
        print(
            f"{'weight':40}{'bytes':>12}{'zeros':>8}{'reference':>12}{'deflated':>12}"
        )
        for variable, array in zip(model.weights, weights, strict=True):
            print(
                f"{variable.path[-38:]:40}{array.nbytes:12,}"
                f"{np.mean(array == 0):8.1%}{reference([array]):12,}"
                f"{len(zlib.compress(array.tobytes())):12,}"
            )
    rows = {"reference": {"bytes": reference(weights)}}
    with tempfile.TemporaryDirectory() as folder:
        forms = {
            name: (functools.partial(write, model), read, pathlib.Path(folder, file))
            for name, (write, read, file) in FORMS.items()
        }
        times = {name: [] for name in forms}
        for _ in range(FLAGS.rounds):
            for name, (write, read, path) in forms.items():
                times[name].append((seconds(write, path), seconds(read, path)))
        for name, (*_, path) in forms.items():
            writes, reads = zip(*times[name], strict=True)
            plain = [read for _, read in times["save"]]
            rows[name] = {
                "bytes": path.stat().st_size,
                "write s": statistics.median(writes),
                "read s": statistics.median(reads),
                "read, over save": statistics.median(
                    read / other for read, other in zip(reads, plain, strict=True)
                ),
            }
    size = rows["save"]["bytes"]
    rows = {
        name: {"over save": row["bytes"] / size, **row} for name, row in rows.items()
    }
    print(f"{'':14}" + "".join(f"{column:>16}" for column in rows["save"]))
    for name, row in rows.items():
        print(f"{name:14}" + "".join(f"{value:16.6g}" for value in row.values()))
    return rows


def reference(arrays):
    """Bytes of the nonzeros of `arrays`, with the entropy of their places."""
    bits = 0.0
    for array in arrays:
        part = np.count_nonzero(array) / array.size
        places = [p * math.log2(p) for p in (part, 1 - part) if p]
        bits += array.size * (32 * part - sum(places))
    return math.ceil(bits / 8)


def seconds(function, path):
    began = time.perf_counter()
    function(path)
    return time.perf_counter() - began


def write_gzip(model, path):
    model.save(path.with_suffix(""))
    path.write_bytes(gzip.compress(path.with_suffix("").read_bytes(), 6))


def read_gzip(path):
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    keras.saving.load_model(path.with_suffix(""))


def write_zip(model, path, compression, level=None):
    model.save(path)
    write_archive(path, read_archive(path), compression, level)


def read_litert(path):
    from ai_edge_litert.interpreter import Interpreter

    Interpreter(str(path)).allocate_tensors()


def zipped(compression, level=None):
    return functools.partial(write_zip, compression=compression, level=level)


# How to write each form, how to read it, and the name of its file.
FORMS = {
    "save": (lambda model, path: model.save(path), keras.saving.load_model, "s.keras"),
    "save + gzip": (write_gzip, read_gzip, "g.keras.gz"),
    "save_model": (ks.save_model, keras.saving.load_model, "m.keras"),
    "deflate 9": (zipped(zipfile.ZIP_DEFLATED, 9), keras.saving.load_model, "d.keras"),
    "bzip2 1": (zipped(zipfile.ZIP_BZIP2, 1), keras.saving.load_model, "b1.keras"),
    "bzip2 9": (zipped(zipfile.ZIP_BZIP2, 9), keras.saving.load_model, "b9.keras"),
    "lzma": (zipped(zipfile.ZIP_LZMA), keras.saving.load_model, "l.keras"),
}
if keras.backend.backend() == "tensorflow":
    FORMS["export_litert"] = (ks.export_litert, read_litert, "e.tflite")


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    app.run(main)
