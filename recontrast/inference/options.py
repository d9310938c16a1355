"""How a trained model is run where nothing is trained any more: one target, fewer bits, folded, compiled."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from recontrast.calibration.conformal import Calibration
from recontrast.models.fold import FoldedModel, fold
from recontrast.models.recontrast import ReContrast
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.device import move_model

# Constants may be rearranged for the kernels, and activations become part of convolutions.
COMPILE: dict[str, Any] = {"options": {"freezing": True}}


def made(found: Calibration) -> "InferenceOptions":
    """How a model was run for the calibration ``found``."""
    return InferenceOptions(found.views, found.precision)  # type: ignore[arg-type]


@dataclass(frozen=True)
class InferenceOptions:
    """What may differ from training; None is as trained.

    Folding and compiling change rounding alone, in float32; in bfloat16 folding moves scores by some thousandths. Other
    views, another precision and that give other scores: a calibration holds for those that it was made of.

    Attributes:
        views: maps by their target, as in `Recipe`: one takes 0.7 of the time.
        precision: of the convolutions.
        channels_last: memory layout of images and weights.
        folded: every BatchNorm part of the convolution before it; bfloat16 weights are rounded once. None: where a
            detector was not trained in bfloat16, whose scores it would move.
        compiled: through torch.compile: minutes at the start on a CPU.
    """

    views: Literal["both", "trained", "frozen"] | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    channels_last: bool | None = None
    folded: bool | None = None
    compiled: bool = False

    def recipe(self, trained: Recipe) -> Recipe:
        """The recipe ``trained`` with what is asked for.

        Raises:
            ValueError: its model has no such views.
        """
        asked = {"views": self.views, "precision": self.precision, "channels_last": self.channels_last}
        return trained.replace(**{name: value for name, value in asked.items() if value is not None})

    def has_same_scores(self, trained: Recipe, other: "InferenceOptions | None" = None) -> bool:
        """Whether scores are those of another way, but for rounding.

        Args:
            trained: as the checkpoint has it.
            other: the other way; None: as trained.

        Returns:
            True where one calibration holds for both.
        """
        other = other or InferenceOptions()
        wanted = other.recipe(trained)
        alike = self.recipe(trained).replace(channels_last=wanted.channels_last) == wanted
        return alike and (wanted.precision == "float32" or self.folds(trained) == other.folds(trained))

    def calibration(self, trained: Recipe, found: Calibration | None) -> Calibration | None:
        """The calibration of these scores.

        Args:
            trained: as the checkpoint has it.
            found: that of the checkpoint.

        Returns:
            ``found``, or None where it is of other scores.
        """
        return found if found is not None and self.has_same_scores(trained, made(found)) else None

    def calibration_note(self, trained: Recipe, found: Calibration) -> str | None:
        """Why a calibration decides nothing of these scores.

        Args:
            trained: as the checkpoint has it.
            found: the calibration.

        Returns:
            Words that follow the checkpoint's name; None where it does decide.
        """
        if self.calibration(trained, found) is not None:
            return None
        asked, was = (
            f"views {recipe.views}, {recipe.precision}" + ("" if folded == usual else ", folded otherwise")
            for recipe, folded, usual in (
                (self.recipe(trained), self.folds(trained), replace(self, folded=None).folds(trained)),
                (made(found).recipe(trained), True, True),
            )
        )
        options = [f"--{name} {value}" for name in ("views", "precision") if (value := getattr(found, name))]
        passed = f"; {' '.join(options)} decides" if options else ""
        return f"its calibration is of scores of {was}: nothing is decided by scores of {asked}{passed}"

    def folds(self, trained: Recipe) -> bool:
        """Whether BatchNorm is folded in a model of the recipe ``trained``."""
        if self.folded is not None:
            return self.folded
        return trained.precision == "float32" or self.recipe(trained).precision != trained.precision

    def network(
        self, model: ReContrast, recipe: Recipe, trained: Recipe, *, keep: bool = True
    ) -> ReContrast | FoldedModel:
        """What `recontrast.inference.infer.infer` runs in place of ``model``.

        Args:
            model: on its device; it is left as it is where it is folded, and compiled in place where it is not.
            recipe: as `recipe` gives it.
            trained: as the checkpoint has it.
            keep: False: ``model`` may be used up, which saves the memory of a second one.

        Returns:
            The model, or what it is folded into.

        Raises:
            ValueError: a size that the model's strides do not divide.
        """
        network = fold(model, recipe.out, keep=keep) if self.folds(trained) else model
        if isinstance(network, FoldedModel) and recipe.precision == "bfloat16":
            network.to(torch.bfloat16)  # else each pass would round the weights anew
        move_model(network, next(network.parameters()).device, recipe.channels_last)
        if self.compiled:
            network.compile(**COMPILE)
        return network
