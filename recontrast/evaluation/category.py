"""Data of one category during an evaluation: scores, maps and masks, from which its metrics are computed."""

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recontrast import metrics
from recontrast.data.datasets import Sample
from recontrast.data.image_files import describe_image_error
from recontrast.data.masks import MaskNotes
from recontrast.evaluation.ground_truth import read_ground_truth
from recontrast.evaluation.measures import Measures
from recontrast.evaluation.results import Row, ScoredImage, describe_missing
from recontrast.evaluation.sample_images import READ_ERRORS
from recontrast.inference.rois import open_rois
from recontrast.recipes.recipe import Recipe
from recontrast.runtime import distributed
from recontrast.runtime.collectives import gather_shares
from recontrast.runtime.distributed import World

LIMIT = 0.3  # false positive rate at which AUPRO ends, as in the paper


class Category:
    """Scores, maps and masks of one category, from which `compute_row` computes the metrics.

    Each process holds the scores and maps of its own share of the images until `gather`. Exact pixel metrics need all
    maps at once; streaming ones are updated batch by batch, and no map is kept.

    Args:
        name: Name of the category.
        tests: Test images of the category, of all processes.
        recipe: Recipe, for image size and masks.
        world: Processes that share the evaluation.
        readers: Threads that read masks in advance.
        streaming: Empty streaming metrics, or None for exact pixel metrics.
        memory: Number of bytes above which maps are kept in a temporary file.
        keep_errors: Whether an image that cannot be read or scored, or whose mask cannot be read, is left out of all
            metrics. Otherwise its error is raised.
        measures: Measures of a benchmark; None for none.

    Attributes:
        errors: One sentence for each image that is left out, by position in ``tests``.
    """

    def __init__(
        self,
        name: str,
        tests: Sequence[Sample],
        recipe: Recipe,
        world: World,
        readers: ThreadPoolExecutor,
        streaming: metrics.Streaming | None,
        memory: int,
        keep_errors: bool = False,
        measures: Measures | None = None,
    ) -> None:
        self.keep_errors = keep_errors
        self.measures = Measures(tests) if measures is None else measures
        self.threshold = self.measures.threshold
        self.pixel_counts = torch.zeros(3, dtype=torch.int64)  # of `metrics.count_pixels_at`, if they are streamed
        self.errors: dict[int, str] = {}
        self.name, self.tests, self.recipe, self.world, self.streaming = name, tests, recipe, world, streaming
        self.shares = world.shares(len(tests))
        share = world.share(len(tests))
        self.start = share.start  # position of the first image of this process
        own = self.own = tests[share]
        self.seconds: dict[str, float] = {}
        self.streaming_seconds = 0.0
        self.defect_count = sum(sample.label for sample in tests)
        self.maskless_count = sum(sample.label and sample.mask is None for sample in tests)
        self.scores = torch.zeros(len(own))
        self.rois = open_rois(recipe, tests)
        self.has_masks = self.defect_count > 0 and not self.maskless_count
        map_count = len(own) if self.has_masks and streaming is None else 0
        self.maps = _allocate_maps((map_count, *recipe.map_out), memory)
        # The first process computes exact metrics of all images; each process streams the maps of its own images.
        masked = [] if not self.has_masks else own if streaming is not None else tests if world.first else []
        self.defective = {index: sample for index, sample in enumerate(masked) if sample.label}
        self.notes = MaskNotes()
        # Masks at their original scale may need any amount of memory, so they are read only when they are needed.
        in_advance = {} if recipe.tile is not None else self.defective
        self.masks = {
            i: readers.submit(read_ground_truth, sample, recipe, self.notes) for i, sample in in_advance.items()
        }

    def add(self, start: int, maps: Tensor, scores: Tensor, unread: Mapping[int, str] | None = None) -> list[int]:
        """Add maps and scores of consecutive images in the share of this process.

        Args:
            start: Index of the first image in the share.
            maps: Anomaly maps (N, H, W), float32.
            scores: Scores (N,), float32.
            unread: One sentence for each image that could not be read, by index in the share.

        Returns:
            Positions in ``maps`` of the images that have a map.

        Raises:
            OSError: If a mask that is needed now cannot be read.
            ValueError: If a score is not finite, because the map is not, or a mask is invalid; the message names the
                image. With ``keep_errors``, the image is left out instead.
        """
        stop = start + len(scores)
        self.scores[start:stop] = scores.cpu()
        for index in range(start, stop):
            if unread and index in unread:
                self.errors[self.start + index] = unread[index]
            elif not self.scores[index].isfinite():
                self._leave_out(self.start + index, ValueError(
                    f"{self.own[index].path}: wanted a finite anomaly map, got NaN or infinite values: it has no score"
                ))  # fmt: skip
        with_maps = self._list_usable(self.start + start, self.start + stop)
        if self.has_masks and self.streaming is not None:
            masks = self._read_masks(start, stop, tuple(maps.shape[1:]), self.start)
            self._update_measures(start, maps)
            usable = self._list_usable(self.start + start, self.start + stop)
            begin = time.perf_counter()
            if usable:
                is_whole = len(usable) == len(scores)
                own_maps, own_masks = (maps, masks) if is_whole else (maps[usable], masks[usable])
                inside = self._read_rois([self.start + start + index for index in usable], tuple(maps.shape[1:]))
                self.streaming.update(own_maps, own_masks, inside=inside)
                if self.threshold is not None:
                    counts = metrics.count_pixels_at(own_maps, own_masks, self.threshold, inside=inside)
                    self.pixel_counts += torch.from_numpy(counts)
            self.streaming_seconds += time.perf_counter() - begin
        else:
            if self.has_masks and self.measures.takes_maps:
                self._check_masks(self.start + start, self.start + stop)
            self._update_measures(start, maps)
            if self.has_masks:
                self.maps[start:stop] = maps.cpu().numpy()
        return with_maps

    def gather(self, device: torch.device) -> None:
        """Gather scores and maps, or sum histograms, over all processes. Every process must call it.

        Args:
            device: Device of the collective operations.
        """
        if self.world.size == 1:
            return
        self.scores = gather_shares(self.scores.to(device), self.shares).cpu()
        if self.keep_errors:
            for errors in distributed.gather_from_all(self.world, self.errors):
                self.errors.update(errors)
        self.measures.merge(distributed.gather_from_all(self.world, self.measures.state()))
        if self.has_masks and self.streaming is not None:
            distributed.sum_over_processes([*self.streaming.state().values(), self.pixel_counts], device)
        elif self.has_masks:
            self.maps = gather_shares(torch.from_numpy(self.maps).to(device), self.shares).cpu().numpy()
        if not self.world.first:
            self._release()

    def list_scored_images(self, errors: Mapping[int, str]) -> list[ScoredImage]:
        """List all test images with their scores.

        Args:
            errors: ``errors`` of the process that computed the row. These images have the score NaN.
        """
        return [
            ScoredImage(
                str(sample.path), sample.category, sample.defect, sample.label,
                math.nan if index in errors else score, errors.get(index),
            )
            for index, (sample, score) in enumerate(zip(self.tests, self.scores.tolist(), strict=True))
        ]  # fmt: skip

    def compute_row(self) -> Row:
        """Compute the metrics of the images without an error, and a note that names the undefined ones."""
        begin, total, noun = time.perf_counter(), len(self.tests), self.recipe.noun
        is_exact = self.has_masks and self.streaming is None
        masks = self._read_masks(0, total, self.recipe.map_out) if is_exact else None
        usable = self._list_usable(0, total)
        count, defect_count = len(usable), sum(self.tests[index].label for index in usable)
        values: dict[str, float] = {}
        bounds: dict[str, float] = {}
        extra = self.measures.compute(self.scores, usable)
        notes = [*self.measures.notes]
        if count < total:
            notes.append(describe_missing(total - count, total, noun))
        if 0 < defect_count < count:
            image = metrics.image_metrics(self.scores[usable], np.array([self.tests[index].label for index in usable]))
            values |= {"i_auroc": image.auroc, "i_ap": image.ap, "i_f1": image.f1_max, "i_accuracy": image.accuracy}
            values["i_threshold"] = image.f1_threshold
        else:
            notes.append(f"no image metrics: there are no {'good' if defect_count else 'defective'} {noun}s")
        if self.has_masks:
            pixel = self._streamed_pixel_metrics() if masks is None else self._exact_pixel_metrics(masks, usable)
            if pixel is None:
                notes.append("no pixel metrics: all mask pixels have the same value")
            else:
                values, bounds, extra = values | pixel[0], pixel[1], pixel[2] | extra
                if "aupro_per_image" not in values:
                    notes.append("no AUPRO per image: it is undefined for at least one " + noun)
        elif self.defect_count:
            notes.append(
                f"no pixel metrics: {self.maskless_count} of {self.defect_count} defective {noun}s have no mask"
            )
        self._release()
        self.notes.warn()
        seconds = {**self.seconds, "metrics": self.streaming_seconds + time.perf_counter() - begin}
        return Row(
            self.name, count, defect_count, **values, seconds=seconds, bounds=bounds, note="; ".join(notes),
            skipped=total - count, extra=extra, seg_threshold=self.threshold if "SegF1" in extra else None,
        )  # fmt: skip

    def cancel(self) -> None:
        """Cancel the pending reads of masks."""
        for mask in self.masks.values():
            mask.cancel()

    def _list_usable(self, start: int, stop: int) -> list[int]:
        """Return the positions, relative to ``start``, of the images from ``start`` to ``stop`` without an error."""
        return [index - start for index in range(start, stop) if index not in self.errors]

    def _leave_out(self, index: int, error: Exception) -> None:
        """Leave the image at ``index`` in ``tests`` out of the metrics, or raise its error."""
        if not self.keep_errors:
            raise error
        self.errors[index] = describe_image_error(str(self.tests[index].path), error)

    def _update_measures(self, start: int, maps: Tensor) -> None:
        """Add maps to the measures, without those of images that are left out: an image counts in all or in none."""
        for index in self._list_usable(self.start + start, self.start + start + len(maps)):
            position = self.start + start + index
            try:
                self.measures.update(position, maps[index])
            except READ_ERRORS as error:
                self._leave_out(position, error)

    def _check_masks(self, start: int, stop: int) -> None:
        """Leave out the images from ``start`` to ``stop`` in ``tests`` whose mask cannot be read."""
        for position in range(start, stop):
            if self.tests[position].label and position not in self.errors:
                try:
                    if position in self.masks:
                        self.masks[position].result()
                    else:  # only the first process holds masks
                        read_ground_truth(self.tests[position], self.recipe, MaskNotes())
                except READ_ERRORS as error:
                    self._leave_out(position, error)

    def _release(self) -> None:
        """Release the memory of the maps and of the measures."""
        self.measures.release()
        self.maps = np.empty((0, *self.maps.shape[1:]), np.float32)

    def _read_masks(self, start: int, stop: int, shape: tuple[int, ...], offset: int = 0) -> NDArray[np.bool_]:
        """Return the masks of images ``start`` to ``stop``, each of ``shape`` (H, W); all False for good images.

        ``offset`` is the position in ``tests`` of the first image that the indices of ``defective`` count from.
        """
        masks = np.zeros((stop - start, *shape), bool)
        for index in range(start, stop):
            if offset + index in self.errors:
                continue
            try:
                if index in self.masks:
                    masks[index - start] = self.masks.pop(index).result()
                elif index in self.defective:
                    masks[index - start] = read_ground_truth(self.defective[index], self.recipe, self.notes)
            except READ_ERRORS as error:
                self._leave_out(offset + index, error)
        return masks

    def _read_rois(self, positions: Sequence[int], shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
        """Return the regions of interest of the maps at ``positions`` in ``tests``; None if all pixels count."""
        if self.rois is None:
            return None
        if self.rois.shared is not None:
            return self.rois.shared
        return np.stack([self.rois.read_map(position, shape) for position in positions])

    def _exact_pixel_metrics(
        self, masks: NDArray[np.bool_], usable: list[int]
    ) -> tuple[dict[str, float], dict[str, float], dict[str, float]] | None:
        """Compute exact pixel metrics from the maps of the usable images; None if the mask pixels are all equal."""
        if len(usable) < len(masks):  # in place: the maps may need more memory than there is
            for position, index in enumerate(usable):
                self.maps[position], masks[position] = self.maps[index], masks[index]
            self.maps, masks = self.maps[: len(usable)], masks[: len(usable)]
        inside = self._read_rois(usable, self.recipe.map_out)
        counted = masks if inside is None else masks & inside
        pixels = masks.size if inside is None else int(np.broadcast_to(inside, masks.shape).sum())
        if not 0 < np.count_nonzero(counted) < pixels:
            return None
        pixel = metrics.pixel_metrics(self.maps, masks, (LIMIT, *self.measures.limits), inside=inside)
        values = {"p_auroc": pixel.auroc, "p_ap": pixel.ap, "p_f1": pixel.f1_max, "p_threshold": pixel.f1_threshold}
        extra = {f"AUPRO@{limit:g}": pixel.aupro_at[limit] for limit in self.measures.limits}
        if self.threshold is not None:
            extra["SegF1"] = metrics.f1_at(self.maps, masks, self.threshold, inside=inside)
        return _drop_undefined({**values, "aupro": pixel.aupro, "aupro_per_image": pixel.aupro_per_image}), {}, extra

    def _streamed_pixel_metrics(self) -> tuple[dict[str, float], dict[str, float], dict[str, float]] | None:
        """Compute pixel metrics, their error bounds and measures from histograms; None if the masks are all equal."""
        if self.streaming is None or not self.streaming.has_both_classes:
            return None
        pixel = self.streaming.compute((self.streaming.limit, *self.measures.limits))
        estimates = {"p_auroc": pixel.auroc, "p_ap": pixel.ap, "p_f1": pixel.f1_max, "aupro": pixel.aupro}
        values = {name: estimate.value for name, estimate in estimates.items()}
        values |= {"p_threshold": pixel.f1_threshold, "aupro_per_image": pixel.aupro_per_image}
        further = {f"AUPRO@{limit:g}": pixel.aupro_at[limit] for limit in self.measures.limits}
        bounds = {name: estimate.bound for name, estimate in (estimates | further).items()}
        extra = {heading: estimate.value for heading, estimate in further.items()}
        if self.threshold is not None:
            extra["SegF1"] = metrics.f1_of_counts(self.pixel_counts.tolist())
        return _drop_undefined(values), bounds, extra


def _drop_undefined(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not math.isnan(value)}


def _allocate_maps(shape: tuple[int, ...], memory: int) -> NDArray[np.float32]:
    """Allocate an array, in an unnamed file if it has more than ``memory`` bytes."""
    if 4 * math.prod(shape) <= memory:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile(prefix="recontrast-maps-") as file:  # the memory map keeps the file open
        return np.asarray(np.memmap(file, np.float32, "w+", shape=shape))
