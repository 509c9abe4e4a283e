"""What `compare.py` recorded: a table of it, and pictures.

python curves.py --results=runs/compare.jsonl --plot=runs/compare.png
"""

import collections
import json
import pathlib
import statistics

from absl import app, flags

FLAGS = flags.FLAGS
FORMAT = 1

# What a training came to, and where; the rest of a line is what was asked for.
_OUTCOME = ("format", "curve", "seconds", "backend", "versions", "hardware", "command")
_OUTCOME += ("time",)


def read(path):
    """The lines of a results file that are whole and of this format."""
    path = pathlib.Path(path)
    texts = path.read_text().splitlines(keepends=True) if path.exists() else []
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            print(f"{path}, line {number} is cut or no JSON: it is left out.")
            continue
        if line.get("format") != FORMAT:
            print(
                f"{path}, line {number} has format {line.get('format')}, not {FORMAT}: "
                "it is left out."
            )
            continue
        lines.append(line)
    return lines


def key(line):
    """What a line was asked for: equal for a training and its repetition."""
    asked = {name: value for name, value in line.items() if name not in _OUTCOME}
    return json.dumps(asked, sort_keys=True)


def chosen(lines):
    """Test accuracies by method, fine-tuning and target, of the chosen settings.

    Of several settings of a method that is taken, for each target, which has the best
    mean accuracy on the validation images.

    Returns:
        Dict of `(method, finetune)` to a dict of each target to a list of points, one
        for each seed.
    """
    points = collections.defaultdict(list)
    for line in lines:
        for point in line["curve"]:
            settings = json.dumps(line["settings"])
            points[line["method"], line["finetune"], point["target"], settings].append(
                {**point, "settings": line["settings"]}
            )
    best: dict = collections.defaultdict(dict)
    for (method, finetune, target, _), group in points.items():
        held = best[method, finetune].get(target)
        if held is None or mean(group, "validation") > mean(held, "validation"):
            best[method, finetune][target] = group
    return best


def mean(points, name="test"):
    return statistics.mean(point[name] for point in points)


def spread(points, name="test"):
    return statistics.stdev(p[name] for p in points) if len(points) > 1 else 0.0


def table(lines):
    """Test accuracy in %, mean and standard deviation over the seeds, as Markdown."""
    best = chosen(lines)
    targets = sorted({target for curve in best.values() for target in curve})
    rows = [["method", "fine-tuning", *(f"{target:.1%}" for target in targets)]]
    rows.append(["---"] * len(rows[0]))
    for (method, finetune), curve in sorted(best.items()):
        rows.append([method, f"{finetune:.0%}"])
        for target in targets:
            points = curve.get(target)
            rows[-1].append(
                f"{100 * mean(points):.2f} ± {100 * spread(points):.2f}"
                if points
                else ""
            )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(lines, path):
    """Draws accuracy against sparsity, and sparsity per layer at the targets."""
    from matplotlib.figure import Figure

    best = sorted(chosen(lines).items())
    methods = sorted({method for (method, _), _ in best})
    colors = {method: f"C{index}" for index, method in enumerate(methods)}
    figure = Figure(figsize=(12, 5), layout="constrained")
    accuracy, layers = figure.subplots(1, 2)
    for (method, finetune), curve in best:
        groups = [curve[target] for target in sorted(curve)]
        accuracy.errorbar(
            [100 - 100 * mean(points, "sparsity") for points in groups],
            [100 * mean(points) for points in groups],
            [100 * spread(points) for points in groups],
            label=f"{method}, fine-tuned" if finetune else method,
            color=colors[method],
            linestyle="-" if finetune else "--",
            marker="o",
            markersize=3,
            capsize=2,
        )
    top = max(mean(points) for _, curve in best for points in curve.values())
    accuracy.set(
        xscale="log",
        xlabel="weights left, %",
        ylabel="test accuracy, %",
        ylim=(100 * top - 12, 100 * top + 0.5),  # collapse is seen well enough
    )
    accuracy.invert_xaxis()
    accuracy.legend(fontsize="small")

    # At the target in the middle, where methods differ in what they spare.
    for (method, finetune), curve in best:
        if finetune:
            continue
        target = sorted(curve)[len(curve) // 2]
        names = list(curve[target][0]["layers"])
        parts = [
            100 - 100 * statistics.mean(p["layers"][name] for p in curve[target])
            for name in names
        ]
        layers.plot(parts, label=method, color=colors[method], marker="o", markersize=3)
        layers.set(
            yscale="log",
            title=f"at {target:.1%}",
            ylabel="weights left in the layer, %",
            xticks=range(len(names)),
        )
        layers.set_xticklabels([name.split("/")[-2] for name in names], rotation=90)
    figure.savefig(path)


def main(argv):
    del argv
    lines = read(FLAGS.results)
    if not lines:
        raise app.UsageError(
            f"--results must be a file that compare.py wrote. Received: {FLAGS.results}"
        )
    print(table(lines))
    if FLAGS.plot:
        plot(lines, FLAGS.plot)


if __name__ == "__main__":
    flags.DEFINE_string("results", "runs/compare.jsonl", "Lines of compare.py.")
    flags.DEFINE_string("plot", None, "Picture to draw, such as curves.png.")
    app.run(main)
