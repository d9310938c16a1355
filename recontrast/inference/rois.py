"""Regions of interest of a list of images, at the size of their anomaly maps."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from recontrast.data.datasets import Sample
from recontrast.data.images import image_size
from recontrast.data.roi import (
    EACH,
    ImageRois,
    RoiFolder,
    RoiList,
    check_aspect,
    check_mask,
    decode_mask,
    describe_roi,
    encode_mask,
    fit_mask,
    read_roi,
    resize_mask,
)
from recontrast.recipes.recipe import Recipe

RegionOfInterest = str | Path | NDArray[np.bool_]  # a mask image, JSON file or folder of masks; or a mask


class Masks(Protocol):
    """Masks (n, H, W) of maps, bool, indexed by an array of positions (n,)."""

    def __getitem__(self, index: Any, /) -> NDArray[np.bool_]: ...


class Rois:
    """Masks of images: one for all of them, or one for each.

    Args:
        recipe: Recipe with ``roi``, for the mask, size, crop and map size. With ``tile``, masks keep the size of their
            images, see `read`.
        masks: Mask or JSON file of each image, where ``recipe.roi`` is "each".
        images: Path of each image; None if the images have no files.

    Attributes:
        shared: Mask of all maps, (H, W) bool; None if each image has its own, or with tiles.

    Raises:
        ValueError: If each image has its own mask and none are given, or no pixel of the map is inside.
    """

    def __init__(
        self, recipe: Recipe, masks: Sequence[Path] | None = None, images: Sequence[Path] | None = None
    ) -> None:
        self.shared: NDArray[np.bool_] | None = None
        self._has_tiles = recipe.tile is not None
        self._each: ImageRois | None = None
        self._whole: NDArray[np.bool_] | None = None
        size = None if recipe.tile is not None else recipe.size
        if recipe.roi == EACH:
            if masks is None:
                raise ValueError("roi: wanted a mask for each image, as the detector was trained with, got none: give "
                                 "--roi a folder of masks, or the samples a mask each")  # fmt: skip
            self._each = ImageRois(masks, images, size, recipe.crop, recipe.map_out)
        elif recipe.roi is not None:
            self._whole = decode_mask(recipe.roi)
            if recipe.tile is None:
                self.shared = fit_mask(self._whole, size, recipe.crop, recipe.map_out)

    def __getitem__(self, index: Any) -> NDArray[np.bool_]:
        """Return the masks of the maps at the positions ``index`` (n,): (n, H, W), or (1, H, W) for a shared one."""
        if self._each is not None:
            return self._each[index]
        if self.shared is None:
            raise ValueError("roi: wanted masks of whole images, got a recipe of tiles")
        return self.shared[None]

    def read(self, position: int, shape: Sequence[int], name: str) -> NDArray[np.bool_]:
        """Return the mask of an image at its own size.

        Args:
            position: Position of the image.
            shape: Height and width of the image.
            name: Name of the image in the error message.

        Returns:
            Mask of ``shape``, bool.

        Raises:
            ValueError: If the mask has another aspect ratio than the image, or cannot be read.
        """
        if self._each is not None:
            return self._each.read(position)
        if self._whole is None:
            return np.ones(tuple(shape), bool)
        check_aspect(self._whole.shape, shape, "roi", name)
        return resize_mask(self._whole, shape)

    def check(self, shape: Sequence[int], name: str) -> None:
        """Raise ValueError if the shared mask has another aspect ratio than an image of ``shape``."""
        if self._whole is not None:
            check_aspect(self._whole.shape, shape, "roi", name)

    def read_map(self, position: int, shape: Sequence[int]) -> NDArray[np.bool_]:
        """Return the mask of the map of an image.

        Args:
            position: Position of the image.
            shape: Height and width of the map; with tiles those of the image.

        Returns:
            Mask of ``shape``, bool.
        """
        if self._has_tiles:
            return self.read(position, shape, "the image")
        return self[np.array([position])][0]


def select_inside(
    batches: Iterable[tuple[NDArray[Any], NDArray[Any]]], rois: Rois | None
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Reduce maps to their pixels inside, for statistics over pixels.

    Args:
        batches: Maps (n, H, W) and scores (n,), batch by batch, in the order of the images.
        rois: Regions of interest of the images; None keeps the maps.

    Yields:
        The batches, with maps (1, P) of one image each if there are regions.
    """
    position = 0
    for maps, scores in batches:
        if rois is None:
            yield maps, scores
            continue
        for row in range(len(scores)):
            yield maps[row][rois.read_map(position, maps.shape[1:])][None], scores[row : row + 1]
            position += 1


