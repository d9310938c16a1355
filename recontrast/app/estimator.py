"""The detector as a scikit-learn estimator: fit on good images, then compute scores, decisions and anomaly maps.

Signs are scikit-learn's: larger scores are more normal, +1 is good, -1 a defect. The decision is split-conformal
(`recontrast.calibration.conformal`): some of the good images are held out of training, and the threshold is one of
their scores, so that a new good image is called a defect with probability at most ``false_alarm_rate``.
"""

import inspect
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted

from recontrast import checkpoint as checkpoints
from recontrast.app.estimator_fit import (
    check_fit_groups,
    check_labels,
    check_region,
    isolate_random_state,
    list_images,
    refuse_tiles,
    split_images,
    to_python_number,
)
from recontrast.calibration.conformal import Calibration
from recontrast.checkpoint import Checkpoint
from recontrast.data.given_parts import PartImages
from recontrast.data.in_memory import InMemoryImages
from recontrast.data.own_files import check_replaceable
from recontrast.inference.calibrate import calibrate
from recontrast.inference.decisions import describe_undecided
from recontrast.inference.infer import infer
from recontrast.inference.options import InferenceOptions
from recontrast.inference.rois import RegionOfInterest, resolve_roi
from recontrast.recipes import yaml_file
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.device import move_model, resolve_device
from recontrast.training.camera_bits import fix_bits, fix_window
from recontrast.training.holdout import resolve_holdout_count
from recontrast.training.train import train


