"""Comparison of an exported file with its checkpoint; the file is kept only where their scores agree."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from recontrast.data import heatmaps
from recontrast.data.image_files import ImageFiles
from recontrast.inference.detector import CheckpointDetector
from recontrast.inference.exported_detector import ExportedDetector

TOLERANCE = 1e-4  # largest relative difference of a score


def draw_images(folder: Path, size: tuple[int, int]) -> list[Path]:
    """Images to compare on: of the model's size, larger, smaller, odd, wide, tall, of one pixel, and grey.

    Args:
        folder: made; the images are PNG files in it.
        size: of the model's images, (height, width), pixels.

    Returns:
        Their paths.
    """
    (h, w), random = size, np.random.default_rng(0)
    sizes = [
        (h, w),
        (2 * h + 3, 2 * w + 1),
        (h // 2 + 1, w // 2),
        (h - 1, w + 1),
        (h // 3, 3 * w),
        (3 * h + 1, w // 3),
        (1, 1),
    ]
    found = []
    for place, (height, width) in enumerate([*sizes, (h + 17, w + 5)]):
        channels = 1 if place == len(sizes) else 3
        rows, columns = np.arange(height)[:, None, None] / h, np.arange(width)[:, None] / w
        waves = 60 * np.sin(9 * rows + place) * np.cos(7 * columns + np.arange(channels))
        pixels = 120 + waves + random.normal(0, 25, (height, width, channels))
        path = folder / f"{place}.png"
        heatmaps.save_png(
            path,
            pixels.clip(0, 255).astype(np.uint8).squeeze(2) if channels == 1 else pixels.clip(0, 255).astype(np.uint8),
        )
        found.append(path)
    return found


def compare_scores(
    detector: CheckpointDetector, exported: ExportedDetector, paths: Sequence[Path], tolerance: float = TOLERANCE
) -> tuple[int, float]:
    """Whether an exported file gives the scores of its checkpoint.

    Args:
        detector: the checkpoint.
        exported: the file.
        paths: images.
        tolerance: largest relative difference of a score.

    Returns:
        How many images, and the largest relative difference.

    Raises:
        ValueError: it is more than ``tolerance``; or p-values or decisions are not those of the file's own scores.
    """
    with ThreadPoolExecutor() as pool:
        files = ImageFiles(paths, pool)
        wanted, got = (np.concatenate([s for _, s in d.run(files, 4)]).astype(float) for d in (detector, exported))
        if files.errors:
            raise ValueError(next(iter(files.errors.values())))
    apart = np.abs(got - wanted) / np.maximum(np.abs(wanted), 1e-12)
    worst = int(np.argmax(np.where(np.isnan(apart), np.inf, apart)))
    if not apart[worst] <= tolerance:
        raise ValueError(
            f"export: wanted scores within {tolerance:g} of the checkpoint's (relative), got {got[worst]:.9g} instead "
            f"of {wanted[worst]:.9g} for {files.paths[worst].name}: nothing was written"
        )
    if detector.calibration is not None:
        some = exported.program(np.stack([np.zeros((5, 4, 3), np.uint8), np.full((5, 4, 3), 200, np.uint8)]))
        p, defect = detector.calibration.p_values(some["score"]), detector.calibration.is_defect(some["score"])
        if not (np.allclose(some["p_value"], p, atol=1e-6) and (some["defect"] == defect).all()):
            raise ValueError(
                f"export: wanted the calibration's p-values {p} and decisions {defect}, got {some['p_value']} and "
                f"{some['defect']}: nothing was written"
            )
    return len(files), float(apart[worst])
