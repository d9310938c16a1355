"""A data set without a download: photographs that scikit-image's wheel carries, with drawn defects and their masks.

Train and test pictures are cut from parts of a photograph that do not overlap; they vary in place, scale and by
mirroring only. The defects are meant to be found, but not all of them: the score must be able to fail.
"""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from recontrast.data.atomic import replace_file
from recontrast.data.heatmaps import save_png

NAMES = ("brick", "grass", "gravel")
KINDS = ("scratch", "stain", "hole", "misplaced")
SPLIT = 0.55  # share of the photograph's width that training sees; the test sees the rest
SCALES = (0.5, 0.6)  # of the part that is cut, against the picture's size: enlarged, for a small bottleneck to hold it
VISIBLE = 18  # grey levels by which a defect must differ from what it covers, on average
TRIES = 20  # then the last one is taken: a plain picture has nothing to misplace
MARK = "synthetic.json"  # names what made a folder: only such a folder is ever replaced


def photographs() -> dict[str, np.ndarray]:
    """Read the photographs from the installed scikit-image; nothing is downloaded.

    Returns:
        name -> (512, 512) uint8 grey, for brick, grass and gravel.

    Raises:
        ImportError: where scikit-image is not installed.
    """
    spec = find_spec("skimage")  # found, not imported: that would take a second
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the photographs come with scikit-image, which is not installed: pip install 'recontrast[demo]'"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data"
    return {name: np.asarray(Image.open(folder / f"{name}.png").convert("L")) for name in NAMES}


