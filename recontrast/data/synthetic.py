"""A synthetic data set without a download: photographs from scikit-image, with drawn defects and their masks.

Training and test images are cut from parts of a photograph that do not overlap. They vary only in position, scale and
mirroring. Most defects are detectable, but not all, so that scores can differ.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from recontrast.data.atomic import replace_file
from recontrast.data.heatmaps import save_png
from recontrast.data.json_text import parse_json
from recontrast.data.listing import is_hidden
from recontrast.data.regular_file import read_bytes
from recontrast.data.temporary import move_folder, sweep, temporary_folder

NAMES = ("brick", "grass", "gravel")
KINDS = ("scratch", "stain", "hole", "misplaced")
TRAIN_SHARE = 0.55  # share of a photograph's width used for training; the rest is for the test
SCALES = (0.5, 0.6)  # side of a crop relative to the image; crops are enlarged, to suit a small bottleneck
MIN_CONTRAST = 18  # mean difference between a defect and the surface that it covers, grey levels
MAX_TRIES = 20  # then the last attempt is used: on a uniform image, a misplaced piece is never visible
# Files of `make_demo`, with the split of the images and the number of the image.
_OWN_PATH = re.compile(
    rf"({'|'.join(NAMES)})/(train(?=/good)|test|ground_truth)/(good|{'|'.join(KINDS)})/(\d{{3,6}})(_mask)?\.png"
)
MARKER_FILE = "synthetic.json"  # identifies folders made by `make_demo`; only such folders are replaced


def photographs() -> dict[str, np.ndarray]:
    """Read photographs of brick, grass and gravel from the installed scikit-image.

    Returns:
        Greyscale images by name, each (512, 512) uint8.

    Raises:
        ImportError: If scikit-image is not installed.
    """
    spec = find_spec("skimage")  # located, not imported: the import takes a second
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("photographs: wanted the package scikit-image, got none installed: pip install scikit-image")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    return {name: np.asarray(Image.open(folder / f"{name}.png").convert("L")) for name in NAMES}


def make_demo(
    root: Path | str,
    *,
    train: int = 60,
    test: int = 32,
    size: int = 128,
    seed: int = 0,
    overwrite: bool = False,
    before_change: Callable[[], None] | None = None,
) -> Path:
    """Write the data set in MVTec AD layout, as greyscale PNG: ``root/NAME/{train,test,ground_truth}/...``.

    A folder from an earlier call is used again if the arguments are the same, and replaced otherwise.

    Args:
        root: Folder to write, new, empty or made by this function.
        train: Number of good training images per category.
        test: Number of good test images per category, and number of defective ones, which are divided evenly among the
            kinds of defect.
        size: Side of an image, from 32 to 256 pixels.
        seed: Seed for crops and defects.
        overwrite: Whether files of others in a folder from an earlier call may be removed.
        before_change: Called before ``root`` is created or replaced, when all arguments are checked.

    Returns:
        ``root``.

    Raises:
        ValueError: If an argument is out of range, or ``root`` contains files that this function did not write.
        ImportError: If scikit-image is not installed.
    """
    root = Path(root)
    if not 32 <= size <= 256:
        raise ValueError(f"synthetic images: size: wanted 32 to 256 pixels, got {size}")
    if train < 1 or test < len(KINDS):
        raise ValueError(f"synthetic images: wanted train >= 1 and test >= {len(KINDS)}, got {train} and {test}")
    arguments = {"train": train, "test": test, "size": size, "seed": seed, "version": 1}
    if root.exists() and any(root.iterdir()):
        if not (root / MARKER_FILE).is_file():
            raise ValueError(f"{root} is not empty and was not made by the demo: name another folder")
        if (former := _read_marker(root / MARKER_FILE)) == arguments:
            return root
        if not overwrite:
            _refuse_other_files(root, former)
    root.parent.mkdir(parents=True, exist_ok=True)
    sweep(root.parent)
    with temporary_folder(root.parent) as draft:
        _draw_all(draft, train, test, size, seed)
        with replace_file(draft / MARKER_FILE) as file:
            file.write(json.dumps(arguments).encode())
        if before_change is not None:
            before_change()
        with temporary_folder(root.parent) as replaced:
            if root.exists():
                os.replace(root, replaced / "data")
            move_folder(draft, root)
    return root


def _read_marker(path: Path) -> dict[str, Any]:
    """Return the arguments of the call that made a folder; empty if its marker is damaged."""
    try:
        content = parse_json(read_bytes(path))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _refuse_other_files(root: Path, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if a folder of an earlier call holds a file that the call did not write."""
    counts = {split: count for split in ("train", "test") if isinstance(count := arguments.get(split), int)}
    for path in sorted(root.rglob("*")):
        if (path.is_dir() and not path.is_symlink()) or is_hidden(path.name) or path == root / MARKER_FILE:
            continue
        match = _OWN_PATH.fullmatch(path.relative_to(root).as_posix())
        if match is None or int(match[4]) >= counts.get("train" if match[2] == "train" else "test", 0):
            raise ValueError(f"{root}: wanted a folder with nothing but images of the demo, which are drawn anew, "
                             f"got {path}: move it, name another folder or add --overwrite")  # fmt: skip


