"""What `compare.py` recorded: a table of it, and pictures.

python curves.py --results=runs/compare.jsonl --plot=runs/compare.png
python curves.py --results=runs/compare.jsonl --against=gradual_global
"""

import collections
import json
import math
import pathlib
import statistics

from absl import app, flags

FLAGS = flags.FLAGS
# To be raised where lines change, or what trains under the name of a method.
FORMAT = 1
_NEEDED = {"method": str, "settings": dict, "seed": int}
_ACCURACIES = ("validation", "test")
_MEASURED = ("target", "sparsity", *_ACCURACIES)

# What a training came to, and where; the rest of a line is what was asked for.
_OUTCOME = {"format", "curve", "seconds", "versions", "hardware", "command", "time"}
_OUTCOME |= {"commit"}
# What a comparison compares; the rest of what was asked for is the same in all of it.
_COMPARED = {"method", "settings", "finetune", "seed", "sparsities", "recalibrate"}

_NAMES = ("halo", "ltp", "gradual", "gradual_global", "magnitude", "l1", "sws", "mcp")
_NAMES += ("halo_steered", "dense")
_ANEW = ", recalibrated"
_COLORS = {name: f"C{index}" for index, name in enumerate(_NAMES)}

flags.DEFINE_string("plot", None, "Picture to draw, such as curves.png.")


def read(path):
    """The lines of a results file that are whole and of this format."""
    path = pathlib.Path(path)
    texts = path.read_text(errors="replace").splitlines() if path.is_file() else []
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            print(f"{path}, line {number} is cut or no JSON: it is left out.")
            continue
        if not isinstance(line, dict) or "format" not in line:
            print(f"{path}, line {number} is not of compare.py: it is left out.")
        elif line["format"] != FORMAT:
            print(
                f"{path}, line {number} has format {line['format']!r}, not {FORMAT}: "
                "it is left out."
            )
        elif not is_whole(line):
            print(f"{path}, line {number} is not as compare.py writes it: left out.")
        else:
            lines.append(line)
    return lines


def is_whole(line):
    """Whether a line has all that is read of it here."""
    curve = line.get("curve")
    return (
        all(type(line.get(name)) is kind for name, kind in _NEEDED.items())
        and is_part(line.get("finetune"))
        and isinstance(curve, list)
        and curve != []
        and all(isinstance(point, dict) and is_measured(point) for point in curve)
    )


def is_measured(point):
    layers, anew = point.get("layers"), point.get("recalibrated", point)
    return (
        isinstance(layers, dict)
        and isinstance(anew, dict)
        and all(map(is_part, layers.values()))
        and all(is_part(point.get(name)) for name in _MEASURED)
        and all(is_part(anew.get(name)) for name in _ACCURACIES)
    )


def is_part(value):
    return type(value) in (int, float) and 0 <= value <= 1


def key(line):
    """What a line was asked for: equal for a training and its repetition."""
    asked = {name: value for name, value in line.items() if name not in _OUTCOME}
    return json.dumps(asked, sort_keys=True)


def comparisons(lines):
    """The lines by what is the same in a comparison: network, data set, epochs, ..."""
    groups = collections.defaultdict(list)
    for line in lines:
        same = line.keys() - _OUTCOME - _COMPARED
        groups[", ".join(f"{name}={line[name]}" for name in sorted(same))].append(line)
    return groups


def chosen(lines):
    """Test accuracies by method, fine-tuning and target, of the chosen settings.

    Of several settings of a method that is taken, for each target, which has the best
    mean accuracy on the validation images, among those with the most trainings.

    Returns:
        Dict of `(method, finetune)` to a dict of each target to a list of points, one
        for each seed.
    """
    points: dict = collections.defaultdict(dict)
    for line in lines:
        for point in line["curve"]:
            settings = json.dumps(line["settings"], sort_keys=True)
            group = points[line["method"], line["finetune"], point["target"], settings]
            own = {name: line[name] for name in ("settings", "seed")}
            group[line["seed"]] = {**point, **own}
    best: dict = collections.defaultdict(dict)
    for (method, finetune, target, _), seeds in points.items():
        group = list(seeds.values())
        held = best[method, finetune].get(target)
        if held is None or rank(group) > rank(held):
            best[method, finetune][target] = group
    return best


