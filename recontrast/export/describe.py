"""Descriptions that exported files hold."""

import json
from typing import Any

import recontrast
from recontrast.checkpoint import digest
from recontrast.data.exact_length import max_exact_length
from recontrast.data.window import parse_window
from recontrast.inference.detector import CheckpointDetector
from recontrast.inference.file_checks import CHECKSUM_KEY, FORMAT
from recontrast.recipes.recipe import to_pair


def describe_detector(
    detector: CheckpointDetector, input_size: tuple[int, int] | None = None, input_batch: int | None = None
) -> dict[str, Any]:
    """Describe a detector: everything that is needed to run its exported file, and the origin of the file.

    Args:
        detector: Detector to be exported.
        input_size: Height and width of all images; None for images of any size.
        input_batch: Number of images in each call; None for any number.

    Returns:
        Values that JSON can represent; they are stored in the file as text.
    """
    recipe, model = detector.recipe, detector.model
    dtype, resized, window = "uint8", "Pillow's BILINEAR to the bit: across, rounded, then down", {}
    if (interval := parse_window(recipe.window)) is not None:
        dtype, resized = "float32 in [0, 1]", "Pillow's BILINEAR in float32: across, then down"
        window = {"window": list(interval), "pixel": "(sample - low) / (high - low), clipped to [0, 1]"}
    size, crop = to_pair(recipe.size), None if recipe.crop is None else to_pair(recipe.crop)
    tiles: dict[str, Any] = {} if detector.overlap is None else {"overlap": detector.overlap}
    region = {} if recipe.roi is None else {
        "inside": f"bool ({input_batch or 'N'}, {recipe.tile}, {recipe.tile}): whether each pixel of a tile is in the "
        "region of interest, which is that of the image, cut and mirrored likewise",
    }  # fmt: skip
    if recipe.image_views is not None:  # each is an image of the graph
        tiles["views"] = {"names": list(recipe.view_names), "map": recipe.view_map}
    fixed = {"input_size": input_size and list(input_size), "input_batch": input_batch}
    count, shape = input_batch or "N", "H, W" if input_size is None else "{}, {}".format(*input_size)
    limits = {"largest": [max_exact_length(length) for length in size]} if input_size is None else {}
    sizes = ", any size up to the largest" if input_size is None else ""
    return tiles | {name: value for name, value in fixed.items() if value is not None} | {
        "format": FORMAT,
        "recontrast": recontrast.__version__,
        "category": detector.category,
        "top": detector.max_map_value,
        "recipe": recipe.to_dict(),
        "preprocessing": {
            "input": f"{dtype} RGB ({count}, {recipe.tile}, {recipe.tile}, 3): tiles, upright, without alpha",
            **region, "mean": list(model.mean), "std": list(model.std), **window,
        } if recipe.tile is not None else {
            "input": f"{dtype} RGB ({count}, {shape}, 3){sizes}, upright, without alpha", **limits,
            "size": size, "crop": crop, "resize": resized,
            "mean": list(model.mean), "std": list(model.std), **window,
        },
        "calibration": None if detector.calibration is None else detector.calibration.to_dict(),
        "weights": digest(model.state_dict(), recipe),
        # Without sketches, which are small pictures: by the fingerprints, calibrate refuses what was trained on.
        "images": {name: value for name, value in detector.images.items() if name in ("count", "digest", "each")},
    }  # fmt: skip


def describe(
    detector: CheckpointDetector, kind: str, precision: str = "float32", input_size: tuple[int, int] | None = None,
    input_batch: int | None = None,
) -> str:  # fmt: skip
    """Return the description of a file as JSON.

    Args:
        detector: Detector to be exported.
        kind: File format.
        precision: Precision of the file.
        input_size: As in `describe_detector`.
        input_batch: As in `describe_detector`.

    Returns:
        JSON text.
    """
    has_checksum = kind != "pt2"  # in which the archive has its own checksums
    about = describe_detector(detector, input_size, input_batch) | ({"checksum": CHECKSUM_KEY} if has_checksum else {})
    return json.dumps(about | ({} if precision == "float32" else {"precision": precision}))
