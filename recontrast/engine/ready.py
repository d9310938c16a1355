"""How a trained model is run where nothing is trained any more: one target, fewer bits, folded, compiled."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from recontrast.engine.device import put
from recontrast.engine.recipes import Recipe
from recontrast.fold import Folded, fold
from recontrast.model import ReContrast

# Constants may be rearranged for the kernels, and activations become part of convolutions.
COMPILE: dict[str, Any] = {"options": {"freezing": True}}


@dataclass(frozen=True)
class Inference:
    """What may differ from training; None is as trained.

    Folding and compiling change rounding alone, in float32; in bfloat16 folding moves scores by some thousandths. Other
    views, another precision and that give other scores: a calibration does not hold for them.
    """

    views: Literal["both", "trained", "frozen"] | None = None  # maps by their target: one takes 0.7 of the time
    precision: Literal["float32", "bfloat16"] | None = None
    channels_last: bool | None = None
    # Every BatchNorm part of the convolution before it; bfloat16 weights are rounded once. None: where a detector was
    # not trained in bfloat16, whose scores it would move.
    folded: bool | None = None
    compiled: bool = False  # torch.compile: minutes at the start on a CPU

    def recipe(self, trained: Recipe) -> Recipe:
        """``trained`` with what is asked for; ValueError where its model has no such views."""
        asked = {"views": self.views, "precision": self.precision, "channels_last": self.channels_last}
        return trained.replace(**{name: value for name, value in asked.items() if value is not None})

    def scores_alike(self, trained: Recipe) -> bool:
        """Whether scores are those of ``trained``, but for rounding."""
        alike = self.recipe(trained).replace(channels_last=trained.channels_last) == trained
        return alike and not (self.folds(trained) and trained.precision == "bfloat16")

    def folds(self, trained: Recipe) -> bool:
        """Whether BatchNorm is folded."""
        if self.folded is not None:
            return self.folded
        return trained.precision == "float32" or self.recipe(trained).precision != trained.precision

    def network(self, model: ReContrast, recipe: Recipe, trained: Recipe, *, keep: bool = True) -> ReContrast | Folded:
        """What `recontrast.engine.infer.infer` runs in place of ``model``.

        Args:
            model: on its device; it is left as it is where it is folded, and compiled in place where it is not.
            recipe: as `recipe` gives it.
            trained: as the checkpoint has it.
            keep: False: ``model`` may be used up, which saves the memory of a second one.
        """
        network = fold(model, recipe.out, keep=keep) if self.folds(trained) else model
        if isinstance(network, Folded) and recipe.precision == "bfloat16":
            network.to(torch.bfloat16)  # else each pass would round the weights anew
        put(network, recipe, next(network.parameters()).device)
        if self.compiled:
            network.compile(**COMPILE)
        return network
