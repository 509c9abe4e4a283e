"""What may know what: imports, private attributes, and the public names."""

import ast
import importlib.util
import inspect
import os
import pathlib
import subprocess
import sys

import keras
import pytest

import keras_sparsity as ks

PACKAGE = pathlib.Path(ks.__file__).parent
TREES = {path.stem: ast.parse(path.read_text()) for path in PACKAGE.glob("*.py")}

FLOORS = [
    {"bounds", "checks", "distribution", "files", "handover", "products", "record"}
    | {"replicas", "schedules", "selection", "state", "steering", "substitution"}
    | {"timing", "units"},
    {"counting", "influence", "layer_kinds", "macs", "masks", "optimizers", "rebuild"}
    | {"recalibration", "regularizers", "report", "saving", "sparse_layer", "wrappers"},
    {"compact", "pruning", "target", "transform"},
    {"accelerate", "trail"},
    {"__init__"},
    {"__main__"},
]
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}

# Modules that may import one of their own floor.
NEIGHBORS = {
    ("influence", "layer_kinds"),
    ("macs", "rebuild"),
    ("pruning", "transform"),
    ("record", "checks"),
    ("report", "influence"),
    ("report", "macs"),
    ("schedules", "checks"),
    ("sparse_layer", "rebuild"),
    ("state", "replicas"),
    ("state", "selection"),
    ("steering", "selection"),
    ("substitution", "selection"),
    ("timing", "selection"),
}

# What is imported only inside the function that uses it.
WHERE_USED = {"h5py", "jax", "matplotlib", "pandas", "tensorflow", "torch"}

# Modules that the package imports when they are asked for, and what they need.
OPTIONAL = {"distribution": {"tensorflow"}}

# Private attributes of Keras and of torch, where nothing public serves.
PRIVATE = {
    ("bounds", "_use_weight_decay"): "which variables an optimizer decays",
    ("handover", "_version"): "torch: whether a tensor was changed in place",
    ("macs", "_layers"): "the layers in a layer that is no model",
    ("optimizers", "_iterations"): "one count of steps for two optimizers",
    ("optimizers", "_model_variables_moving_average"): "the averages of two optimizers",
    ("pruning", "_compile_config"): "losses and metrics that are not registered",
    ("rebuild", "_track_variables"): "torch: the parameters of a model, listed anew",
    ("selection", "_layers"): "the layers in a layer that is no model",
    ("selection", "_nodes_by_depth"): "every call of a layer, and the sizes there",
    ("selection", "_trainable_variables"): "what a frozen layer would train",
    ("substitution", "_clear_losses"): "losses of a call that are counted elsewhere",
    ("trail", "_initial_epoch"): "the epoch at which `fit` begins",
}
PRIVATE_MODULES = {
    ("bounds", "keras.src.backend.common"): "which optimizer applies a constraint",
}

CONTRACT = {
    "HALO",
    "LTP",
    "MCP",
    "SWS",
    "ConstantSparsity",
    "CubicSparsity",
    "KeepZeros",
    "MagnitudePruning",
    "Penalized",
    "SparsityOptimizer",
    "SparsityReport",
    "SparsityTarget",
    "SparsityTrail",
    "Trail",
    "accelerate",
    "compact",
    "export_litert",
    "finalize",
    "prune",
    "pruning_curve",
    "recalibrate",
    "report",
    "save_model",
    "sparsify",
}


def imports(tree):
    """Names of the modules that `tree` imports, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module


def top_level(tree):
    return ast.Module([node for node in tree.body if not is_guarded(node)], [])


def is_guarded(node):
    return isinstance(node, (ast.FunctionDef, ast.ClassDef))


def test_every_module_has_a_floor():
    assert set(FLOOR_OF) == set(TREES)


def test_imports_go_down_the_floors():
    for module, tree in TREES.items():
        for name in imports(tree):
            package, _, imported = name.partition(".")
            if package == "keras_sparsity":
                assert (
                    FLOOR_OF[imported] < FLOOR_OF[module]
                    or (module, imported) in NEIGHBORS
                ), f"{module} imports {imported}"


def test_the_package_needs_keras_and_numpy_only():
    known = {"keras", "numpy", "keras_sparsity"} | sys.stdlib_module_names
    for module, tree in TREES.items():
        allowed = known | OPTIONAL.get(module, set())
        first = {name.split(".")[0] for name in imports(top_level(tree))}
        assert first <= allowed, module
        anywhere = {name.split(".")[0] for name in imports(tree)}
        assert anywhere <= allowed | WHERE_USED, module


def test_private_parts_of_keras_are_used_where_they_are_listed():
    attributes = {
        (module, node.attr)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and ast.unparse(node.value) not in ("self", "cls")
    }
    assert attributes == set(PRIVATE)
    modules = {
        (module, name)
        for module, tree in TREES.items()
        for name in imports(tree)
        if name.startswith("keras.src")
    }
    assert modules == set(PRIVATE_MODULES)


def test_the_public_names_are_those_of_the_contract():
    assert set(ks.__all__) == CONTRACT
    assert all(hasattr(ks, name) for name in CONTRACT)
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("name", sorted(CONTRACT))
def test_public_names_are_documented(name):
    doc = inspect.getdoc(getattr(ks, name))
    assert doc.splitlines()[0].endswith(".")
    assert "Attributes:" in doc or ("Args:" in doc and "Example:" in doc)


def test_distribution_is_imported_when_asked_for():
    if importlib.util.find_spec("tensorflow") is None:
        with pytest.raises(ImportError, match=r'"keras-sparsity\[tensorflow\]"'):
            ks.distribution  # noqa: B018
    else:
        assert ks.distribution.MultiWorkerMirroredStrategy.__module__.startswith(
            "keras"
        )
    with pytest.raises(AttributeError, match="no attribute 'distributions'"):
        ks.distributions  # noqa: B018


def test_what_a_model_stores_is_registered():
    saved = (keras.Layer, keras.regularizers.Regularizer, keras.optimizers.Optimizer)
    for name in CONTRACT:
        thing = getattr(ks, name)
        if isinstance(thing, type) and (
            issubclass(thing, saved) or "Sparsity" == name[-8:]
        ):
            assert keras.saving.get_registered_name(thing) == f"keras_sparsity>{name}"


TRAIN = """
import functools, sys
sys.modules["tensorflow"] = None  # importing it fails
import keras, numpy
import keras_sparsity as ks

dense = [keras.layers.Dense(8, name="hidden"), keras.layers.Dense(2)]
model = keras.Sequential([keras.Input((4,)), *dense])
model = ks.sparsify(model, functools.partial(ks.LTP, l0=1e-3), filters="hidden")
model = ks.sparsify(model, ks.HALO(xi=1e-3, psi=1e-3))
model.compile(ks.SparsityOptimizer(keras.optimizers.SGD(0.1, momentum=0.9)), "mse")
trail = ks.SparsityTrail("trail", monitor="loss", mode="min")
model.fit(numpy.ones((8, 4)), numpy.ones((8, 2)), callbacks=[trail], verbose=0)
assert [row.method for row in ks.report(model).rows] == ["LTP", None, "HALO", None]
assert ks.report(ks.prune(model, 0.5)).sparsity == 0.5
assert not any(name.startswith("tensorflow.") for name in sys.modules)
"""


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_it_trains_and_reports_without_tensorflow(backend, tmp_path):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "PYTHONPATH": str(PACKAGE.parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", TRAIN],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