def open_rois(recipe: Recipe, samples: Sequence[Sample]) -> Rois | None:
    """Return the regions of interest of samples, and check that they fit the images.

    Args:
        recipe: Recipe with ``roi``.
        samples: Samples with image files.

    Returns:
        The regions; None if the recipe has none.

    Raises:
        ValueError: If a sample has no mask where each needs its own, or a mask has another aspect ratio than its image.
    """
    if recipe.roi is None:
        return None
    paths = [sample.path for sample in samples]
    if recipe.roi == EACH:
        masks = [sample.roi for sample in samples]
        missing = [path for path, mask in zip(paths, masks, strict=True) if mask is None]
        if missing:
            raise ValueError(f"{missing[0]}: wanted a region of interest for each image, got none for this one")
        return Rois(recipe, [mask for mask in masks if mask is not None], paths)
    check_images(recipe, paths)
    return Rois(recipe, images=paths)


def resolve_roi(roi: RegionOfInterest, option: str = "roi") -> tuple[str, RoiFolder | None]:
    """Read a region of interest that a user gives.

    Args:
        roi: Mask image, JSON file, folder with a mask for each image, or mask (H, W) as an array of bool.
        option: Name of the option or argument, for error messages.

    Returns:
        Value of the recipe field ``roi``, and the folder if it is one.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If it is not a region of interest, see `recontrast.data.roi.read_roi`.
    """
    if isinstance(roi, np.ndarray):
        if roi.ndim != 2 or roi.dtype != bool:
            raise ValueError(f"{option}: wanted a mask (H, W) of bool, got {roi.shape} of {roi.dtype}")
        return encode_mask(check_mask(roi, option)), None
    if Path(roi).is_dir():
        return EACH, RoiFolder(roi)
    return encode_mask(read_roi(roi)), None


def apply_roi(recipe: Recipe, roi: RegionOfInterest | None) -> tuple[Recipe, RoiFolder | None]:
    """Return a recipe with another region of interest.

    Args:
        recipe: Recipe of the training.
        roi: As in `resolve_roi`; None keeps that of the recipe.

    Returns:
        The recipe, and the folder of the masks if each image has its own.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If it is not a region of interest.
    """
    if roi is None:
        return recipe, None
    text, folder = resolve_roi(roi)
    return recipe.replace(roi=text), folder


def describe_other_roi(trained: Recipe, recipe: Recipe) -> str | None:
    """Explain why a calibration for one region of interest is invalid for another.

    Args:
        trained: Recipe of the training.
        recipe: Recipe of the detector.

    Returns:
        The reason, to follow the path of the detector in a message; None if both have the same region.
    """
    if trained.roi == recipe.roi:
        return None
    wanted, got = describe_roi(trained.roi), describe_roi(recipe.roi)
    return f"its calibration is for another region of interest, {wanted}, not {got}: no decisions are made"


def add_rois(groups: Mapping[str, Sequence[Sample]], folder: RoiFolder | None) -> dict[str, list[Sample]]:
    """Give each sample its mask in a folder.

    Args:
        groups: Samples by category.
        folder: Folder of the masks; None changes nothing.

    Returns:
        The samples by category.

    Raises:
        ValueError: If a sample has no mask in the folder.
    """
    if folder is None:
        return {name: list(samples) for name, samples in groups.items()}
    return {name: [replace(s, roi=folder.find(s.path)) for s in samples] for name, samples in groups.items()}


def read_sample(recipe: Recipe, sample: Sample, shape: Sequence[int]) -> NDArray[np.bool_] | None:
    """Return the region of interest of a sample at the size of its image.

    Args:
        recipe: Recipe with ``roi``.
        sample: Sample with an image file.
        shape: Height and width of the image.

    Returns:
        Mask of ``shape``, bool; None for the whole image.

    Raises:
        ValueError: If the mask does not fit or cannot be read.
    """
    rois = open_rois(recipe, [sample])
    return None if rois is None else rois.read(0, shape, str(sample.path))


def open_folder(recipe: Recipe, folder: RoiFolder | RoiList | None, paths: Sequence[Path]) -> Rois | None:
    """Return the regions of interest of image files.

    Args:
        recipe: Recipe with ``roi``.
        folder: Folder or list with the mask of each image, where ``recipe.roi`` is "each".
        paths: Image files.

    Returns:
        The regions; None if the recipe has none.

    Raises:
        ValueError: If an image has no mask where each needs its own.
    """
    if recipe.roi is None:
        return None
    return Rois(recipe, None if folder is None or recipe.roi != EACH else folder.list_for(paths), paths)


def check_images(recipe: Recipe, paths: Sequence[Path]) -> None:
    """Raise ValueError if the shared mask has another aspect ratio than an image; unreadable files are left out.

    Args:
        recipe: Recipe with ``roi``.
        paths: Image files.

    Raises:
        ValueError: If it does not fit.
    """
    if recipe.roi in (None, EACH):
        return
    shape = decode_mask(str(recipe.roi)).shape
    for path in paths:
        try:
            size = image_size(path)
        except (OSError, ValueError):  # reported where the image is read
            continue
        check_aspect(shape, size, "roi", str(path))