class ReContrastDetector(OutlierMixin, BaseEstimator):
    """Visual anomaly detector (ReContrast, NeurIPS 2023) as a scikit-learn estimator.

    All methods take images ``X`` as a sequence of paths, PIL images or arrays (h, w, 3) or (h, w), mixed and of any
    size, or as one array (n, h, w, 3) or (n, h, w). Arrays are uint8 (RGB or grey), or floats in [0, 1], which are
    rounded to 255 levels. Images are resized as in training on files: the path of an image and the PIL image of that
    path give bit-identical scores.

    With the recipe field ``views_from``, an item of X is a part with several views: the path of one of its views, or of
    a file of pages; or a sequence of its views as paths, PIL images or arrays. One array is then (n, views, h, w, 3).

    The decision is split-conformal (Vovk et al., "Algorithmic Learning in a Random World", 2005; Lei et al., JASA
    2018), see `recontrast.calibration.conformal`.

    Args:
        recipe: A `Recipe`, the name of a recipe of the paper ("mvtec", "visa", ...), or a YAML file, with all settings
            of training, map and score. The parameters below override its fields if they are not None.
        backbone: Name of a timm model.
        weights: Backbone weights: a file, "package", or "random". None: the recipe's, by default from timm's hub.
        steps: Number of training steps.
        batch: Number of images per batch, in training and inference.
        size: Size of the resized images in pixels: one number for a square, or (height, width).
        encoder_lr: Learning rate of the trained encoder.
        decoder_lr: Learning rate of bottleneck and decoder.
        false_alarm_rate: Promised share of good images called defects, in (0, 1), on average over calibration sets.
            None: no images are held out, so there are scores and maps but no decisions.
        holdout: Good images held out for calibration: a number (int) or a share of all (float). None: a fifth, or as
            many as the promise needs (1 / rate - 1) if that is more; at least half must remain for training.
        roi: Region of interest of all images: a mask image (black outside), a JSON file of rectangles and polygons, or
            a mask (H, W) of bool of the size of the images. What is outside counts for nothing. None: that of the
            recipe, by default the whole image.
        random_state: Seed of the weights, of the order of the images and of the held-out images, from 0 to 2**63 - 1.
            None: the recipe's. Equal seeds give equal results; on the CPU they are bit-identical for the same
            number of threads. The global random state does not change.
        device: PyTorch device. None: the GPU, if there is one. It may be changed after `fit`.

    Attributes:
        recipe_: Recipe of the trained model.
        model_: The `ReContrast` module, in eval mode.
        calibration_: Calibration (`recontrast.calibration.conformal.Calibration`); None if no images were
            held out.
        offset_: ``-threshold``: ``decision_function = score_samples - offset_``; NaN without a calibration.
        losses_: Loss of each training step, float64; empty for a detector loaded from a file.
        held_out_: Indices in X of the held-out images, ascending int64; empty for a detector loaded from a file.

    Examples:
        >>> detector = ReContrastDetector(steps=500, false_alarm_rate=0.05).fit(good_images)  # doctest: +SKIP
        >>> detector.predict(new_images)  # doctest: +SKIP
        array([ 1, -1])
    """

    def __init__(
        self,
        recipe: Recipe | str = "mvtec",
        *,
        backbone: str | None = None,
        weights: str | None = None,
        steps: int | None = None,
        batch: int | None = None,
        size: int | tuple[int, int] | None = None,
        encoder_lr: float | None = None,
        decoder_lr: float | None = None,
        false_alarm_rate: float | None = 0.05,
        holdout: float | int | None = None,
        roi: RegionOfInterest | None = None,
        random_state: int | None = None,
        device: str | None = None,
    ) -> None:
        self.recipe = recipe
        self.backbone = backbone
        self.weights = weights
        self.steps = steps
        self.batch = batch
        self.size = size
        self.encoder_lr = encoder_lr
        self.decoder_lr = decoder_lr
        self.false_alarm_rate = false_alarm_rate
        self.holdout = holdout
        self.roi = roi
        self.random_state = random_state
        self.device = device

    # ---- fitting -------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: ArrayLike | None = None, *, groups: ArrayLike | None = None) -> "ReContrastDetector":
        """Train on good images, and calibrate on those held out.

        Args:
            X: Images, see the class. They are decoded once and kept in memory. Copies of one image count once in the
                calibration, and are never divided between training and calibration.
            y: Labels (n,), +1 for good and -1 for a defect; only the good images are used, as in a cross-validation
                with labels. None: all images are good.
            groups: Group of each image (n,), such as the serial number of a part. Images of one group are never divided
                between training and calibration, whose promise is one about groups. None: each image is its own.

        Returns:
            The detector itself.

        Raises:
            ValueError: If a parameter or an image is invalid, or there are too few good images for the promise.
            OSError: If a file cannot be read.
        """
        recipe, images = list_images(X, self._recipe())
        views = max(len(recipe.view_names), 1)
        parts = range(len(images) // views)
        good = np.arange(len(parts)) if y is None else np.flatnonzero(check_labels(parts, y) == 1)
        if not len(good):
            raise ValueError(f"fit: y: wanted +1 for at least one image, got none among {len(parts)}")
        names = None if groups is None else check_fit_groups(parts, groups)[good]
        count = len(good) if names is None else len(set(names.tolist()))
        resolve_holdout_count(count, self.false_alarm_rate, self.holdout)  # before any image is decoded
        images = [image for index in good for image in images[index * views : (index + 1) * views]]
        check_region(recipe, images)
        recipe = fix_bits(fix_window(recipe, images), images)
        decoded = InMemoryImages(images, recipe.size, recipe.crop, recipe.bits, recipe.window)[np.arange(len(images))]
        whole = decoded if views == 1 else decoded.reshape(-1, views, *decoded.shape[1:])
        split = split_images(whole, self.false_alarm_rate, self.holdout, recipe.seed, names)
        device = resolve_device(self.device)
        with isolate_random_state():
            result = train(recipe, PartImages(decoded, split.training, views), device=device)
            calibration = None
            if self.false_alarm_rate is not None:
                calibration = calibrate(
                    result.model, recipe, PartImages(decoded, split.held_out, views), rate=self.false_alarm_rate,
                    batch=recipe.batch, source=f"{len(split.held_out)} of {len(good)} images given to fit",
                    groups=split.groups.tolist(),
                )  # fmt: skip
        self._take(replace(result.state, calibration=calibration), result.model)
        self.losses_, self.held_out_ = np.asarray(result.losses), good[split.held_out]
        return self

    def _recipe(self) -> Recipe:
        """Return the recipe with the parameters that are not None."""
        if not isinstance(self.recipe, Recipe | str):
            raise ValueError(f"recipe: wanted a Recipe, a name or a YAML file, got {type(self.recipe).__name__}")
        base = yaml_file.load_recipe(self.recipe) if isinstance(self.recipe, str) else self.recipe
        names = ("backbone", "weights", "steps", "batch", "size", "encoder_lr", "decoder_lr")
        changes = {name: to_python_number(value) for name in names if (value := getattr(self, name)) is not None}
        if self.random_state is not None:
            changes["seed"] = to_python_number(self.random_state)
        if self.roi is not None:
            changes["roi"] = resolve_roi(self.roi)[0]
        return refuse_tiles(base.replace(**changes, holdout=0.0), "recipe")  # held out here, from X

    def _take(self, state: Checkpoint, model: Any) -> None:
        self._state, self.model_ = state, model.eval()
        calibration = InferenceOptions().valid_calibration(state.recipe, state.calibration)
        self.recipe_, self.calibration_ = state.recipe, calibration
        self.offset_ = math.nan if calibration is None else -calibration.threshold

    # ---- scores and decisions ------------------------------------------------------------------------------------

    def score_samples(self, X: Any) -> NDArray[np.float64]:
        """Compute the negative anomaly score of each image: larger is more normal.

        `recontrast predict` writes the anomaly score itself, without the minus sign.

        Args:
            X: Images, see the class.

        Returns:
            (n,) float64.

        Raises:
            NotFittedError: If `fit` was not called.
            ValueError: If an image is invalid.
            OSError: If a file cannot be read.
        """
        return -np.concatenate([scores for _, scores in self._run(X)])

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Compute ``score_samples(X) - offset_``: below 0 is a defect.

        Args:
            X: Images, see the class.

        Returns:
            (n,) float64.

        Raises:
            NotFittedError: If `fit` was not called.
            ValueError: If an image is invalid, or there is no calibration.
            OSError: If a file cannot be read.
        """
        self._calibrated("decision_function")
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> NDArray[np.int64]:
        """Return +1 for good images and -1 for defects, whose p-value is at most ``false_alarm_rate``.

        An image whose anomaly map is not finite has the score NaN and is undecided: 0, and a warning names its index.

        Args:
            X: Images, see the class.

        Returns:
            (n,) int64.

        Raises:
            NotFittedError: If `fit` was not called.
            ValueError: If an image is invalid, or there is no calibration.
            OSError: If a file cannot be read.
        """
        calibration = self._calibrated("predict")
        scores = -self.score_samples(X)
        undecided = np.flatnonzero(np.isnan(scores))
        for index in undecided.tolist():
            warnings.warn(describe_undecided(f"image {index} (counted from 0)"), stacklevel=2)
        labels = np.where(calibration.is_defect(scores), -1, 1)
        labels[undecided] = 0
        return labels

    def p_values(self, X: Any) -> NDArray[np.float64]:
        """Compute conformal p-values; images with small values are unlike the good images.

        Args:
            X: Images, see the class.

        Returns:
            (n,) float64 in [1 / (m + 1), 1], with m images held out.

        Raises:
            NotFittedError: If `fit` was not called.
            ValueError: If an image is invalid, or there is no calibration.
            OSError: If a file cannot be read.
        """
        calibration = self._calibrated("p_values")
        return calibration.p_values(-self.score_samples(X))

    def anomaly_maps(self, X: Any) -> NDArray[np.float32]:
        """Compute anomaly maps; larger values are *more anomalous*.

        Args:
            X: Images, see the class.

        Returns:
            (n, H, W) float32 with H, W = ``recipe_.out``.

        Raises:
            NotFittedError: If `fit` was not called.
            ValueError: If an image is invalid.
            OSError: If a file cannot be read.
        """
        return np.concatenate([maps for maps, _ in self._run(X)])

    def _run(self, X: Any) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float64]]]:
        check_is_fitted(self)
        recipe = self.recipe_
        given = list_images(X, recipe)[1]
        images = InMemoryImages(given, recipe.size, recipe.crop, recipe.bits, recipe.window)
        check_region(recipe, given)
        move_model(self.model_, resolve_device(self.device), recipe.channels_last)
        for maps, scores in infer(self.model_, images, recipe, batch=self.batch or recipe.batch):
            yield maps.float().cpu().numpy(), scores.cpu().double().numpy()

    def _calibrated(self, method: str) -> Calibration:
        check_is_fitted(self)
        if self.calibration_ is None:
            raise ValueError(
                f"{method}: wanted a detector with a calibration, got one without: fit with a false_alarm_rate, or run "
                "recontrast calibrate on its checkpoint"
            )
        return self.calibration_

    # ---- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a checkpoint for `recontrast predict`, `evaluate` and other commands; training cannot resume from it.

        Args:
            path: File to write, or a checkpoint to replace.
            overwrite: Whether a file that this package did not write may be replaced.

        Returns:
            The path.

        Raises:
            NotFittedError: If `fit` was not called.
            ValueError: If the path is that of a file of others.
            OSError: If the file cannot be written; an earlier one stays.
        """
        check_is_fitted(self)
        check_replaceable(Path(path).parent, [Path(path).name], overwrite=overwrite, option="path")
        return checkpoints.save(path, self._on_cpu())

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, device: str | None = None) -> "ReContrastDetector":
        """Load a fitted detector from a checkpoint; no training data are needed.

        Args:
            path: File written by `recontrast train` or `save`.
            device: As in the class.

        Returns:
            The detector.

        Raises:
            ValueError: If the file is no checkpoint, is damaged, or holds a detector of tiles.
            OSError: If the file cannot be read.
        """
        state = checkpoints.load(path)
        rate = None if state.calibration is None else state.calibration.rate
        detector = cls(state.recipe, false_alarm_rate=rate, device=device)
        detector._restore(state, path)
        detector.losses_, detector.held_out_ = np.empty(0), np.empty(0, np.int64)
        return detector

    def _restore(self, state: Checkpoint, path: str | Path) -> None:
        refuse_tiles(state.recipe, f"{path}")
        checkpoints.check_calibration(state, path)
        with isolate_random_state():
            model = checkpoints.build(state, path)
        self._take(replace(state, model=model.state_dict(), optimisers=[], rng={}), model)

    def _on_cpu(self) -> Checkpoint:
        return replace(self._state, model={name: value.cpu() for name, value in self.model_.state_dict().items()})

    def __getstate__(self) -> dict[str, Any]:
        """Return the parameters, and the fitted state as bytes of a checkpoint, independent of the device."""
        state = super().__getstate__()
        if "model_" in state:
            state = {name: value for name, value in state.items() if name not in ("model_", "_state")}
            file = io.BytesIO()
            checkpoints.write(file, self._on_cpu())
            state["checkpoint"] = file.getvalue()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled detector; parameters that its version did not have take their defaults."""
        signature = inspect.signature(type(self))
        defaults = {name: signature.parameters[name].default for name in self._get_param_names()}
        state = {**{n: value for n, value in defaults.items() if value is not inspect.Parameter.empty}, **state}
        content = state.pop("checkpoint", None)
        super().__setstate__(state)
        if content is not None:
            name = "the pickled detector"
            self._restore(checkpoints.read(io.BytesIO(content), name), name)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "model_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        tags.input_tags.string = True
        return tags
