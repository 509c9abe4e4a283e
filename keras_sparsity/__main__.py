"""Looking at model files and making small ones, from the shell.

python -m keras_sparsity report model.keras
python -m keras_sparsity convert model.keras small.tflite
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import zipfile

import keras

from keras_sparsity.report import report
from keras_sparsity.saving import export_litert, save_model
from keras_sparsity.selection import governors, to_array
from keras_sparsity.transform import finalize

WRITERS = {".keras": save_model, ".tflite": export_litert}

# With less the file would hardly be smaller, and the model is taken for a dense one.
FEWEST_ZEROS = 0.1

TOTALS = (
    "sparsity",
    "total_sparsity",
    "parameters",
    "nonzeros",
    "macs",
    "effective_macs",
    "compressed_bytes",
)


def main(arguments=None):
    """Runs the command that `arguments`, by default those of the shell, ask for."""
    parser = argparse.ArgumentParser(
        prog="python -m keras_sparsity",
        description="Look at sparse Keras models, and make small files of them.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("report", help="print zeros, multiplications and bytes")
    look.add_argument("model", type=pathlib.Path, help="a .keras file")
    look.add_argument("--json", action="store_true", help="print JSON, not a table")
    make = commands.add_parser("convert", help="write a small file for inference")
    make.add_argument("model", type=pathlib.Path, help="a .keras file")
    make.add_argument(
        "output", type=pathlib.Path, help="the file to write: .keras or .tflite"
    )
    parsed = parser.parse_args(arguments)
    if parsed.command == "convert" and parsed.output.suffix not in WRITERS:
        parser.error(f"output must end in .keras or .tflite, and is {parsed.output}")
    try:
        if parsed.command == "report":
            print_report(parsed.model, parsed.json)
        else:
            convert(parsed.model, parsed.output)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"error: {first_line(error)}")


def print_report(path, as_json):
    found = report(load(path))
    if as_json:
        totals = {name: getattr(found, name) for name in TOTALS}
        rows = {
            name: [dataclasses.asdict(row) for row in getattr(found, name)]
            for name in ("rows", "dead_units")
        }
        print(json.dumps({**totals, **rows}, indent=2))
    else:
        print(found)


def convert(path, output):
    """Writes the model in the file at `path` to `output`, without its optimizer."""
    model, before = load(path), path.stat().st_size
    methods = sorted({type(governor).__name__ for governor in governors(model)})
    if methods:
        model = finalize(model)
        print(f"finalized: {', '.join(methods)} removed from the model")
    matrices = [to_array(w) for w in model.weights if len(w.shape) >= 2]
    # All zeros are those that a layer begins with, as the biases of a GRU.
    matrices = [matrix for matrix in matrices if matrix.any()]
    zeros = sum((matrix == 0).sum() for matrix in matrices)
    zeros /= max(1, sum(matrix.size for matrix in matrices))
    if zeros < FEWEST_ZEROS:
        raise ValueError(
            f"'{path}' has {zeros:.1%} zeros, too few to make a file smaller: prune "
            "the model first, with `keras_sparsity.prune` or while it trains"
        )
    WRITERS[output.suffix](model, output)
    after = output.stat().st_size
    print(f"{output}: {after:,} bytes, {after / before:.3f} of {path}")


def load(path):
    """The model in the file, or a `ValueError` that says what is wrong with it."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}'")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"'{path}' is no `.keras` archive, or it is cut")
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:  # whatever the reader stumbles over in the file
        # Keras says it last, after the config of the model.
        reason = str(error).rpartition("Exception encountered: ")[2]
        raise ValueError(
            f"'{path}' holds no Keras model that can be loaded: {first_line(reason)}"
        ) from error


def first_line(error):
    return str(error).strip().partition("\n")[0]


if __name__ == "__main__":
    main()
