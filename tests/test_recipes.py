"""The recipes: complete, marked, and overruled by the command."""

import pathlib
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import models  # noqa: E402
import recipes  # noqa: E402
import train_flags  # noqa: E402


@pytest.fixture
def settings():
    """`settings(*flags)`: the values of the flags that the script would run with."""
    with flagsaver.flagsaver():

        def settings(*arguments):
            flags.FLAGS(["train.py", *arguments])
            train_flags.fill_defaults()
            return flags.FLAGS

        yield settings


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_says_of_every_setting_whose_it_is(settings, capsys, name):
    recipe = recipes.RECIPES[name]
    assert not recipe.stated.keys() & recipe.ours.keys()
    coefficients = {"ltp": ["l0", "temperature"], "halo": ["xi", "psi", "scale_decay"]}
    needed = {"model", "dataset", "epochs", "finetune_epochs", "batch_size", "drops"}
    needed |= {"optimizer", "learning_rate", "momentum", "weight_decay", "sparsity"}
    needed |= {"sparsity_optimizer", "multiplier", "validation_split"}
    needed |= {*coefficients[recipe.stated["method"]]}
    assert needed <= recipe.settings.keys()
    assert models.is_known(recipe.settings["model"])
    values = settings(f"--recipe={name}")  # as values that the flags take
    printed = capsys.readouterr().out
    for flag, value in recipe.settings.items():
        assert values[flag].value == value and type(values[flag].value) is type(value)
        (line,) = [row for row in printed.splitlines() if row.split()[0] == flag]
        assert line.endswith("paper" if flag in recipe.stated else "our choice")


def test_what_the_command_says_stays(settings, capsys):
    values = settings("--epochs=3", "--recipe=halo_vgg_cifar10", "--xi=1e-7")
    assert (values.epochs, values.xi) == (3, 1e-7)
    assert (values.psi, values.batch_size, values.augment) == (1e-8, 64, "crop_flip")
    assert values.output == "runs/cifar10-vgg_like-halo"
    changed = [
        row.split()[0] for row in capsys.readouterr().out.splitlines() if "(ch" in row
    ]
    assert changed == ["epochs", "xi"]


def test_the_rate_drops_where_halo_says(settings):
    drops = settings("--recipe=halo_lenet300_mnist").drops
    steps = [250 * 600 * float(part) for part in drops]
    assert steps == pytest.approx([25e3, 50e3, 75e3, 100e3, 125e3], abs=1)


def test_an_unknown_recipe_is_refused_with_the_known_ones(settings):
    with pytest.raises(flags.IllegalFlagValueError, match="halo_vgg_cifar10"):
        settings("--recipe=halo_vgg")
