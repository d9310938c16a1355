"""Options that change fields of the recipe, for `recontrast train` and `recontrast compare`."""

from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from recontrast.app.options import Weights, expand_home, parse_change, parse_shots, parse_window


@dataclass(frozen=True)
class RecipeOptions:
    """Recipe fields that both commands have. The defaults in the help are those of the recipe mvtec."""

    backbone: Annotated[str | None, typer.Option(help="Name of a timm model. Default: wide_resnet50_2.tv_in1k.")] = None
    weights: Weights = None
    steps: Annotated[
        int | None, typer.Option(help="Training steps, of methods that are not fitted in one pass. Default: 2000.")
    ] = None
    batch: Annotated[int | None, typer.Option(help="Images per step. Default: 16.")] = None
    size: Annotated[int | None, typer.Option(help="Side of the resized images in pixels. Default: 256.")] = None
    seed: Annotated[int | None, typer.Option(help="Random seed. Default: 111.")] = None
    shots: Annotated[
        str | None,
        typer.Option(
            help="Good images of each class to train on, drawn with --seed: 4, or screw=4,tile=16. Default: all."
        ),
    ] = None
    augment: Annotated[
        str | None,
        typer.Option(help="Augmented copies of the good images: none, rotations, flips or inp_former. Default: none."),
    ] = None
    views_from: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="Several aligned images of each part, such as lights: a regular expression with one pair of "
            "parentheses around the name of the view, such as '_(left|right)\\.', or pages for those of TIFF files. "
            "Default: single images.",
        ),
    ] = None

    def list_changes(self) -> dict[str, Any]:
        """Return the recipe fields that were given, with their values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {"weights": expand_home(self.weights)}
        values |= {"shots": None if self.shots is None else parse_shots(self.shots)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class CompareRecipeOptions(RecipeOptions):
    """Recipe fields of `recontrast compare`."""

    holdout: Annotated[
        float | None,
        typer.Option(help="Share of the good images that are held out. Default: 0.1; without labelled images 0.2."),
    ] = None


@dataclass(frozen=True)
class TrainRecipeOptions(RecipeOptions):
    """Recipe fields of `recontrast train`."""

    holdout: Annotated[
        float | None,
        typer.Option(
            help="Share of the good images that are held out for calibration. "
            "Default: 0.1; with --recipe: as in the recipe (0 in those of the paper)."
        ),
    ] = None
    architecture: Annotated[
        str | None,
        typer.Option(
            help="recontrast, patchcore, padim, ensemble, uniad, dinomaly, inp_former, or your own as "
            "MODULE:NAME, which is imported. Default: recontrast."
        ),
    ] = None
    tile: Annotated[
        int | None, typer.Option(help="Train on tiles of this side in pixels at full resolution, instead of --size.")
    ] = None
    window: Annotated[
        str | None,
        typer.Option(
            metavar="LOW HIGH",
            help="Samples of images of more than 8 bits that become black and white, all levels between them kept, or "
            "auto for percentiles 0.1 and 99.9 of the good images. Default: scale to 8 bits.",
        ),
    ] = None
    sampling: Annotated[
        str | None,
        typer.Option(help="Draw images or classes equally often; for one detector of all classes. Default: images."),
    ] = None
    encoder_bn: Annotated[
        str | None,
        typer.Option(help="BatchNorm of the trained encoder: train, eval or auto. Default: auto, chosen by category."),
    ] = None
    precision: Annotated[str | None, typer.Option(help="float32 or bfloat16 (autocast). Default: float32.")] = None
    channels_last: Annotated[
        bool | None, typer.Option("--channels-last/--no-channels-last", help="Memory layout. Default: the faster one.")
    ] = None
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other recipe field; may be repeated.")
    ] = None

    def list_changes(self) -> dict[str, Any]:
        """Return the recipe fields that were given, with their values; those of ``--set`` override the others."""
        values = super().list_changes() | {"window": None if self.window is None else parse_window(self.window)}
        given = values.pop("changes", [])
        return {name: value for name, value in values.items() if value is not None} | dict(map(parse_change, given))
