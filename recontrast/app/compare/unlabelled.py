"""Measures of a detector that need no labels: separation, conformal false alarms, and agreement between detectors."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recontrast import metrics
from recontrast.calibration.conformal import conformal_threshold
from recontrast.data.image_files import ImageFiles
from recontrast.data.roi import decode_mask, fit_mask
from recontrast.inference.detector import CheckpointDetector
from recontrast.inference.infer import infer

RATE = 0.1  # promised false-alarm rate in `count_false_alarms`, or the lowest rate that the images allow
CHUNK = 256  # images that are in memory at the same time
SHIFT = 24  # grey levels by which a pasted patch is brighter or darker, so that it is visible on uniform surfaces


def score_files(
    detector: CheckpointDetector, paths: Sequence[Path], batch: int
) -> tuple[NDArray[np.float64], list[str]]:
    """Compute the scores of image files.

    Args:
        detector: Detector of whole images.
        paths: Paths of the images.
        batch: Number of images per batch.

    Returns:
        Scores (n,), float64, with NaN for images that cannot be read, and one sentence for each of these.
    """
    scores = np.full(len(paths), np.nan)
    errors: list[str] = []
    for start in range(0, len(paths), CHUNK):
        files = ImageFiles(paths[start : start + CHUNK])
        parts = [part for _, part in detector.run(files, batch)]
        scores[start : start + len(files)] = np.concatenate(parts)
        scores[[start + position for position in files.errors]] = np.nan
        errors += files.errors.values()
    return scores, errors


def score_defaced(detector: CheckpointDetector, paths: Sequence[Path], batch: int) -> NDArray[np.float64]:
    """Compute the scores of good images into which a patch was pasted, see `paste_patch`.

    Args:
        detector: Detector of whole images.
        paths: Paths of the good images; all of them can be read.
        batch: Number of images per batch.

    Returns:
        Scores (n,), float64.
    """
    parts, recipe = [], detector.recipe
    inside = None
    if recipe.roi is not None:
        inside = fit_mask(decode_mask(recipe.roi), recipe.size, recipe.crop, recipe.out)
    views = max(len(recipe.view_names), 1)
    for pixels in read_chunks(detector, paths):
        defaced = pixels.copy()
        for index in range(len(pixels) // views):
            row = index * views + index % views  # one of the views of a part shows the patch
            defaced[row] = paste_patch(pixels[row], index, inside)
        parts += [scores.cpu().numpy() for _, scores in infer(detector.model, defaced, detector.recipe, batch=batch)]
    return np.concatenate(parts).astype(np.float64)


def read_chunks(detector: CheckpointDetector, paths: Sequence[Path]) -> Iterator[NDArray[np.uint8]]:
    """Yield the pixels (n, H, W, 3) of at most `CHUNK` images at a time, in the size of the detector.

    The views of a part are images in sequence.
    """
    recipe = detector.recipe
    for start in range(0, len(paths), CHUNK):
        files = ImageFiles(paths[start : start + CHUNK])
        images = files.resized(recipe.size, recipe.crop, recipe.bits, recipe.window, recipe.image_views)
        yield images[np.arange(len(images))]


def paste_patch(
    image: NDArray[np.uint8], seed: int, inside: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:  # fmt: skip
    """Paste a patch of an image at another place, turned by 180 degrees and brighter or darker.

    This is the artificial defect of CutPaste (Li et al., CVPR 2021), with a patch of an eighth to a quarter of a side.

    Args:
        image: Good image (H, W, 3), uint8, or float32 in [0, 1].
        seed: Seed of the places and the brightness.
        inside: Region of interest, (H, W) bool: the patch is pasted around one of its pixels. None: anywhere.

    Returns:
        Copy with the patch, (H, W, 3), of the same dtype.
    """
    rng = np.random.default_rng(seed)
    height, width = (int(rng.integers(max(side // 8, 1), max(side // 4, 1) + 1)) for side in image.shape[:2])
    (top, left), (y, x) = (
        (int(rng.integers(image.shape[0] - height + 1)), int(rng.integers(image.shape[1] - width + 1))) for _ in "12"
    )
    if inside is not None:
        middle = np.argwhere(inside)[rng.integers(np.count_nonzero(inside))]
        y, x = (
            int(np.clip(place - length // 2, 0, side - length))
            for place, length, side in zip(middle, (height, width), image.shape[:2], strict=True)
        )
    full = 255 if image.dtype == np.uint8 else 1
    shift = (SHIFT if rng.random() < 0.5 else -SHIFT) * full / 255
    patch = image[top : top + height, left : left + width][::-1, ::-1] + shift
    defaced = image.copy()
    defaced[y : y + height, x : x + width] = patch.clip(0, full)
    return defaced


def compute_separation(good: NDArray[np.float64], defaced: NDArray[np.float64]) -> float | None:
    """Compute the AUROC between good images and their defaced copies, in [0, 1]; None if there are none."""
    scores, labels = np.concatenate([good, defaced]), np.repeat([0, 1], [len(good), len(defaced)])
    scored = np.isfinite(scores)
    if len(set(labels[scored])) < 2:
        return None
    return float(metrics.auroc(scores[scored], labels[scored]))


def count_false_alarms(scores: NDArray[np.float64], seed: int = 0) -> tuple[int, int, float] | None:
    """Count the false alarms on good images that the threshold was not set with.

    The images are divided at random into two halves. Each half gets the conformal threshold of the other one.

    Args:
        scores: Scores (n,) of good images that the detector was not trained on.
        seed: Seed of the division.

    Returns:
        False alarms, images, and the promised rate in (0, 1); None for fewer than four images.
    """
    scores = scores[np.isfinite(scores)]
    if len(scores) < 4:
        return None
    mixed = np.random.default_rng(seed).permutation(scores)
    halves = mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]
    rate = max(RATE, 1 / (min(map(len, halves)) + 1))
    alarms = 0
    for calibration, others in (halves, halves[::-1]):
        alarms += int((others > conformal_threshold(tuple(sorted(calibration.tolist())), rate)).sum())
    return alarms, len(scores), rate


def compute_agreement(scores: Mapping[str, NDArray[np.float64]]) -> dict[str, dict[str, float | None]]:
    """Compute the rank correlation (Spearman) of each pair of methods.

    Args:
        scores: Scores (n,) of the same images by method.

    Returns:
        Correlation in [-1, 1] by method and other method; None if one of them gives all images the same score.
    """
    ranks = {name: rank_scores(values) for name, values in scores.items()}
    table: dict[str, dict[str, float | None]] = {name: {} for name in scores}
    for name, first in ranks.items():
        for other, second in ranks.items():
            if name != other:
                has_spread = len(first) > 1 and first.std() > 0 and second.std() > 0
                table[name][other] = float(np.corrcoef(first, second)[0, 1]) if has_spread else None
    return table


def rank_scores(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean rank (n,) of each score as float64, from 0 for the lowest to 1 for the highest."""
    from scipy.stats import rankdata

    return (rankdata(scores) - 1) / max(len(scores) - 1, 1)
