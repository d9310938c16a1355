"""Inference options: views, precision, memory layout, BatchNorm folding, compilation."""

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from recontrast.calibration.conformal import Calibration
from recontrast.recipes.recipe import Recipe

if TYPE_CHECKING:
    from recontrast.models.network import Network

# Freezing lets the compiler reorder constants for its kernels and fuse activations into convolutions.
COMPILE: dict[str, Any] = {"options": {"freezing": True}}


@dataclass(frozen=True)
class InferenceOptions:
    """Options of inference that may differ from training. None keeps the value of the recipe.

    In float32, folding and compiling change scores by rounding errors only. In bfloat16, folding moves scores by a few
    thousandths. Other views or another precision give other scores, and a calibration is valid only for the scores
    that it was computed from.

    Attributes:
        views: Encoders whose features serve as targets of the map, as in `Recipe`. One view takes 0.7 times as long as
            both.
        precision: Precision of the convolutions.
        channels_last: Whether images and weights are stored channels last.
        folded: Whether each BatchNorm is folded into the convolution before it; bfloat16 weights are then rounded only
            once. None folds unless the model was trained in bfloat16 and runs in bfloat16, where folding would move
            its scores.
        compiled: Whether the network is compiled by ``torch.compile``, which takes minutes at the start on a CPU.
    """

    views: Literal["both", "trained", "frozen"] | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    channels_last: bool | None = None
    folded: bool | None = None
    compiled: bool = False

    @classmethod
    def from_calibration(cls, calibration: Calibration) -> "InferenceOptions":
        """Return the options that a model was calibrated with.

        Args:
            calibration: Calibration of the model.

        Returns:
            Options with the views and precision of the calibration.
        """
        return cls(calibration.views, calibration.precision)  # type: ignore[arg-type]

    def apply_to(self, trained: Recipe) -> Recipe:
        """Return a copy of a recipe with the values of these options.

        Args:
            trained: Recipe of the training.

        Returns:
            The changed recipe.

        Raises:
            ValueError: If the model of the recipe does not have the requested views.
        """
        options = {"views": self.views, "precision": self.precision, "channels_last": self.channels_last}
        return trained.replace(**{name: value for name, value in options.items() if value is not None})

    def has_same_scores(self, trained: Recipe, other: "InferenceOptions | None" = None) -> bool:
        """Return whether two sets of options give the same scores up to rounding errors.

        Args:
            trained: Recipe of the training.
            other: Options to compare with; None for the default options.

        Returns:
            True if a calibration for one set is valid for the other.
        """
        other = other or InferenceOptions()
        recipe, other_recipe = self.apply_to(trained), other.apply_to(trained)
        if recipe.replace(channels_last=other_recipe.channels_last) != other_recipe:
            return False
        return recipe.precision == "float32" or self.folds_batchnorm(trained) == other.folds_batchnorm(trained)

    def valid_calibration(self, trained: Recipe, calibration: Calibration | None) -> Calibration | None:
        """Return a calibration if it is valid for the scores of these options.

        Args:
            trained: Recipe of the training.
            calibration: Calibration in the checkpoint, if there is one.

        Returns:
            ``calibration``, or None if it was computed from other scores.
        """
        if calibration is None or self.has_same_scores(trained, self.from_calibration(calibration)):
            return calibration
        return None

    def describe_mismatch(self, trained: Recipe, calibration: Calibration) -> str | None:
        """Explain why a calibration is invalid for the scores of these options.

        Args:
            trained: Recipe of the training.
            calibration: Calibration in the checkpoint.

        Returns:
            Sentence without its subject, to follow the name of the checkpoint; None if the calibration is valid.
        """
        if self.valid_calibration(trained, calibration) is not None:
            return None
        requested, calibrated = self.apply_to(trained), self.from_calibration(calibration).apply_to(trained)
        usual = self.folds_batchnorm(trained) == replace(self, folded=None).folds_batchnorm(trained)
        folding = "" if usual else f", {'with' if self.folded else 'without'} BatchNorm folding"
        options = [f"--{name} {value}" for name in ("views", "precision") if (value := getattr(calibration, name))]
        return (
            f"its calibration is for scores of views {calibrated.views}, {calibrated.precision}, not of views "
            f"{requested.views}, {requested.precision}{folding}: no decisions are made"
            + (f" without {' '.join(options)}" if options else "")
        )

    def folds_batchnorm(self, trained: Recipe) -> bool:
        """Return whether BatchNorm is folded in the network that `build_network` returns.

        Args:
            trained: Recipe of the training.

        Returns:
            The value of ``folded``, or its default for this recipe.
        """
        if self.folded is not None:
            return self.folded
        return trained.precision == "float32" or self.apply_to(trained).precision != trained.precision

    def build_network(self, model: "Network", recipe: Recipe, trained: Recipe, *, keep: bool = True) -> "Network":
        """Build the network that `recontrast.inference.infer.infer` runs.

        Args:
            model: Trained model, on its device. If it is folded or runs in bfloat16, a new network is returned and the
                model is unchanged; if not, the model itself is returned, with fused norms, and it may be compiled in
                place.
            recipe: Recipe returned by `apply_to`.
            trained: Recipe of the training.
            keep: Whether to keep ``model`` usable. False saves the memory of a second model.

        Returns:
            The model, or a copy for inference.

        Raises:
            ValueError: If the image size is not a multiple of the model's stride.
        """
        import torch  # here, because a detector in an exported file has options and runs without PyTorch

        from recontrast.models.cast import cast_convolutions
        from recontrast.models.fold import FoldedModel, fold
        from recontrast.models.norm_act import fuse_norm_act
        from recontrast.runtime.device import move_model

        network = fold(model, recipe.out, keep=keep) if self.folds_batchnorm(trained) else model
        if recipe.precision == "bfloat16":  # autocast would round the weights again in each pass
            if isinstance(network, FoldedModel):
                network.cast(torch.bfloat16)
            else:
                network = copy.deepcopy(model) if keep else model
                cast_convolutions(network, torch.bfloat16)
        if recipe.fused_norm:
            fuse_norm_act(network)  # the norms that are left
        move_model(network, next(network.parameters()).device, recipe.channels_last)
        if self.compiled:
            network.compile(**COMPILE)
        return network
