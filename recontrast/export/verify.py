"""Comparison of an exported file with its checkpoint."""

import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from recontrast.calibration.conformal import Calibration
from recontrast.data import heatmaps
from recontrast.data.image_files import ImageFiles
from recontrast.data.images import image_size
from recontrast.data.roi import EACH, RoiList, decode_mask, resize_mask
from recontrast.data.views import group_paths
from recontrast.data.window import from_levels
from recontrast.inference.detector import CheckpointDetector
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.recipes.recipe import Recipe, to_pair

Scorer = TypeVar("Scorer", CheckpointDetector, ExportedDetector)

TOLERANCE = 1e-4  # largest relative difference allowed between two scores


def graph_size(recipe: Recipe) -> tuple[int, int]:
    """Return height and width of the images that a graph resizes to, or of its tiles.

    Args:
        recipe: Recipe of the detector.

    Returns:
        Height and width in pixels.
    """
    return to_pair(recipe.size) if recipe.tile is None else recipe.out


def draw_images(
    folder: Path, size: tuple[int, int], window: tuple[float, float] | None = None,
    input_size: tuple[int, int] | None = None,
) -> list[Path]:  # fmt: skip
    """Draw images to compare scores on: at the model's size, larger, smaller, odd, wide, tall, of one pixel, and grey.

    Args:
        folder: Folder of the PNG files, created if necessary.
        size: Height and width of the model's images in pixels.
        window: Window of the model's images: they are then float TIFF files, with values beyond it; all are grey.
        input_size: Height and width of all images; None for many sizes.

    Returns:
        Paths of the images.
    """
    (h, w), random = size, np.random.default_rng(0)
    sizes = [
        (h, w), (2 * h + 3, 2 * w + 1), (h // 2 + 1, w // 2), (h - 1, w + 1), (h // 3, 3 * w), (3 * h + 1, w // 3),
        (1, 1),
    ]  # fmt: skip
    paths = []
    for index, (height, width) in enumerate([*sizes, (h + 17, w + 5)]):
        height, width = input_size or (height, width)
        channels = 1 if index == len(sizes) else 3  # the last one is grey
        rows, columns = np.arange(height)[:, None, None] / h, np.arange(width)[:, None] / w
        waves = 60 * np.sin(9 * rows + index) * np.cos(7 * columns + np.arange(channels))
        noisy = 120 + waves + random.normal(0, 25, (height, width, channels))
        if window is not None:
            low, high = window
            paths.append(folder / f"{index}.tif")
            samples = (low + (high - low) * (noisy[:, :, 0] / 240)).astype(np.float32)
            heatmaps.save_map(paths[-1], samples, "tiff32", 1.0)
            continue
        pixels = noisy.clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{index}.png")
        heatmaps.save_png(paths[-1], pixels.squeeze(2) if channels == 1 else pixels)
    return paths


def draw_masks(images: Sequence[Path], roi: str) -> dict[Path, Path]:
    """Draw a region of interest for each of the images of `draw_images`: in turn that of a recipe, and half an ellipse.

    Args:
        images: Paths of the images. The masks are written beside them.
        roi: Region of the recipe, resized to the images whatever their shape. Where it leaves no pixel, all are inside.

    Returns:
        Path of the mask by path of the image.
    """
    masks = {}
    for index, path in enumerate(images):
        height, width = image_size(path)
        y, x = np.arange(height)[:, None] / height - 0.4, np.arange(width) / width - 0.5
        mask = resize_mask(decode_mask(roi), (height, width)) if index % 2 else (9 * y**2 + 5 * x**2 < 1) & (x > -0.2)
        masks[path] = path.with_name(f"{path.stem}_mask.png")
        heatmaps.save_png(masks[path], np.where(mask | ~mask.any(), 255, 0).astype(np.uint8))
    return masks


def score_both(
    detector: CheckpointDetector, exported: ExportedDetector, paths: Sequence[Path], drawn: Sequence[Path] = ()
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str]]:
    """Score images by a checkpoint and by an exported file.

    Args:
        detector: Detector in the checkpoint.
        exported: Detector in the exported file.
        paths: Images, or the views of parts; a file that is listed twice counts once.
        drawn: Images of `draw_images`, which are scored one by one.

    Returns:
        Scores (N,) of the checkpoint and of the file, float64, and the names of the images.

    Raises:
        ValueError: If an image cannot be read.
    """
    wanted, got, names = list[float](), list[float](), list[str]()
    parts = group_paths(paths, detector.recipe.image_views)
    recipe = detector.recipe
    masks = {} if recipe.tile is None or recipe.roi is None else draw_masks(drawn, recipe.roi)
    singles = _take_single_images(detector, masks), _take_single_images(exported, masks)
    for scorers, chosen in (((detector, exported), parts), (singles, drawn)):
        if not chosen:
            continue
        with ThreadPoolExecutor() as pool:
            files = ImageFiles(chosen, pool)
            files.check_shape = lambda shape, name: None  # any shape will do, whatever the region of interest
            for scorer, scores in zip(scorers, (wanted, got), strict=True):
                scores += [score for _, batch in scorer.run(files, 4) for score in batch.tolist()]
            if files.errors:
                raise ValueError(next(iter(files.errors.values())))
        names += [path.name for path in files.paths]
    return np.array(wanted), np.array(got), names