def differences(best, other):
    """What each method of `chosen` has more than the method `other`, seed by seed.

    At the same target, or than the one network that `other` has without zeros.
    """
    apart: dict = collections.defaultdict(dict)
    for (method, finetune), curve in best.items():
        for target, points in curve.items():
            known = best.get((other, finetune), {})
            known = known.get(target, known.get(0.0, []))
            tests = {point["seed"]: point["test"] for point in known}
            pairs = [
                {**point, "test": point["test"] - tests[point["seed"]]}
                for point in points
                if point["seed"] in tests
            ]
            if pairs and method != other:
                apart[method, finetune][target] = pairs
    return apart


def recalibrated(lines):
    """What was measured with batch statistics gathered anew, as lines of their own."""
    for line in lines:
        curve = [
            {**p, **p["recalibrated"]} for p in line["curve"] if "recalibrated" in p
        ]
        yield {**line, "method": f"{line['method']}{_ANEW}", "curve": curve}


def rank(points):
    return len(points), mean(points, "validation")


def mean(points, name="test"):
    return statistics.mean(point[name] for point in points)


def spread(points, name="test"):
    return statistics.stdev(p[name] for p in points) if len(points) > 1 else 0.0


def table(lines, against=None):
    """Test accuracy in %, mean and standard deviation over the seeds, as Markdown.

    With the name of a method in `against`, how much more than it every other one has.
    """
    best = chosen([*lines, *recalibrated(lines)])
    sign = "+" if against else ""
    if against:
        best = differences(best, against)
    targets = sorted({target for curve in best.values() for target in curve})
    rows = [["method", "fine-tuning", *(f"{target:.1%}" for target in targets)]]
    rows.append(["---"] * len(rows[0]))
    for (method, finetune), curve in sorted(best.items()):
        rows.append([method, f"{finetune:.0%}"])
        rows[-1] += [cell(curve[t], t, sign) if t in curve else "" for t in targets]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cell(points, target, sign=""):
    """The accuracy, and the sparsity where it is another than was asked for."""
    accuracy = f"{100 * mean(points):{sign}.2f}"
    if len(points) > 1:
        accuracy += f" ± {100 * spread(points):.2f}"
    sparsity = mean(points, "sparsity")
    off = min(1e-3, 0.05 * (1 - target))  # where few are left, few are many
    return accuracy + (f" at {sparsity:.2%}" if abs(sparsity - target) > off else "")


