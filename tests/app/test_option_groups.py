"""Tests of groups of options: typer sees each option, and the command gets them as one argument."""

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from recontrast.app.option_groups import add_imports, add_threads, expand_options
from recontrast.app.recipe_options import CompareRecipeOptions, TrainRecipeOptions


@dataclass(frozen=True)
class Sizes:
    """Options of a group."""

    height: Annotated[int, typer.Option(help="Height in pixels.")]
    width: Annotated[int, typer.Option(help="Width in pixels.")] = 5


@dataclass(frozen=True)
class MoreSizes(Sizes):
    """A group with another help and one more option."""

    width: Annotated[int, typer.Option(help="Width of the tile in pixels.")] = 6
    depth: Annotated[int | None, typer.Option(help="Depth in pixels.")] = None


def run(command, *arguments):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_a_command_gets_its_group():
    got = []

    @expand_options
    def command(name: Annotated[str, typer.Argument(help="Name.")], *, sizes: Sizes, plain: bool = False) -> None:
        """Do it."""
        got.append((name, sizes, plain))

    assert run(command, "a", "--height", "3").exit_code == 0
    assert run(command, "b", "--height", "3", "--width", "4", "--plain").exit_code == 0
    assert got == [("a", Sizes(3, 5), False), ("b", Sizes(3, 4), True)]
    assert run(command, "c").exit_code == 2  # --height has no default
    said = run(command, "--help").stdout
    assert "--sizes" not in said and said.index("--height") < said.index("--width") < said.index("--plain")
    assert command.__name__ == "command" and command.__doc__ == "Do it."


def test_an_option_of_the_command_has_its_own_help_and_is_in_the_group():
    got = []

    @expand_options
    def command(*, width: Annotated[int, typer.Option(help="Width of the window.")] = 7, sizes: Sizes) -> None:
        got.append((width, sizes))

    assert run(command, "--height", "1").exit_code == run(command, "--height", "1", "--width", "2").exit_code == 0
    assert got == [(7, Sizes(1, 7)), (2, Sizes(1, 2))]
    said = run(command, "--help").stdout
    assert said.count("--width") == 1 and "Width of the window." in said


def test_a_subclass_replaces_the_help_and_keeps_the_place():
    @expand_options
    def command(*, sizes: MoreSizes) -> None: ...

    said = run(command, "--help").stdout
    assert said.index("--height") < said.index("--width") < said.index("--depth")
    assert "Width of the tile in pixels." in said and "Width in pixels." not in said


def test_other_decorators_add_to_a_group():
    got = []

    @expand_options
    def command(*, sizes: Sizes) -> None:
        got.append(sizes)

    assert run(add_threads(add_imports(command)), "--height", "3", "--threads", "1").exit_code == 0
    assert got == [Sizes(3, 5)]


def test_recipe_options_are_the_fields_that_were_given():
    assert TrainRecipeOptions().list_changes() == CompareRecipeOptions().list_changes() == {}
    given = CompareRecipeOptions(backbone="resnet18", steps=0, shots="screw=4", holdout=0.2).list_changes()
    assert given == {"backbone": "resnet18", "steps": 0, "shots": {"screw": 4}, "holdout": 0.2}


def test_set_overrides_other_options():
    options = TrainRecipeOptions(steps=5, window="0,9", channels_last=False, changes=["steps=6", "clip=0.5"])
    assert options.list_changes() == {"steps": 6, "window": [0.0, 9.0], "channels_last": False, "clip": 0.5}
    assert TrainRecipeOptions(changes=["clip=none"]).list_changes() == {"clip": None}


def test_invalid_values_name_their_option():
    for options, wanted in (
        (TrainRecipeOptions(window="wide"), "--window"), (TrainRecipeOptions(shots="few"), "--shots"),
        (TrainRecipeOptions(changes=["steps"]), "--set"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=wanted):
            options.list_changes()