def make_demo(root: Path | str, *, train: int = 60, test: int = 32, size: int = 128, seed: int = 0) -> Path:
    """Write the data set in MVTec AD layout: ``root/NAME/{train,test,ground_truth}/...`` as grey PNG.

    A folder that this function made before is used again if the arguments are the same, and replaced otherwise.

    Args:
        root: folder to write; it must not hold anything else.
        train: good pictures for training, per category.
        test: good pictures and, as many again, defective ones (an equal number of each kind), per category.
        size: side of a picture in pixels, 32 to 256.
        seed: of the cuts and the defects.

    Returns:
        ``root``.
    """
    root = Path(root)
    if not 32 <= size <= 256:
        raise ValueError(f"synthetic pictures: size must be 32 to 256 pixels, got {size}")
    if train < 1 or test < len(KINDS):
        raise ValueError(f"synthetic pictures: wanted train >= 1 and test >= {len(KINDS)}, got {train} and {test}")
    made = {"train": train, "test": test, "size": size, "seed": seed, "version": 1}
    if root.exists() and any(root.iterdir()):
        if not (root / MARK).is_file():
            raise ValueError(f"{root} is not empty and was not made by the demo: name another folder")
        if json.loads((root / MARK).read_text()) == made:
            return root
        shutil.rmtree(root)
    for number, (name, photo) in enumerate(photographs().items()):
        rng = np.random.default_rng((seed, number))
        border = int(photo.shape[1] * SPLIT)
        for index in range(train):
            save_png(root / name / "train" / "good" / f"{index:03}.png", _cut(photo[:, :border], size, rng))
        for index in range(test):
            save_png(root / name / "test" / "good" / f"{index:03}.png", _cut(photo[:, border:], size, rng))
        for index, kind in [(i // len(KINDS), KINDS[i % len(KINDS)]) for i in range(test)]:
            picture, mask = draw_defect(_cut(photo[:, border:], size, rng), kind, rng)
            save_png(root / name / "test" / kind / f"{index:03}.png", picture)
            save_png(root / name / "ground_truth" / kind / f"{index:03}_mask.png", mask.astype(np.uint8) * 255)
    with replace_file(root / MARK) as file:  # last: an interrupted run leaves no mark ...
        file.write(json.dumps(made).encode())
    return root


def draw_defect(image: np.ndarray, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one defect.

    Args:
        image: (H, W) uint8 grey, both sides at least 32.
        kind: one of `KINDS`.
        rng: place, shape and strength come from it.

    Returns:
        the image with the defect, (H, W) uint8, and its mask, (H, W) bool.
    """
    if kind not in DRAW:
        raise ValueError(f"draw_defect: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if image.ndim != 2 or image.dtype != np.uint8 or min(image.shape) < 32:
        raise ValueError(
            f"draw_defect: image must be (H, W) uint8 of at least 32 x 32, got {image.dtype} {image.shape}"
        )
    for _ in range(TRIES):
        opacity, drawn = DRAW[kind](image.astype(np.float64), rng)
        mask = opacity > 0.4 * opacity.max()
        mixed = np.rint(np.clip(image * (1 - opacity) + drawn * opacity, 0, 255))
        if np.abs(mixed - image)[mask].mean() >= VISIBLE:
            break  # plain brick on plain brick, say, would be a label without a defect
    return mixed.astype(np.uint8), mask


def _cut(part: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a square of about ``size`` anywhere in ``part`` (H, W), resize it to ``size``, mirror every other one."""
    side = min(round(size * rng.uniform(*SCALES)), *part.shape)
    top, left = (rng.integers(0, length - side + 1) for length in part.shape)
    square = Image.fromarray(part[top : top + side, left : left + side]).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(square)[:, :: rng.choice([-1, 1])]


def _shape(size: tuple[int, ...], draw: Callable[[ImageDraw.ImageDraw], None], soft: float) -> np.ndarray:
    """Render what ``draw`` draws at four times the size, smoothed: (H, W) in [0, 1]."""
    canvas = Image.new("L", (size[1] * 4, size[0] * 4))
    draw(ImageDraw.Draw(canvas))
    canvas = canvas.resize((size[1], size[0]), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(soft))
    return np.asarray(canvas) / 255.0


def _blob(size: tuple[int, ...], radius: float, soft: float, rng: np.random.Generator) -> np.ndarray:
    """An irregular round spot of about ``radius`` pixels, wholly inside: (H, W) in [0, 1]."""
    reach = 1.4 * radius
    centre = [rng.uniform(reach, length - reach) for length in size[::-1]]
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    waves = sum(rng.uniform(-0.4, 0.4) / k * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5))
    stretch = rng.uniform(0.75, 1.25)
    x = centre[0] + radius * (1 + waves) * np.cos(angle) * stretch
    y = centre[1] + radius * (1 + waves) * np.sin(angle) / stretch
    outline = list(zip((x * 4).tolist(), (y * 4).tolist(), strict=True))
    return _shape(size, lambda pen: pen.polygon(outline, fill=255), soft)


def _scratch(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A thin bent line, a little lighter or darker than what it crosses."""
    side = min(image.shape)
    length, direction, bend = side * rng.uniform(0.25, 0.5), rng.uniform(0, np.pi), rng.uniform(-0.02, 0.02)
    centre = [rng.uniform(0.3, 0.7) * n for n in image.shape[::-1]]
    along = np.linspace(-0.5, 0.5, 24) * length
    turned = direction + bend * along
    x, y = centre[0] + along * np.cos(turned), centre[1] + along * np.sin(turned)
    line = list(zip((x * 4).tolist(), (y * 4).tolist(), strict=True))
    width = max(round(4 * side / 128 * rng.uniform(1.4, 2.6)), 2)
    opacity = _shape(image.shape, lambda pen: pen.line(line, fill=255, width=width, joint="curve"), 0.4)
    return opacity, image + rng.choice([-1, 1]) * rng.uniform(60, 120)


def _stain(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A soft spot in which the surface shows through, darker or lighter."""
    opacity = _blob(image.shape, min(image.shape) * rng.uniform(0.08, 0.16), min(image.shape) * 0.015, rng)
    gain = rng.choice([rng.uniform(0.4, 0.65), rng.uniform(1.3, 1.6)])
    return opacity, image * gain


def _hole(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A dark pit with a rim."""
    opacity = _blob(image.shape, min(image.shape) * rng.uniform(0.045, 0.08), 0.6, rng)
    floor = np.percentile(image, 2) * rng.uniform(0.6, 1.0)
    return opacity, floor + rng.normal(0, 3, image.shape)


def _misplaced(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A piece of the same surface, enlarged and turned by a quarter."""
    opacity = _blob(image.shape, min(image.shape) * rng.uniform(0.1, 0.17), 0.8, rng)
    zoom = rng.uniform(1.7, 2.4)
    h, w = (round(n / zoom) for n in image.shape)
    top, left = rng.integers(0, image.shape[0] - h + 1), rng.integers(0, image.shape[1] - w + 1)
    turned = np.rot90(image[top : top + h, left : left + w], rng.choice([1, 3]))
    resized = Image.fromarray(turned.astype(np.float32)).resize(
        (image.shape[1], image.shape[0]), Image.Resampling.BICUBIC
    )
    return opacity, np.asarray(resized, np.float64)


DRAW = {"scratch": _scratch, "stain": _stain, "hole": _hole, "misplaced": _misplaced}
