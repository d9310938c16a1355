"""Detectors in exported files, run by ONNX Runtime, OpenVINO or torch.export."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recontrast.checkpoint.fields import parse_calibration, parse_recipe
from recontrast.data.exact_length import max_exact_length
from recontrast.data.image_files import ImageFiles
from recontrast.data.regular_file import check_regular, is_regular
from recontrast.data.roi import RoiFolder, RoiList
from recontrast.data.sidecar import check_sidecar
from recontrast.data.sources import Images
from recontrast.data.tiles import TileMasks
from recontrast.data.window import pixel_dtype
from recontrast.inference.blend import blend_tiles, limit_batch
from recontrast.inference.file_checks import ForeignFileError
from recontrast.inference.part_maps import join_parts
from recontrast.inference.programs import PROGRAMS, DeviceError, NamedArrays, Program
from recontrast.inference.protocol import Detector, MapsAndScores
from recontrast.inference.rois import RegionOfInterest, Rois, apply_roi, describe_other_roi, open_folder
from recontrast.inference.tiled_files import score_files
from recontrast.recipes.recipe import to_pair

if TYPE_CHECKING:
    import torch

DECODED_AHEAD = 4  # images in memory at their original size
PIXELS_PER_CALL = 2**23  # the graph holds several float copies of its input; a single image may be larger


class ExportedDetector(Detector):
    """Detector in a file that `recontrast export` wrote.

    See `recontrast.inference.protocol.Detector` for the other attributes.

    Args:
        path: Path of the .onnx, .pt2 or .xml file.
        device: None or the CPU; for an .onnx file also CUDA ("cuda", "cuda:1"), with ``onnxruntime-gpu``.
        precision: "bfloat16" computes an .xml file in it, whatever it was exported in. None: as the file asks for.
        roi: Region of interest in place of that of a file of tiles with one, see `recontrast.inference.rois.apply_roi`.
            Another region than the stored one makes the stored calibration invalid.

    Attributes:
        path: Path of the file.
        program: Loaded program, for direct calls with arrays of images.
        description: Content of the stored description: recipe, preprocessing, calibration, digest of the weights.
        input_size: Height and width of all images; None for images of any size.
        input_batch: Number of images in each call of the program; None for any number.
        has_masks: Whether the region of interest is an input of the program, of tiles with one. Else it is part of it.
        stored_recipe: Recipe in the file; ``recipe`` may have another region of interest.
        roi_folder: Masks of images that each have their own, or None.
        images: Description of the training images, with their fingerprints
            (`recontrast.data.fingerprint.read_fingerprints`); empty for files of earlier versions.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file was not written by `recontrast export`, is damaged, has another format version, or
            differs from the SHA-256 in a file ``FILE.sha256`` beside it; or if its runtime cannot use the device, or
            ``roi`` is given for a file in which the region is fixed.
        ImportError: If the runtime of the file is not installed.
    """

    def __init__(
        self, path: Path, device: "str | torch.device | None" = None, *, precision: str | None = None,
        roi: RegionOfInterest | None = None,
    ) -> None:  # fmt: skip
        kind, is_onnx = str(device or "cpu").partition(":")[0], path.suffix.lower() == ".onnx"
        if kind != "cpu" and not (kind == "cuda" and is_onnx):
            wanted = "the CPU or CUDA for an .onnx file" if is_onnx else f"the CPU for an exported {path.suffix} file"
            raise ValueError(f"{path}: wanted {wanted}, got device {str(device)!r}")
        check_regular(path, "an exported detector")
        for file in (path, path.with_suffix(".bin")) if path.suffix.lower() == ".xml" else (path,):
            if is_regular(file):  # a missing .bin has its own message
                check_sidecar(file)
        try:
            arguments = (str(device),) if kind != "cpu" else () if precision is None else (precision,)
            self.program: Program = PROGRAMS[path.suffix.lower()](path, *arguments)
        except (ImportError, MemoryError, ForeignFileError, DeviceError):
            raise
        except Exception as error:  # each runtime raises exceptions of its own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(
                f"{path}: wanted a whole {path.suffix} file, got one that does not load: {reason}"
            ) from error
        self.path, self.description = path, self.program.description
        self.stored_recipe = parse_recipe(self.description["recipe"])
        self.calibration = parse_calibration(self.description["calibration"])
        self.category, self.max_map_value = self.description["category"], float(self.description["top"])
        self.calibration_note = None
        self._set_region(roi)
        self.overlap = None if self.recipe.tile is None else int(self.description["overlap"])
        size = self.description.get("input_size")
        self.input_size: tuple[int, int] | None = None if size is None else (size[0], size[1])
        self.input_batch: int | None = self.description.get("input_batch")
        self.images: dict[str, Any] = self.description.get("images") or {}
        self._inside: NDArray[np.bool_] | None = None  # region of interest of the maps of parts

    def __repr__(self) -> str:
        decides = "no calibration" if self.calibration is None else f"false-alarm rate {self.calibration.rate:g}"
        size = " x ".join(map(str, self.recipe.out)) + (" px tiles" if self.recipe.tile else " px")
        return f"ExportedDetector({str(self.path)!r}: {self.category}, {self.recipe.backbone}, {size}, {decides})"

    def run(self, files: ImageFiles, batch: int) -> Iterator[MapsAndScores]:
        """Compute maps and scores; consecutive images of the same size share a batch.

        A detector of tiles reads one image at a time, and its tiles share batches. Views of a part are in one batch.

        Args:
            files: Images to score.
            batch: Largest number of images, or of tiles, per batch; at least one part.

        Yields:
            Maps (N, H, W) and scores (N,), float32, in the order of the files.

        Raises:
            ValueError: If the network fails, or its outputs are not those of a detector.
        """
        if self.overlap is not None:
            rois = open_folder(self.recipe, self.roi_folder, files.paths)
            yield from score_files(
                lambda pixels, inside: self.score_tiled(pixels, batch, inside=inside), files, self.recipe, rois
            )
            return
        group: list[NDArray[Any]] = []  # of each part (views, H, W, 3); an image is a part with one view
        recipe, views = self.recipe, self.recipe.image_views
        count = 1 if views is None else len(views)
        if recipe.roi is not None and files.check_shape is None:
            files.check_shape = Rois(recipe).check
        for indices in files.group(DECODED_AHEAD, recipe.window, count):
            for index, decoded in zip(
                indices, files.read_many(indices, recipe.bits, recipe.window, views), strict=True
            ):
                pixels = decoded if decoded is None or views is not None else decoded[None]
                part = self._replace_unusable(files, index, pixels, count)
                limit = min(batch, _limit_images(part))
                limit = max((self.input_batch or limit) // count, 1)
                if group and (len(group) >= limit or group[0].shape != part.shape):
                    yield self.score_parts(np.concatenate(group))
                    group = []
                group.append(part)
        if group:
            yield self.score_parts(np.concatenate(group))

    def score_parts(self, images: NDArray[Any]) -> MapsAndScores:
        """Do the same as `score`, and join the maps of the views of each part.

        Args:
            images: RGB images (N, H, W, 3), see `score`; the views of a part in sequence.

        Returns:
            Maps (N / views, h, w) and scores (N / views,), float32.

        Raises:
            ValueError: As in `score`.
        """
        maps, scores = self.score(images)
        if self.recipe.image_views is not None and self.recipe.roi is not None and self._inside is None:
            self._inside = Rois(self.recipe).shared
        return join_parts(maps, scores, self.recipe, self._inside)

    def score(self, images: NDArray[Any], inside: NDArray[np.bool_] | None = None) -> MapsAndScores:
        """Run the program on images of one size, and check its outputs.

        Args:
            images: RGB images (N, H, W, 3), uint8, or float32 in [0, 1] with a window.
            inside: As in `run_program`.

        Returns:
            Maps (N, h, w) and scores (N,), float32.

        Raises:
            ValueError: If the network fails, or its outputs are not those of a detector.
        """
        if self.input_size is not None and images.shape[1:3] != self.input_size:
            raise ValueError(f"{self.path}: wanted images{self._describe_size(images.shape[1:3])}")
        try:
            results = self.run_program(images, inside)
        except MemoryError:
            raise
        except Exception as error:  # each runtime raises exceptions of its own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{self.path}: wanted a network that runs, got one that fails: {reason}") from error
        maps, scores = results.get("map"), results.get("score")
        count = len(images)
        if maps is None or scores is None or maps.ndim != 3 or scores.shape != (count,) or len(maps) != count:
            shapes = ", ".join(f"{name} {value.shape}" for name, value in results.items())[:200]
            raise ValueError(f"{self.path}: wanted a map and a score for each of {count} images, got {shapes}")
        return maps, scores

    def run_program(self, images: NDArray[Any], inside: NDArray[np.bool_] | None = None) -> NamedArrays:
        """Run the program, in several calls if the images are many, or more than the number that it takes.

        Args:
            images: RGB images (N, H, W, 3), uint8, or float32 in [0, 1] with a window.
            inside: Whether each pixel of a tile is in the region of interest, (N, H, W) bool, if the program has masks.
                None: all are.

        Returns:
            Outputs by name, see `recontrast.inference.programs.Program`.
        """
        if self.has_masks and inside is None:
            inside = np.ones(images.shape[:3], bool)
        inputs = (images,) if inside is None else (images, inside)
        batch = self.input_batch or _limit_images(images)
        if self.input_batch is None and len(images) <= batch:
            return self.program(*inputs)
        parts = []
        for start in range(0, len(images), batch):
            chosen = [values[start : start + batch] for values in inputs]
            count = len(chosen[0])
            if self.input_batch is not None:  # the last call is filled up
                chosen = [np.concatenate([values, np.repeat(values[-1:], batch - count, 0)]) for values in chosen]
            parts.append({name: values[:count] for name, values in self.program(*chosen).items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _describe_size(self, got: Sequence[int]) -> str:
        wanted = "{} x {}".format(*self.input_size or ("H", "W"))
        return f" of {wanted} px (height x width), for which the file was exported, got {got[0]} x {got[1]}"

    def _set_region(self, roi: RegionOfInterest | None) -> None:
        """Set the recipe, with the region of interest of the file or another one, for which it is not calibrated."""
        stored = self.recipe = self.stored_recipe
        self.has_masks = stored.tile is not None and stored.roi is not None
        self.roi_folder: RoiFolder | RoiList | None = None
        if roi is None:
            return
        if not self.has_masks:
            reason = "in which the region of interest is fixed" if stored.tile is None else "of tiles without a region"
            raise ValueError(f"{self.path}: roi: wanted none for an exported file {reason}, got one")
        self.recipe, self.roi_folder = apply_roi(stored, roi)
        if self.calibration is not None and (mismatch := describe_other_roi(stored, self.recipe)) is not None:
            self.calibration, self.calibration_note = None, f"{self.path}: {mismatch}"

    def score_tiled(
        self, pixels: NDArray[Any], batch: int, release: bool = True, inside: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.float32], float]:
        """Cut an image into tiles, and blend their maps, as `recontrast.inference.tiling.score_tiled_image` does.

        Args:
            pixels: Image (H, W, 3), uint8, or float32 in [0, 1] with a window.
            batch: Largest number of tiles per batch; fewer on a CPU, see `recontrast.inference.blend.limit_batch`, and
                `input_batch` if the program takes a fixed number.
            release: Whether to release the memory of ``pixels`` while the map grows. Their content is lost.
            inside: Region of interest, whether each pixel is inside, (H, W) bool; tiles wholly outside are not
                computed. None: that of the recipe.

        Returns:
            The anomaly map (H, W), float32, and the score.

        Raises:
            ValueError: If the detector is not one of tiles, the region of the recipe has another aspect ratio than the
                image, the network fails, or its outputs are not those of a detector.
        """
        if self.recipe.tile is None or self.overlap is None:
            raise ValueError(f"{self.path}: wanted a detector of tiles, got one of whole images")
        count = self.input_batch or limit_batch(batch, self.recipe.tile)
        if inside is None and self.recipe.roi is not None:
            inside = Rois(self.recipe).read(0, pixels.shape[:2], "the image")

        def score_tiles(tiles: Images, masks: TileMasks | None) -> Iterator[MapsAndScores]:
            for start in range(0, len(tiles), count):
                index = np.arange(start, min(start + count, len(tiles)))
                yield self.score(tiles[index], None if masks is None else masks[index])

        return blend_tiles(score_tiles, pixels, self.recipe, self.overlap, inside=inside, release=release)

    def _replace_unusable(
        self, files: ImageFiles, index: int, part: NDArray[Any] | None, views: int
    ) -> NDArray[Any]:  # fmt: skip
        """Return ``part`` (views, H, W, 3), or a black one if it could not be read or is too large for the graph."""
        size = self.input_size or to_pair(self.recipe.size)
        black = np.zeros((views, *size, 3), pixel_dtype(self.recipe.window))
        if part is None:
            return black
        height, width = part.shape[1:3]
        if self.input_size is not None:
            if (height, width) == size:
                return part
            files.errors[index] = f"{files.paths[index]}: wanted an image{self._describe_size((height, width))}"
            return black
        limit = max_exact_length(size[0]), max_exact_length(size[1])
        if height <= limit[0] and width <= limit[1]:
            return part
        files.errors[index] = (
            f"{files.paths[index]}: wanted an image that the resize of an exported detector reproduces, of at most "
            f"{limit[0]} x {limit[1]} px (height x width), got {height} x {width}"
        )
        return black


def _limit_images(images: NDArray[Any]) -> int:
    """Return how many images of the size of these (N, H, W, 3) a program takes in a call."""
    return max(PIXELS_PER_CALL // (images.shape[1] * images.shape[2]), 1)