def check_picture(path):
    """Raises unless a picture can be drawn to `path`."""
    from matplotlib.figure import Figure

    path = pathlib.Path(path)
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(
            f"--plot must end in one of .{', .'.join(sorted(known))}. Received: {path}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)


def plot(lines, path):
    """Draws accuracy against sparsity, and what methods leave of each layer."""
    from matplotlib.figure import Figure

    best = sorted(chosen(lines).items())
    anew = sorted(chosen(recalibrated(lines)).items())
    kinds = sorted({finetune for (_, finetune), _ in best})
    figure = Figure(figsize=(5 * len(kinds) + 5, 5), layout="constrained")
    *accuracy, layers = figure.subplots(1, len(kinds) + 1)
    targets = sorted({target for _, curve in best for target in curve} - {0.0})
    bound = max(mean(points) for _, curve in best for points in curve.values())
    floor = bound - 0.8 * (1 - bound)  # below it has collapsed
    seeds = {name: len(next(iter(curve.values()))) for (name, _), curve in best}
    labels = {
        name: name if count == max(seeds.values()) else f"{name}, seeds: {count}"
        for name, count in seeds.items()
    }
    for axes, tuned in zip(accuracy, kinds, strict=True):
        for (name, finetune), curve in best:
            if finetune == tuned:
                draw(axes, curve, label=labels[name], color=_COLORS.get(name, "black"))
        for (name, finetune), curve in anew:
            if finetune == tuned and {*curve} != {0.0}:
                color = _COLORS.get(name.removesuffix(_ANEW), "black")
                draw(axes, curve, color=color, linestyle="--", linewidth=0.8)
        axes.set(
            xscale="log",
            xlabel="zeros, %",
            ylabel="test accuracy, %",
            ylim=(100 * floor, 100 * bound + 5 * (bound - floor)),
            title=f"fine-tuning: {tuned:.0%} of the epochs"
            + (", dashed: recalibrated" if anew else ""),
        )
        # The axis is that of the weights left, from right to left.
        axes.set_xticks([100 - 100 * target for target in targets])
        axes.set_xticklabels([f"{100 * target:g}" for target in targets])
        axes.minorticks_off()
        axes.invert_xaxis()

    # At the target in the middle, where methods differ in what they spare.
    target = targets[len(targets) // 2] if targets else 0.0
    for (name, finetune), curve in best:
        if finetune != kinds[0] or target not in curve:
            continue
        parts = [point["layers"] for point in curve[target]]
        left = [
            100 - 100 * statistics.mean(part.get(layer, math.nan) for part in parts)
            for layer in parts[0]
        ]
        color = _COLORS.get(name, "black")
        layers.plot(left, label=name, color=color, marker="o", markersize=3)
        layers.set(
            yscale="log",
            yticks=[1, 2, 5, 10, 20, 50, 100],
            title=f"{target:.1%} zeros, fine-tuning: {kinds[0]:.0%}",
            ylabel="weights left in the layer, %",
            xlabel="kernel, from input to output",
            xticks=range(len(left)) if len(left) < 20 else [],
        )
    layers.yaxis.set_major_formatter("{x:g}")
    layers.minorticks_off()
    drawn = [axes.get_legend_handles_labels() for axes in accuracy]
    handles = {
        label: handle for axes in drawn for handle, label in zip(*axes, strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    figure.savefig(path)


def draw(axes, curve, **style):
    """The accuracies of a method, or the one of a dense network as a line across."""
    groups = [curve[target] for target in sorted(curve)]
    y, spreads = [[100 * f(p) for p in groups] for f in (mean, spread)]
    if {*curve} == {0.0}:
        axes.axhline(y[0], linestyle=":", **style)
    else:
        left = [100 - 100 * mean(points, "sparsity") for points in groups]
        axes.errorbar(left, y, spreads, marker="o", markersize=3, capsize=2, **style)


def main(argv):
    del argv
    lines = read(FLAGS.results)
    if not lines:
        raise app.UsageError(
            f"--results must be a file that compare.py wrote. Received: {FLAGS.results}"
        )
    groups = comparisons(lines)
    if FLAGS.plot and len(groups) > 1:
        raise app.UsageError(
            f"--plot draws one comparison. {FLAGS.results} has {len(groups)}: give the "
            "lines of one in a file of their own."
        )
    known = {line["method"] for line in lines}
    if FLAGS.against and FLAGS.against not in known:
        raise app.UsageError(
            f"--against must be a method that {FLAGS.results} has: "
            f"{', '.join(sorted(known))}. Received: {FLAGS.against}"
        )
    if FLAGS.plot:
        try:
            check_picture(FLAGS.plot)
        except (ValueError, OSError) as error:
            raise app.UsageError(f"{error}") from error
    for same, group in groups.items():
        print(f"{same}\n{table(group, FLAGS.against)}")
    if FLAGS.plot:
        plot(lines, FLAGS.plot)


if __name__ == "__main__":
    flags.DEFINE_string("results", "runs/compare.jsonl", "Lines of compare.py.")
    flags.DEFINE_string(
        "against", None, "Print what each method has more than this one, seed by seed."
    )
    app.run(main)
