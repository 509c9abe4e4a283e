"""Times the training step of each method over the dense one, paired.

    KERAS_BACKEND=jax python examples/benchmarks/step_time.py

What is timed is the function that `Model.fit` calls for a step, on a batch that stays
in memory: no input pipeline, no callbacks. The models take turns within each round,
so that whatever else the machine does meets them all. A ratio is of times in the same
round; the median of the rounds is reported.

Beside the times stands what a step does, which other processes cannot disturb. An
operation is what the backend runs as one: an instruction of the optimized program (a
fusion counts one) with XLA, a node of the graph in TensorFlow without XLA, a call of
an aten operator in torch. `MB written` is what their outputs take, and `exp / weight`
how many exponentials, sigmoids and such are computed for each kernel weight.
"""

import functools
import itertools
import json
import math
import pathlib
import re
import statistics
import sys
import time

import keras
import machine
import programs
from absl import app, flags, logging

import keras_sparsity as ks

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import denormals  # noqa: E402
import models  # noqa: E402

FLAGS = flags.FLAGS

# Input shape and batch size of each network.
NETWORKS = {"lenet_300_100": ((28, 28, 1), 100), "resnet20": ((32, 32, 3), 64)}

# Of each model in a round: short ones, so that disturbances meet all models alike.
TURNS = 10

METHODS = {
    "dense": None,
    "halo": ks.HALO(xi=3e-7, psi=5e-4),
    "ltp": functools.partial(ks.LTP, l0=3e-6),
    "magnitude": functools.partial(
        ks.MagnitudePruning, schedule=ks.CubicSparsity(0.9, end_step=10_000)
    ),
}

flags.DEFINE_multi_enum("network", list(NETWORKS), list(NETWORKS), "What to train.")
flags.DEFINE_integer("rounds", 7, "Rounds of which to take the median.", lower_bound=1)
flags.DEFINE_integer(
    "steps",
    None,
    "Steps of each model in a round. Default: what the dense one does in a second.",
    lower_bound=1,
)
flags.DEFINE_enum(
    "jit_compile", "auto", ["auto", "true", "false"], "Whether to compile the step."
)
flags.DEFINE_bool("json", False, "Print a line of JSON too.")


def main(argv):
    del argv
    denormals.flush()
    setting = machine.print_setting(jit_compile=FLAGS.jit_compile)
    results = {network: benchmark(network) for network in FLAGS.network}
    if FLAGS.json:
        print(json.dumps({**setting, "results": results}))


def benchmark(network):
    """Times and costs of a step by method, printed as a table."""
    shape, batch_size = NETWORKS[network]
    keras.utils.set_random_seed(0)
    x = keras.random.normal((batch_size, *shape))
    y = keras.random.randint((batch_size,), 0, 10)
    steps, costs = {}, {}
    for method in METHODS:
        model = compiled_model(network, shape, method)
        model.train_on_batch(x, y)  # builds the optimizer and the metrics
        steps[method], costs[method] = STEPS[keras.backend.backend()](model, x, y)
        kernels = [w for w in model.trainable_weights if w.name == "kernel"]
        costs[method]["exp / weight"] = costs[method].pop("exp") / sum(
            math.prod(w.shape) for w in kernels
        )
    rows = {}
    for method, seconds in (times := time_in_turns(steps)).items():
        ratios = [s / dense for s, dense in zip(seconds, times["dense"], strict=True)]
        rows[method] = {
            "ms": 1e3 * statistics.median(seconds),
            "over dense": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            **costs[method],
        }
    print(f"\n{network}, batch {batch_size}, median of {FLAGS.rounds} rounds")
    print(" " * 10 + "".join(f"{column:>14}" for column in rows["dense"]))
    for method, row in rows.items():
        print(f"{method:10}" + "".join(f"{value:14.6g}" for value in row.values()))
    return rows


def compiled_model(network, shape, method):
    model = models.build(network, shape, classes=10)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    if METHODS[method] is not None:
        model = ks.sparsify(model, METHODS[method])
        optimizer = ks.SparsityOptimizer(optimizer)
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile={"true": True, "false": False}.get(FLAGS.jit_compile, "auto"),
    )
    return model


