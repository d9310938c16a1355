"""Pictures that were saved again: in another format or quality, rescaled, or with another brightness.

Their pixels differ, so that `recontrast.data.copies` takes them for different images. Here, images are compared by
sketches: the fine structure of the image at 32 x 32 pixels. A picture and its near-copy correlate by 0.965 and more.
Different photographs of one part in a fixed position correlate as much, so that the correlation alone does not tell
them from near-copies. A near-copy must therefore also stand out: at most four other images, and one of eight, may be
nearly as similar, and the two must share what the most similar other images cannot explain (least squares).

Measured on four sets of real photographs at 256 px (screws, magnetic tiles, fabrics, skin lesions; 1426 images): one
pair is taken for near-copies, two exposures of one screw that was not moved. Of 240 pictures that were saved again,
all are found at JPEG quality 85 and 95, rescaled by 0.97, and with brightness, contrast or gamma changed by 5 to 10 %;
239 rescaled by 0.9; 237 at JPEG quality 70; 229 at WebP quality 80; 193 at JPEG quality 50. Cropped, turned and
mirrored pictures are not found. A sketch takes 0.2 ms, 2 % of the time to read a JPEG file of 1 megapixel and 0.7 % of
that for PNG; searching 1000 images takes 0.1 s, and 5000 images 3 to 5 s.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from recontrast.data.listing import PathLike

MOST_SKETCHES = 5000  # images among which near-copies are searched; the time grows with the square, 3 s for this many
SKETCH_LENGTH = 32 * 32
_SIDE = 32
_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue, as in Pillow (ITU-R BT.601)
_NEAR = 0.965  # correlation of near-copies, also of what sets them apart from similar images
_OWN = 0.85  # correlation of what sets near-copies apart if the scene does not move; that of photographs is near 0
_SAME = 0.998  # correlation above which nothing is left that could tell two photographs apart
_FIXED = 0.95  # correlation of most images with several others if the scene does not move
_MOST_COPIES = 5  # near-copies of one picture; more similar images than that show one scene
_SHARE = 8  # images of a set for each near-copy of one picture; similar images of a smaller set show one scene
_NEIGHBOURS = 16  # similar images whose common structure is removed
_LEAST_CONTRAST = 0.1  # standard deviation of the fine structure, in grey levels; below, it is rounding noise


def sketch_image(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Reduce an image to the fine structure that stays when it is saved again, rescaled, or made brighter.

    Args:
        pixels: (H, W, 3), uint8, or float32 in [0, 1].

    Returns:
        Grey means of 32 x 32 parts of the image, less the means of their 3 x 3 neighbourhoods, scaled to norm 1,
        (1024,) float32; zeros for an image without structure.
    """
    if pixels.dtype == np.uint8:
        grey = Image.fromarray(np.ascontiguousarray(pixels)).convert("L").convert("F")
    else:
        grey = Image.fromarray(pixels @ (255 * _GREY))
    small = np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32)
    padded = np.pad(small, 1, mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    fine = (small - (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / np.float32(9)).ravel()
    fine -= fine.mean()
    norm = float(np.linalg.norm(fine))
    return fine / np.float32(norm) if norm > _LEAST_CONTRAST * _SIDE else np.zeros_like(fine)


def sketch_views(sketches: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Join the sketches of the views of a part to one, whose correlation with that of another part is about their mean.

    Parts of which one view looks the same, such as a view that shows nothing but the background, are no near-copies.

    Args:
        sketches: Result of `sketch_image` for each view, in their order.

    Returns:
        Sum of the sketches, scaled to norm 1, (1024,) float32; that of a single image as it is. From the second view
        on, the signs are changed by a pattern of its own, so that views under opposite lights do not cancel.
    """
    if len(sketches) == 1:
        return sketches[0]
    signed = np.stack([sketch * _draw_signs(view) for view, sketch in enumerate(sketches)])
    total: NDArray[np.float32] = signed.sum(axis=0, dtype=np.float32)
    norm = float(np.linalg.norm(total))
    return np.asarray(total / np.float32(norm or 1))


def _draw_signs(view: int) -> NDArray[np.float32]:
    """Return 1024 signs, the same on every machine; those of the first view are positive."""
    bits = hashlib.shake_128(b"view %d" % view).digest(SKETCH_LENGTH // 8) if view else bytes(SKETCH_LENGTH // 8)
    return 1 - 2 * np.unpackbits(np.frombuffer(bits, np.uint8)).astype(np.float32)


def encode_sketches(sketches: Sequence[NDArray[np.float32]]) -> str:
    """Encode sketches for a checkpoint; `read_sketches` is the inverse.

    Args:
        sketches: Results of `sketch_image`.

    Returns:
        Base64 text of little-endian float16 numbers; empty for more than `MOST_SKETCHES` images.
    """
    if len(sketches) > MOST_SKETCHES:
        return ""
    return base64.b64encode(b"".join(sketch.astype("<f2").tobytes() for sketch in sketches)).decode()


def read_sketches(images: Mapping[str, Any]) -> NDArray[np.float32]:
    """Return the sketches in a description of images.

    Args:
        images: Description in a checkpoint, see `recontrast.data.fingerprint.describe_images`.

    Returns:
        (n, 1024) float32; empty for checkpoints without valid sketches, such as those of older versions.
    """
    try:
        values = np.frombuffer(base64.b64decode(images.get("sketches", ""), validate=True), "<f2").astype(np.float32)
    except (ValueError, TypeError):  # the base64 module raises both
        values = np.empty(0, np.float32)
    if values.size % SKETCH_LENGTH or not np.isfinite(values).all():
        values = np.empty(0, np.float32)
    return values.reshape(-1, SKETCH_LENGTH)


def find_near_copies(sketches: NDArray[np.float32]) -> list[tuple[int, int]]:
    """Find pictures that seem to be another one of a set, saved again or rescaled.

    Args:
        sketches: Results of `sketch_image`, (n, 1024) float32.

    Returns:
        Pairs of positions, the smaller one first, in ascending order; empty for more than `MOST_SKETCHES` images.
    """
    if len(sketches) > MOST_SKETCHES:
        return []
    first: dict[bytes, int] = {}
    owners = [first.setdefault(sketch.tobytes(), index) for index, sketch in enumerate(sketches)]
    different = np.array(sorted(set(owners)), np.int64)
    pairs = {(owner, index) for index, owner in enumerate(owners) if owner < index and sketches[index].any()}
    return sorted(pairs | {(int(different[a]), int(different[b])) for a, b in _search(sketches[different])})


def shows_one_scene(sketches: NDArray[np.float32]) -> bool:
    """Return whether a set of images shows the same without any change: one picture saved again, or a part not moved.

    Args:
        sketches: Results of `sketch_image`, (n, 1024) float32.

    Returns:
        Whether the mean correlation of all pairs of at least three images is above 0.998.
    """
    n = len(sketches)
    if n < 3:
        return False
    total = sketches.sum(0, dtype=np.float64)
    own = float((sketches.astype(np.float64) ** 2).sum())  # n, less the images without structure
    return (float(total @ total) - own) / (n * (n - 1)) >= _SAME


def match_known(sketches: NDArray[np.float32], known: NDArray[np.float32]) -> list[tuple[int, int]]:
    """Find pictures that seem to be one of a known set, saved again or rescaled.

    Args:
        sketches: Results of `sketch_image` for new images, (n, 1024) float32.
        known: Those of the known set, (m, 1024) float32.

    Returns:
        For each new image with a near-copy in the known set, its position and that of one near-copy.
    """
    if not len(known) or not len(sketches):
        return []
    matches: dict[int, int] = {}
    for first, second in find_near_copies(np.concatenate([known, sketches])):
        if first < len(known) <= second:
            matches.setdefault(second - len(known), first)
    return sorted(matches.items())


def merge_copies(first: Sequence[int], pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Merge groups of copies.

    Args:
        first: Position of the first image of its group, for each image, see `recontrast.data.copies.group_equal_files`.
        pairs: Pairs of positions that belong to one group, the smaller one first.

    Returns:
        Position of the first image of its group, for each image.
    """
    parents = list(range(len(first)))  # disjoint sets, whose root is the smallest position

    def find_root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    for low, high in (*enumerate(first), *pairs):
        roots = find_root(low), find_root(high)
        parents[max(roots)] = min(roots)
    return [find_root(index) for index in range(len(first))]


def describe_near_copies(
    paths: Sequence[PathLike], pairs: Sequence[tuple[int, int]], consequence: str, noun: str = "image"
) -> str | None:
    """Describe near-copies in a sentence.

    Args:
        paths: Paths or names of the images.
        pairs: Result of `find_near_copies`.
        consequence: What follows from them.
        noun: What is counted, see `recontrast.recipes.recipe.Recipe.noun`.

    Returns:
        The sentence, with the number of images that have an earlier near-copy and one pair; None if there are none.
    """
    if not pairs:
        return None
    count = len({second for _, second in pairs})
    first, second = pairs[0]
    return (
        f"{count} of {len(paths)} {noun}s seem to be another one of them, saved again or rescaled (for example "
        f"{paths[second]} and {paths[first]}): {consequence}"
    )


def describe_one_scene(count: int, sketches: NDArray[np.float32], noun: str = "image") -> str | None:
    """Describe in a sentence that all images show one scene.

    Args:
        count: Number of images.
        sketches: Their sketches, (n, 1024) float32.
        noun: What is counted, see `recontrast.recipes.recipe.Recipe.noun`.

    Returns:
        The sentence; None if they do not, see `shows_one_scene`.
    """
    if not shows_one_scene(sketches):
        return None
    return (
        f"all {count} {noun}s show the same without any change, as one picture saved many times or one part that was "
        f"not moved: such {noun}s say little about other parts"
    )


def describe_trained(paths: Sequence[PathLike], count: int, noun: str = "image") -> str | None:
    """Describe near-copies of training images in a sentence.

    Args:
        paths: New images that seem to be training images, see `match_known`.
        count: Number of new images.
        noun: What is counted, see `recontrast.recipes.recipe.Recipe.noun`.

    Returns:
        The sentence, with the first two names; None if there are none.
    """
    if not paths:
        return None
    names = ", ".join(map(str, paths[:2])) + (" ..." if len(paths) > 2 else "")
    return f"{len(paths)} of {count} {noun}s seem to be training {noun}s, saved again or rescaled: {names}"


def _search(sketches: NDArray[np.float32]) -> set[tuple[int, int]]:
    """Return the pairs of near-copies among sketches that all differ."""
    n = len(sketches)
    pairs: set[tuple[int, int]] = set()
    if n < 2:
        return pairs
    count = min(n - 1, _NEIGHBOURS + _MOST_COPIES + 1)
    order, similarity = _find_neighbours(sketches, count)
    is_fixed = n < 4 or float(np.median(similarity[:, min(5, n // 2 - 1)])) >= _FIXED
    for index in np.flatnonzero(similarity[:, 0] >= _NEAR).tolist():
        for rank in range(min(3, count)):
            if similarity[index, rank] >= _NEAR and _stands_out(
                sketches, index, rank, order[index], similarity[index], is_fixed
            ):
                other = int(order[index, rank])
                pairs.add((min(index, other), max(index, other)))
    return pairs


def _find_neighbours(sketches: NDArray[np.float32], count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the most similar other images of each image, and their correlations in descending order, (n, count)."""
    n = len(sketches)
    order, similarity = np.empty((n, count), np.int64), np.empty((n, count), np.float32)
    for start in range(0, n, 512):
        block = sketches[start : start + 512] @ sketches.T
        rows = np.arange(len(block))
        block[rows, rows + start] = -2  # the image itself
        best = np.argpartition(-block, count - 1, axis=1)[:, :count]
        values = np.take_along_axis(block, best, 1)
        ranks = np.argsort(-values, axis=1, kind="stable")
        order[start : start + len(block)] = np.take_along_axis(best, ranks, 1)
        similarity[start : start + len(block)] = np.take_along_axis(values, ranks, 1)
    return order, similarity


def _stands_out(
    sketches: NDArray[np.float32],
    index: int,
    rank: int,
    order: NDArray[np.int64],
    similarity: NDArray[np.float32],
    is_fixed: bool,
) -> bool:
    """Return whether a neighbour is far more similar to an image than all but a few others.

    Args:
        sketches: All sketches.
        index: Position of the image.
        rank: Rank of the neighbour among all neighbours of the image.
        order: Positions of the neighbours.
        similarity: Their correlations.
        is_fixed: Whether most images show one scene that does not move.
    """
    distance = max(1 - float(similarity[rank]), 1e-4)  # half of the squared distance
    is_close = similarity >= 1 - 4 * distance
    is_close[rank] = True
    if is_close.sum() > min(_MOST_COPIES, len(sketches) // _SHARE):
        return not is_fixed and float(similarity[rank]) >= _SAME
    pair = sketches[[index, order[rank]]].T
    basis = sketches[order[~is_close][:_NEIGHBOURS]].T
    rest = pair - basis @ np.linalg.lstsq(basis, pair, rcond=None)[0]
    norms = np.linalg.norm(rest, axis=0)
    return float(rest[:, 0] @ rest[:, 1]) >= (_OWN if is_fixed else _NEAR) * float(norms.prod()) > 0