def _draw_all(root: Path, train: int, test: int, size: int, seed: int) -> None:
    """Write the images of all categories."""
    for category, (name, photo) in enumerate(photographs().items()):
        rng = np.random.default_rng((seed, category))
        border = int(photo.shape[1] * TRAIN_SHARE)
        for index in range(train):
            save_png(root / name / "train" / "good" / f"{index:03}.png", _cut(photo[:, :border], size, rng))
        for index in range(test):
            save_png(root / name / "test" / "good" / f"{index:03}.png", _cut(photo[:, border:], size, rng))
        for index, kind in [(i // len(KINDS), KINDS[i % len(KINDS)]) for i in range(test)]:
            picture, mask = draw_defect(_cut(photo[:, border:], size, rng), kind, rng)
            save_png(root / name / "test" / kind / f"{index:03}.png", picture)
            save_png(root / name / "ground_truth" / kind / f"{index:03}_mask.png", mask.astype(np.uint8) * 255)


def draw_defect(image: np.ndarray, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a defect on a copy of an image.

    Args:
        image: Greyscale image, (H, W) uint8, both sides at least 32 pixels.
        kind: Kind of defect, one of `KINDS`.
        rng: Random generator for position, shape and strength.

    Returns:
        The image with the defect, (H, W) uint8, and its mask, (H, W) bool.

    Raises:
        ValueError: If ``kind`` is unknown, or ``image`` has another shape or dtype.
    """
    if kind not in DRAW:
        raise ValueError(f"draw_defect: kind: wanted one of {', '.join(KINDS)}, got {kind!r}")
    if image.ndim != 2 or image.dtype != np.uint8 or min(image.shape) < 32:
        raise ValueError(
            f"draw_defect: image: wanted (H, W) uint8 of at least 32 x 32, got {image.dtype} {image.shape}"
        )
    for _ in range(MAX_TRIES):
        opacity, drawn = DRAW[kind](image.astype(np.float64), rng)
        mask = opacity > 0.4 * opacity.max()
        mixed = np.rint(np.clip(image * (1 - opacity) + drawn * opacity, 0, 255))
        if np.abs(mixed - image)[mask].mean() >= MIN_CONTRAST:
            break  # otherwise the defect is invisible, such as plain brick on plain brick
    return mixed.astype(np.uint8), mask


def _cut(part: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a random square out of ``part`` (H, W), resize it to ``size``, and mirror it with probability 1/2."""
    side = min(round(size * rng.uniform(*SCALES)), *part.shape)
    top, left = (rng.integers(0, length - side + 1) for length in part.shape)
    square = Image.fromarray(part[top : top + side, left : left + side]).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(square)[:, :: rng.choice([-1, 1])]


def _render(size: tuple[int, ...], draw: Callable[[ImageDraw.ImageDraw], None], soft: float) -> np.ndarray:
    """Render a shape with antialiasing: draw it at four times the size, shrink and blur it. (H, W), in [0, 1]."""
    canvas = Image.new("L", (size[1] * 4, size[0] * 4))
    draw(ImageDraw.Draw(canvas))
    canvas = canvas.resize((size[1], size[0]), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(soft))
    return np.asarray(canvas) / 255.0


def _draw_spot(size: tuple[int, ...], radius: float, soft: float, rng: np.random.Generator) -> np.ndarray:
    """Draw an irregular spot of about ``radius`` pixels, completely inside the image. (H, W), in [0, 1]."""
    reach = 1.4 * radius
    centre = [rng.uniform(reach, length - reach) for length in size[::-1]]
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    waves = sum(rng.uniform(-0.4, 0.4) / k * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5))
    stretch = rng.uniform(0.75, 1.25)
    x = centre[0] + radius * (1 + waves) * np.cos(angle) * stretch
    y = centre[1] + radius * (1 + waves) * np.sin(angle) / stretch
    outline = list(zip((x * 4).tolist(), (y * 4).tolist(), strict=True))
    return _render(size, lambda pen: pen.polygon(outline, fill=255), soft)


def _draw_scratch(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a thin curved line, lighter or darker than the surface."""
    side = min(image.shape)
    length, direction, bend = side * rng.uniform(0.25, 0.5), rng.uniform(0, np.pi), rng.uniform(-0.02, 0.02)
    centre = [rng.uniform(0.3, 0.7) * n for n in image.shape[::-1]]
    along = np.linspace(-0.5, 0.5, 24) * length
    angle = direction + bend * along
    x, y = centre[0] + along * np.cos(angle), centre[1] + along * np.sin(angle)
    line = list(zip((x * 4).tolist(), (y * 4).tolist(), strict=True))
    width = max(round(4 * side / 128 * rng.uniform(1.4, 2.6)), 2)
    opacity = _render(image.shape, lambda pen: pen.line(line, fill=255, width=width, joint="curve"), 0.4)
    return opacity, image + rng.choice([-1, 1]) * rng.uniform(60, 120)


def _draw_stain(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a soft spot, darker or lighter, through which the surface is visible."""
    opacity = _draw_spot(image.shape, min(image.shape) * rng.uniform(0.08, 0.16), min(image.shape) * 0.015, rng)
    gain = rng.choice([rng.uniform(0.4, 0.65), rng.uniform(1.3, 1.6)])
    return opacity, image * gain


def _draw_hole(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a dark hole."""
    opacity = _draw_spot(image.shape, min(image.shape) * rng.uniform(0.045, 0.08), 0.6, rng)
    floor = np.percentile(image, 2) * rng.uniform(0.6, 1.0)
    return opacity, floor + rng.normal(0, 3, image.shape)


def _draw_misplaced(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a piece of the same surface, enlarged and rotated by 90 degrees."""
    opacity = _draw_spot(image.shape, min(image.shape) * rng.uniform(0.1, 0.17), 0.8, rng)
    zoom = rng.uniform(1.7, 2.4)
    h, w = (round(n / zoom) for n in image.shape)
    top, left = rng.integers(0, image.shape[0] - h + 1), rng.integers(0, image.shape[1] - w + 1)
    rotated = np.rot90(image[top : top + h, left : left + w], rng.choice([1, 3]))
    resized = Image.fromarray(rotated.astype(np.float32)).resize(
        (image.shape[1], image.shape[0]), Image.Resampling.BICUBIC
    )
    return opacity, np.asarray(resized, np.float64)


DRAW = {"scratch": _draw_scratch, "stain": _draw_stain, "hole": _draw_hole, "misplaced": _draw_misplaced}