def time_in_turns(steps):
    """Seconds per step of every model in every round."""

    def seconds(step, count):
        began = time.perf_counter()
        for _ in range(count):
            logs = step()
        float(logs["loss"])  # waits for the last step
        return (time.perf_counter() - began) / count

    for step in steps.values():
        seconds(step, 3)  # compiles
    count = FLAGS.steps or math.ceil(1 / seconds(steps["dense"], 3))
    turn = math.ceil(count / TURNS)
    times = {method: [] for method in steps}
    for _ in range(FLAGS.rounds):
        turns = [
            [seconds(step, turn) for step in steps.values()]
            for _ in range(0, count, turn)
        ]
        for method, column in zip(steps, zip(*turns, strict=True), strict=True):
            times[method].append(statistics.median(column))
    return times


def jax_step(model, x, y):
    program, state = programs.compiled_step(model, x, y)
    costs = hlo_costs(program.as_text())
    analysis = program.cost_analysis()
    costs["MB accessed"] = analysis["bytes accessed"] / 1e6
    costs["MFLOP"] = analysis["flops"] / 1e6

    model.make_train_function()
    batches = itertools.repeat((x, y))

    def step():
        nonlocal state
        logs, state = model.train_function(state, batches)
        return logs

    return step, costs


def tensorflow_step(model, x, y):
    import tensorflow as tf

    function = tf.function(model.train_step, jit_compile=model.jit_compile)
    if model.jit_compile:
        compiler_ir = function.experimental_get_compiler_ir((x, y))
        costs = hlo_costs(compiler_ir(stage="optimized_hlo"))
    else:
        # The graph as TensorFlow optimized it; there is no public way to it.
        from tensorflow.python.eager import context

        context.enable_graph_collection()
        function((x, y))
        (graphs,) = context.export_run_metadata().function_graphs
        context.disable_graph_collection()
        with tf.Graph().as_default() as graph:
            tf.import_graph_def(graphs.post_optimization_graph)
        idle = {"_Arg", "_Retval", "Const", "Identity", "ReadVariableOp", "Reshape"}
        costs = sum_up(
            (op.type, [(t.shape.num_elements() or 0, t.dtype.size) for t in op.outputs])
            for op in graph.get_operations()
            if op.type not in idle
        )

    model.make_train_function()
    batches = iter(tf.data.Dataset.from_tensors((x, y)).repeat())
    return lambda: model.train_function(batches), costs


def torch_step(model, x, y):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            outputs = function(*args, **(kwargs or {}))
            if not function.is_view:
                tensors = [t for t in keras.tree.flatten(outputs) if torch.is_tensor(t)]
                sizes = [(t.numel(), t.element_size()) for t in tensors]
                calls.append((function.overloadpacket.__name__, sizes))
            return outputs

    model.make_train_function()
    model.train()
    with Record():
        model.train_step((x, y))
    return lambda: model.train_function([(x, y)]), sum_up(calls)


STEPS = {"jax": jax_step, "tensorflow": tensorflow_step, "torch": torch_step}


def hlo_costs(program):
    """Costs of an optimized XLA program, given as text."""
    line = re.compile(r"^ +(?:ROOT )?%?\S+ = (\(.*?\)|\S+) ([\w-]+)\(", re.MULTILINE)
    array = re.compile(r"([a-z]+)(\d+)\[([\d,]*)\]")

    def instructions(text):
        for types, opcode in line.findall(text):
            yield (
                opcode,
                [
                    (math.prod(map(int, filter(None, shape.split(",")))), int(bits) / 8)
                    for _, bits, shape in array.findall(types)
                ],
            )

    # What is inside of fusions is computed, but only the entry's results are written.
    idle = {"bitcast", "constant", "get-tuple-element", "parameter", "tuple"}
    entry = program[program.index("\nENTRY ") :]
    costs = sum_up(row for row in instructions(entry) if row[0] not in idle)
    return {**costs, "exp": sum_up(instructions(program))["exp"]}


def sum_up(operations):
    """Costs of operations, each given as `(name, [(elements, bytes of one), ...])`."""
    operations = list(operations)
    exponential = re.compile("exp|exponential|logistic|sigmoid|tanh", re.IGNORECASE)
    return {
        "operations": len(operations),
        "MB written": sum(n * size for _, out in operations for n, size in out) / 1e6,
        "exp": sum(
            n for name, out in operations if exponential.fullmatch(name) for n, _ in out
        ),
    }


if __name__ == "__main__":
    # TensorFlow warns that every model makes a function of its own.
    FLAGS.set_default("verbosity", logging.ERROR)
    app.run(main)