def _take_single_images(detector: Scorer, masks: Mapping[Path, Path]) -> Scorer:
    """Return a detector for single images, whose views are not joined, with a mask for each if there are any."""
    single = copy.copy(detector)
    single.recipe = detector.recipe.of_single_images
    if masks:
        single.recipe, single.roi_folder = single.recipe.replace(roi=EACH), RoiList(masks)
    return single


def compare_scores(
    detector: CheckpointDetector, exported: ExportedDetector, paths: Sequence[Path], tolerance: float = TOLERANCE,
    drawn: Sequence[Path] = (),
) -> tuple[int, float]:  # fmt: skip
    """Compare the scores of an exported file with those of its checkpoint.

    Args:
        detector: Detector in the checkpoint.
        exported: Detector in the exported file.
        paths: Images to compare on, or the views of parts.
        tolerance: Largest relative difference allowed between two scores.
        drawn: Images of `draw_images`, which are scored one by one.

    Returns:
        Number of images, and the largest relative difference of their scores.

    Raises:
        ValueError: If a score differs by more than ``tolerance``, if p-values or decisions in the file do not match its
            scores, or if an image cannot be read.
    """
    wanted, got, names = score_both(detector, exported, paths, drawn)
    difference = check_differences(wanted, got, names, tolerance)
    if detector.calibration is not None and not detector.recipe.joins_maps:  # else the graph makes no decisions
        check_decisions(exported, detector.calibration)
    return len(names), difference


def check_differences(
    wanted: NDArray[np.float64], got: NDArray[np.float64], names: Sequence[str], tolerance: float
) -> float:
    """Compare the scores of an exported file with those of its checkpoint.

    Args:
        wanted: Scores (N,) of the checkpoint.
        got: Scores (N,) of the file.
        names: Names of the images, for the error message.
        tolerance: Largest relative difference allowed between two scores.

    Returns:
        The largest relative difference.

    Raises:
        ValueError: If a score differs by more than ``tolerance``.
    """
    differences = np.abs(got - wanted) / np.maximum(np.abs(wanted), 1e-12)
    worst = int(np.argmax(np.where(np.isnan(differences), np.inf, differences)))
    if not differences[worst] <= tolerance:  # also true for NaN
        raise ValueError(
            f"export: wanted scores within {tolerance:g} of the checkpoint's (relative), got {got[worst]:.9g} instead "
            f"of {wanted[worst]:.9g} for {names[worst]}: nothing was written"
        )
    return float(differences[worst])


def check_decisions(exported: ExportedDetector, calibration: Calibration) -> None:
    """Raise an error unless the decisions of a file follow from its scores by a calibration.

    Args:
        exported: Detector in the file.
        calibration: Calibration of its scores.

    Raises:
        ValueError: If p-values or decisions differ.
    """
    shape = (*(exported.input_size or (5, 4)), 3)
    pair = np.stack([np.zeros(shape, np.uint8), np.full(shape, 200, np.uint8)])
    outputs = exported.run_program(from_levels(pair, exported.recipe.window))
    p, defect = calibration.p_values(outputs["score"]), calibration.is_defect(outputs["score"])
    if not (np.allclose(outputs["p_value"], p, atol=1e-6) and (outputs["defect"] == defect).all()):
        raise ValueError(
            f"export: wanted the calibration's p-values {p} and decisions {defect}, got "
            f"{outputs['p_value']} and {outputs['defect']}: nothing was written"
        )
