"""Predictions as Python objects: score, decision, regions and anomaly map of each image, drawn on request."""

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from recontrast.data import heatmaps
from recontrast.data.roi import EACH, decode_mask, resize_mask
from recontrast.data.views import show_view
from recontrast.inference import drawing
from recontrast.inference.given_images import GivenImages, list_given, read_pixels

if TYPE_CHECKING:
    from recontrast.inference.decisions import Region
    from recontrast.inference.detector import Detector

__all__ = ["GivenImages", "Prediction", "Predictions", "list_given", "predict"]


@dataclass(frozen=True, eq=False)  # arrays have no single truth value
class Prediction:
    """Prediction of a detector for one image.

    Attributes:
        name: Path of the image, or "image 3" for the fourth image given in memory.
        score: Anomaly score; larger is more anomalous. NaN if the image could not be read or its map is not finite.
        p_value: Share of good images that score at least as high, in (0, 1] (split conformal, Vovk et al., 2005); NaN
            if the score is. None without a calibration.
        decision: "good" or "defect", or "undecided" if the score is NaN because the map is not finite; None without a
            calibration, or if the image could not be read.
        regions: Anomalous regions of a defect in pixels of the original image, the highest peak first. Empty for
            good images. None without a calibration or without a pixel threshold.
        anomaly_map: Anomaly map (h, w), float32, in the resolution of the detector. It covers the part of the image
            that `recontrast.inference.detector.map_extent` gives. None if the image could not be read.
        error: Why the image could not be read; else None.
    """

    name: str
    score: float
    p_value: float | None
    decision: Literal["good", "defect", "undecided"] | None
    regions: "tuple[Region, ...] | None"
    anomaly_map: NDArray[np.float32] | None = field(repr=False)
    error: str | None = None
    _source: Any = field(default=None, repr=False)  # path, PIL image or array; read again when it is drawn
    _recipe: Any = field(default=None, repr=False)
    _pixel_threshold: float | None = field(default=None, repr=False)
    _colors: tuple[float, float] = field(default=(0.0, 1.0), repr=False)  # map values of the coldest and hottest color

    def image(self) -> Image.Image:
        """Return the upright image in its own size, as RGB.

        Returns:
            The image.

        Raises:
            ValueError: If the image could not be read.
        """
        if self.error is not None:
            raise ValueError(self.error)
        scale = (None, None) if self._recipe is None else (self._recipe.bits, self._recipe.window)
        source = self._source if self._recipe is None else show_view(self._source, self._recipe.image_views)
        return Image.fromarray(read_pixels(source, self.name, *scale))

    def heat_map(self) -> Image.Image:
        """Return the anomaly map laid over the image.

        All predictions of one call share one color range. With a calibration, its middle is the threshold.

        Returns:
            The overlay in the size of the original image.

        Raises:
            ValueError: If the image could not be read.
        """
        pixels = np.asarray(self.image())
        return Image.fromarray(drawing.draw_heat(pixels, self._fit_map(pixels.shape[:2]), self._colors))

    def draw(self) -> Image.Image:
        """Draw the image, its heat map, and the image with the regions outlined, side by side.

        If all images share a region of interest, it has a blue outline.

        Returns:
            An RGB picture with a caption: decision, score and p-value.

        Raises:
            ValueError: If the image could not be read.
        """
        pixels = drawing.fit_for_display(self.image())
        anomaly = self._fit_map(pixels.shape[:2])
        if self._recipe is not None and self._recipe.roi not in (None, EACH):
            region = resize_mask(decode_mask(self._recipe.roi), pixels.shape[:2])
            pixels = drawing.draw_outlines(pixels, region, drawing.ROI_OUTLINE)
        panels = [pixels, drawing.draw_heat(pixels, anomaly, self._colors)]
        if self.regions and self._pixel_threshold is not None:
            panels.append(drawing.draw_outlines(pixels, anomaly > self._pixel_threshold))
        return drawing.join_panels(panels, self._build_caption())

    def show(self) -> None:
        """Show the drawing: in a notebook below the cell, elsewhere in the system's image viewer."""
        try:
            from IPython import get_ipython
            from IPython.display import display
        except ImportError:
            get_ipython = None  # type: ignore[assignment]
        if get_ipython is not None and hasattr(get_ipython(), "kernel"):
            display(self)
        else:
            self.draw().show(title=self.name)

    def _repr_png_(self) -> bytes | None:
        """PNG of the drawing, which notebooks display; None if the image could not be read."""
        if self.error is not None:
            return None
        png = io.BytesIO()
        self.draw().save(png, "PNG")
        return png.getvalue()

    def _build_caption(self) -> str:
        parts: list[str] = [] if self.decision is None else [self.decision]
        parts.append(f"score {self.score:.4g}")
        if self.p_value is not None and math.isfinite(self.p_value):
            parts.append(f"p = {self.p_value:.3g}")
        return "   ".join(parts)

    def _fit_map(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Return the map resized to an image of ``shape`` (H, W); pixels outside the crop get its minimum."""
        from recontrast.inference.detector import map_extent

        if self.anomaly_map is None:
            raise ValueError(self.error)
        top, left, height, width = map_extent(shape, self._recipe)
        finite = self.anomaly_map[np.isfinite(self.anomaly_map)]
        whole = np.full(tuple(shape), float(finite.min()) if finite.size else np.nan, np.float32)
        whole[top : top + height, left : left + width] = heatmaps.resize_map(self.anomaly_map, (height, width))
        return whole


class Predictions(list[Prediction]):
    """List of the predictions of one call, in the order of the images."""

    @property
    def scores(self) -> NDArray[np.float64]:
        """Scores (n,), float64; NaN for images that could not be read, or whose map is not finite."""
        return np.array([prediction.score for prediction in self], np.float64)

    @property
    def defects(self) -> "Predictions":
        """Predictions whose decision is "defect"."""
        return Predictions(prediction for prediction in self if prediction.decision == "defect")

    @property
    def undecided(self) -> "Predictions":
        """Predictions of images that could be read, but whose map is not finite."""
        return Predictions(prediction for prediction in self if prediction.error is None and np.isnan(prediction.score))

    def show(self, most: int = 8) -> None:
        """Show the first ``most`` predictions, see `Prediction.show`.

        Args:
            most: Largest number of predictions to show.
        """
        for prediction in self[:most]:
            if prediction.error is None:
                prediction.show()


def predict(
    detector: "Detector", images: Any, *, false_alarm_rate: float | None = None, batch: int = 16,
    errors: Literal["raise", "keep"] = "raise",
) -> Predictions:  # fmt: skip
    """Score images, and call each good or a defect if the detector is calibrated.

    An image whose map is not finite has the score NaN and the decision "undecided"; a warning names it.

    Args:
        detector: See `recontrast.load`.
        images: One image or several, see `list_given`.
        false_alarm_rate: Promised share of good images called defects. None: the rate of the calibration.
        batch: Number of images per forward pass.
        errors: "raise" stops at an image that cannot be read; "keep" gives it a prediction with `Prediction.error`.

    Returns:
        One prediction for each image, in the order of the images; a folder gives one for each image in it.

    Raises:
        ValueError: If an image is of another type or cannot be read, or the calibration is missing or too small for
            the rate.
        FileNotFoundError: If a path does not exist.
    """
    from recontrast.inference.decisions import decide, describe_undecided, select_calibration
    from recontrast.inference.detector import run_checked

    if errors not in ("raise", "keep"):
        raise ValueError(f"predict: errors: wanted 'raise' or 'keep', got {errors!r}")
    if batch < 1:
        raise ValueError(f"predict: batch: wanted at least 1 image, got {batch}")
    calibration = select_calibration(detector, false_alarm_rate, False, detector)
    files = GivenImages(images, views=detector.recipe.image_views)
    maps: list[NDArray[np.float32]] = []
    scores: list[float] = []
    for batch_maps, batch_scores in run_checked(detector, files, batch):
        maps += list(np.asarray(batch_maps, np.float32))
        scores += batch_scores.tolist()
        if files.errors and errors == "raise":
            raise ValueError(files.errors[min(files.errors)])
    usable = [index for index, score in enumerate(scores) if index not in files.errors and math.isfinite(score)]
    scored = [maps[index] for index in usable]
    middle = None if calibration is None or detector.recipe.score != "max" else calibration.threshold
    colors = (
        heatmaps.colour_range(
            [float(np.median(anomaly)) for anomaly in scored], (float(anomaly.max()) for anomaly in scored), middle
        )
        if scored
        else (0.0, 1.0)
    )
    predictions = Predictions()
    for index, (name, source) in enumerate(zip(files.names, files.sources, strict=True)):
        if index in files.errors:
            predictions.append(Prediction(name, float("nan"), None, None, None, None, files.errors[index]))
            continue
        p_value, regions = None, None
        decision: Literal["good", "defect", "undecided"] | None = None
        if calibration is not None:
            decided = decide(calibration, maps[index], scores[index], files.shape(index), detector.recipe)
            p_value, decision = decided.p_value, decided.label
            regions = () if calibration.pixel_threshold is not None and decision == "good" else decided.regions
        threshold = None if calibration is None else calibration.pixel_threshold
        predictions.append(Prediction(
            name, scores[index], p_value, decision, regions, maps[index], None, source, detector.recipe, threshold,
            colors,
        ))  # fmt: skip
    for prediction in predictions.undecided:
        warnings.warn(describe_undecided(prediction.name), stacklevel=3)  # the caller of `Detector.predict`
    return predictions
