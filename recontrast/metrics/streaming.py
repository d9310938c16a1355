"""Pixel metrics in constant memory: integer histograms, from which each metric follows with a proven bound.

The width of a bin is proportional to the score, 2^-17 of an octave, so that the bounds do not depend on the scale of
the maps. A bin counts good pixels and positive pixels, and sums 1 / (area of the region) over its positive pixels in
units of 2^-40. Sums of integers do not depend on their order: batches, threads and processes merge exactly.
`recontrast.metrics.bounds` has the proof. The per-image AUPRO is a mean over images and is accumulated exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recontrast.device_limits import has_float64
from recontrast.lazy_import import LazyModule
from recontrast.metrics import bounds, inputs, reference
from recontrast.metrics.bounds import UNIT, Estimate
from recontrast.metrics.inside import check_inside, pack_pixels

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

DETAIL = 17  # 2 ** 17 bins per octave; with fewer, the bounds of maps with a narrow range exceed 1e-4
OCTAVES = 20  # at most 63 MB of histograms; values below a millionth of the largest share the lowest bin
MAX_REGIONS = 1 << 22  # an int64 holds the sum of this many regions of 2 ** 40 units
TOLERANCE = 1e-3  # share of the range; rounding moves values out of the range by less than this
WORD = 1 << 30  # per-image areas are summed in two words of 30 bits each, which is exact in any order
IMAGES, REGIONS, HIGH_WORD, LOW_WORD, DEFINED, UNDEFINED = range(6)  # indices of `Streaming.totals`


@dataclass(frozen=True)
class StreamedMetrics:
    """Metrics of `recontrast.metrics.PixelMetrics` with bounds (proof: `recontrast.metrics.bounds`).

    Attributes:
        auroc: Area under the ROC curve.
        ap: Average precision.
        f1_max: Largest F1 over all thresholds.
        f1_threshold: Threshold at which F1 is the value of ``f1_max`` minus its bound.
        aupro: AUPRO of the data set, at the first limit.
        aupro_per_image: Per-image AUPRO of the ReContrast repository, exact. NaN if an image leaves it undefined.
        aupro_at: Limit -> AUPRO of the data set, for every requested limit.
    """

    auroc: Estimate
    ap: Estimate
    f1_max: Estimate
    f1_threshold: float
    aupro: Estimate
    aupro_per_image: float
    aupro_at: dict[float, Estimate] = field(default_factory=dict)


class Streaming:
    """Accumulate maps and masks batch by batch, in memory that does not depend on the number of images.

    On a CUDA device the histograms are filled there. Only the histograms, and the counts that the per-image AUPRO of
    images with a defect needs, are copied to the host. Processes merge exactly by adding up the tensors of `state`::

        for tensor in streaming.state().values():
            torch.distributed.all_reduce(tensor)

    `recontrast.metrics.bounds` describes the histograms and has the proof of the bounds.

    Args:
        high: Largest value of a map: twice the number of pairs for ``reduce="sum"``, 2 for ``"mean"``. Maps are in
            [0, high]. Values that rounding moves outside are clipped.
        limit: False positive rate at which the per-image AUPRO ends, and AUPRO unless `compute` gets another limit.
        device: Device of the histograms. Maps are copied to it. On a device without float64 ("mps"), the CPU takes its
            place.
        detail: 2 ** detail bins per octave of scores, 4 to 17. Each step down halves the memory and doubles the bounds.
        clip: Whether all values above ``high`` count as equal to it; otherwise they are an error.

    Attributes:
        counts: (3, bins) int64, good pixels, positive pixels, and shares of regions in units of 2^-40.
        totals: (6,) int64, number of images and of regions, and the sums for the per-image AUPRO.

    Raises:
        ValueError: If ``high``, ``limit`` or ``detail`` is out of range.
    """

    def __init__(
        self,
        high: float,
        limit: float = 0.3,
        device: "str | torch.device" = "cpu",
        detail: int = DETAIL,
        *,
        clip: bool = False,
    ) -> None:
        if not 1e-20 <= high <= 1e20:  # float32 can represent all octaves
            raise ValueError(f"high: wanted the largest value of a map, from 1e-20 to 1e20, got {high}")
        self.clip = clip
        self.high, self.limit = float(high), inputs.check_limits(limit)[0]
        if not 4 <= detail <= DETAIL:
            raise ValueError(f"detail: wanted from 4 to {DETAIL}, got {detail}")
        self._shift = 23 - detail  # low bits of a float32 that do not select its bin
        lowest = 2.0 ** (int(np.frexp(high)[1]) - OCTAVES)
        self._base = (_float_bits(lowest) >> self._shift) - 1  # bin 0 holds all lower values
        bins = (_float_bits(high) >> self._shift) - self._base + 1
        device = device if has_float64(torch.device(device)) else "cpu"
        self.counts = torch.zeros(3, bins, dtype=torch.int64, device=device)
        self.totals = torch.zeros(6, dtype=torch.int64, device=device)

    def update(self, maps: Any, masks: Any, labels: Any = None, inside: Any = None) -> None:
        """Add a batch. If it is invalid, none of it is added.

        Args:
            maps: Anomaly maps (..., H, W), NumPy or torch, real numbers in [0, high].
            masks: Masks in the shape of ``maps``: bool, 0/1 or 0/255.
            labels: Label of each image, 1 anomalous, compared with the masks. None skips the comparison.
            inside: Region of interest in the shape of ``maps``, or (H, W) for all images: bool, 0/1 or 0/255. Pixels
                outside count for nothing. None: all pixels count.

        Raises:
            ValueError: If a value is not finite or not in [0, high], the shapes differ, masks or labels have other
                values, or a label contradicts its mask.
        """
        if inside is not None:
            scores, positive = inputs.check_maps_and_masks(maps, masks, labels)
            mask = check_inside(scores.shape, inside)
            images = [slice(n, n + 1) for n in range(len(scores)) if mask[n].any()]
            rows = [pack_pixels(scores[one], positive[one], mask[one]) for one in images]
            for row, is_positive in rows:  # of one image each, like a map of height 1
                self.update(row, is_positive)
            return
        if self.clip:
            maps = _to_tensor(maps)
            maps = maps.where((maps <= self.high) | ~maps.isfinite(), self.high)
        if self.counts.device.type == "cpu" and inputs.native is not None:
            scores, positive = inputs.check_maps_and_masks(maps, masks, labels)
            self._check_range(float(scores.min()), float(scores.max()), scores)
            areas, reasons = inputs.native.per_image(scores, positive, self.limit)
            rounded = _round_down(scores)  # keeps the order, although values may become equal
            regions = inputs.native.histogram(rounded, positive, self.counts.numpy(), self._shift, self._base)
        else:
            tensor = _to_tensor(maps)
            positive = inputs.check_masks(tensor.shape, masks, labels)
            if tensor.is_complex():
                raise ValueError(f"maps: wanted real numbers, got dtype {tensor.dtype}")
            tensor = tensor.detach().to(self.counts.device).reshape(positive.shape)
            tensor = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
            low, high = tensor.aminmax()
            self._check_range(float(low), float(high), tensor)
            areas, reasons, regions = self._fill_on_device(tensor, positive)
        self._add_totals(len(positive), regions, areas, reasons)

    def merge(self, other: "Streaming | Mapping[str, torch.Tensor]") -> None:
        """Add the counts of another accumulator, exactly.

        Args:
            other: Accumulator with the same ``high``, ``limit`` and ``detail``, or its `state`: (3, bins) and (6,)
                int64.

        Raises:
            ValueError: If ``high`` or ``limit`` differs, or a tensor has another shape or dtype.
        """
        if isinstance(other, Streaming):
            wanted, got = (self.high, self.limit), (other.high, other.limit)
            if wanted != got:
                raise ValueError(f"merge: other: wanted high and limit {wanted}, got {got}")
            other = other.state()
        for name, tensor in self.state().items():
            if other[name].shape != tensor.shape or other[name].dtype != torch.int64:
                description = f"{other[name].dtype} {tuple(other[name].shape)}"
                raise ValueError(f"merge: {name}: wanted int64 {tuple(tensor.shape)}, got {description}")
        for name, tensor in self.state().items():
            tensor += other[name].to(tensor.device)

    def state(self) -> "dict[str, torch.Tensor]":
        """Return the int64 tensors ``counts`` (3, bins) and ``totals`` (6,), not copied; states can be added up."""
        return {"counts": self.counts, "totals": self.totals}

    def reset(self) -> None:
        """Set all counts to zero and keep the memory."""
        self.counts.zero_()
        self.totals.zero_()

    def compute(self, limit: float | Sequence[float] | None = None) -> StreamedMetrics:
        """Compute the metrics of all batches.

        Args:
            limit: False positive rate at which AUPRO ends, or several. None uses the one of the constructor, at which
                the per-image AUPRO always ends.

        Returns:
            Metrics in [0, 1], each with its bound.

        Raises:
            ValueError: If positive or negative pixels are missing, there are too many regions, or a limit is not in
                (0, 1].
        """
        limits = inputs.check_limits(self.limit if limit is None else limit)
        bins, used, totals = self._select_bins()
        f1, best = bounds.f1_max(bins)
        area = (totals[HIGH_WORD] + totals[LOW_WORD] / WORD) / WORD
        per_image = float("nan") if totals[UNDEFINED] else area / totals[DEFINED]
        aupro_at = {x: bounds.aupro(bins, x) for x in limits}
        aupro, threshold = aupro_at[limits[0]], self._compute_lower_edge(int(used[best]))
        return StreamedMetrics(bounds.auroc(bins), bounds.ap(bins), f1, threshold, aupro, per_image, aupro_at)

    @property
    def has_both_classes(self) -> bool:
        """Whether there are positive and negative pixels; without both, no metric is defined."""
        return bool(self.counts[:2].any(dim=1).all())

    def overlap_curve(self, limit: float | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Compute the per-region-overlap curve, as `recontrast.metrics.curves.pro` does from maps.

        Args:
            limit: False positive rate at which the curve ends. None uses the one of the constructor.

        Returns:
            False positive rate and mean overlap, float64, from (0, 0) to ``limit``, with a corner for each non-empty
            bin. Corners lie on the exact curve (up to the rounding of region shares). The last point has the overlap of
            the whole bin in which the limit lies, so that the area below the curve divided by ``limit`` is the AUPRO of
            `compute`.

        Raises:
            ValueError: If positive or negative pixels are missing, there are too many regions, or the limit is not in
                (0, 1].
        """
        (stop,) = inputs.check_limits(self.limit if limit is None else limit)
        bins, _, _ = self._select_bins()
        x = np.append(0.0, np.cumsum(bins.good) / bins.good.sum())
        y = np.append(0.0, np.cumsum(bins.overlap))
        count = int(np.searchsorted(x, stop, side="right"))
        if x[count - 1] == stop:
            return x[:count], y[:count]
        return np.append(x[:count], stop), y[: count + 1]

    def _select_bins(self) -> tuple[bounds.Bins, NDArray[Any], list[int]]:
        """Return the non-empty bins, their indices, and the totals."""
        totals, counts = self.totals.tolist(), self.counts.cpu().numpy()
        good, positive = int(counts[0].sum()), int(counts[1].sum())
        if totals[REGIONS] > MAX_REGIONS:
            raise ValueError(f"masks: wanted at most {MAX_REGIONS} regions in all, got {totals[REGIONS]}")
        if good == 0 or positive == 0:
            got = f"{positive} positive and {good} negative in {totals[IMAGES]} images"
            raise ValueError(f"masks: wanted at least one positive and one negative, got {got}")
        return *bounds.select_bins(counts, totals[REGIONS]), totals

    def _compute_lower_edge(self, index: int) -> float:
        if index == 0:
            return -TOLERANCE * self.high
        return float(np.int32((index + self._base) << self._shift).view(np.float32))

    def _check_range(self, low: float, high: float, maps: Any) -> None:
        if not (np.isfinite(low) and np.isfinite(high)):
            values = inputs.as_array(maps)
            inputs.check_metrics_defined(values, np.arange(values.size) > 0, "maps")
        if low < -TOLERANCE * self.high or high > (1 + TOLERANCE) * self.high:
            raise ValueError(f"maps: wanted values in [0, {self.high:g}], got values from {low:g} to {high:g}")

    def _add_totals(self, images: int, regions: int, areas: NDArray[Any], reasons: NDArray[Any]) -> None:
        words = areas[reasons == 0] * WORD
        high = np.floor(words)
        low = np.floor((words - high) * WORD)
        undefined = np.count_nonzero(reasons > reference.GOOD_IMAGE)
        added = [images, regions, int(high.sum()), int(low.sum()), words.size, undefined]
        self.totals += torch.tensor(added, device=self.totals.device)

    def _fill_on_device(self, maps: "torch.Tensor", positive: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], int]:
        """Fill the histograms with PyTorch operators; return per-image areas, reasons for NaN and number of regions."""
        labels, regions = inputs.regions(positive)
        label = labels[positive] - 1
        shares = ((2 << UNIT) // np.bincount(label) + 1) // 2  # rounded to nearest
        areas, reasons = self._compute_per_image(maps, positive, labels)
        rounded = maps.float()
        if maps.dtype == torch.float64:  # as in _round_down
            below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
            rounded = torch.where(rounded.double() > maps, below, rounded)
        bits = rounded.contiguous().view(torch.int32)
        last = self.counts.shape[1] - 1
        bins = torch.where(bits > 0, (bits >> self._shift) - self._base, 0).clamp(0, last).flatten().long()
        mask = torch.tensor(positive, device=maps.device).flatten()
        by_class = torch.bincount(bins + mask * (last + 1), minlength=2 * (last + 1))
        self.counts[:2] += by_class.view(2, -1)
        indices, values = (torch.from_numpy(x).to(maps.device) for x in (np.flatnonzero(positive), shares[label]))
        self.counts[2].index_add_(0, bins[indices], values)
        return areas, reasons, regions

    def _compute_per_image(
        self, maps: "torch.Tensor", positive: NDArray[Any], labels: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Compute `reference.per_image`, with the pixels of all images ranked at once on the device."""
        areas, reasons = np.full(len(maps), np.nan), np.full(len(maps), reference.GOOD_IMAGE)
        extremes = torch.stack([maps.amin((1, 2)), maps.amax((1, 2))], 1).cpu().numpy()
        thresholds: dict[int, NDArray[Any]] = {}  # image -> thresholds, for images that have any
        for n in np.flatnonzero(positive.any(axis=(1, 2))).tolist():
            image_thresholds, reasons[n] = reference.compute_thresholds(extremes[n], positive[n])
            thresholds |= {n: image_thresholds} if reasons[n] == 0 else {}
        if not thresholds:
            return areas, reasons
        slots = 1 + max(t.size for t in thresholds.values())
        padded = np.stack([np.pad(t, (0, slots - 1 - t.size), constant_values=np.inf) for t in thresholds.values()])
        images, mask = list(thresholds), torch.tensor(positive[list(thresholds)], device=maps.device).flatten(1)
        ranks = torch.searchsorted(torch.from_numpy(padded).to(maps.device), maps[images].flatten(1).double())
        rows = 2 * torch.arange(len(images), device=maps.device)[:, None] + mask
        counts = torch.bincount((ranks + slots * rows).flatten(), minlength=2 * len(images) * slots)
        called, passed = counts.view(-1, 2, slots)[:, 0].cpu().numpy(), ranks[mask].cpu().numpy()
        for row, n in enumerate(images):
            weight = reference.compute_overlap_weights(labels[n][positive[n]])
            image_passed, passed = passed[: weight.size], passed[weight.size :]
            image_called = called[row, : thresholds[n].size + 1]
            areas[n], reasons[n] = reference.compute_image_area(image_called, image_passed, weight, self.limit)
        return areas, reasons


def _to_tensor(maps: Any) -> "torch.Tensor":
    """Return maps as a tensor; arrays are copied, since PyTorch takes neither negative steps nor read-only memory."""
    if isinstance(maps, torch.Tensor):
        return maps
    return torch.from_numpy(np.array(inputs.as_scores(maps, "maps"), order="C"))


def _round_down(scores: NDArray[Any]) -> NDArray[np.float32]:
    """Round to float32, downwards: a float64 score just below the edge of a bin, a threshold, must stay below it."""
    rounded = scores.astype(np.float32, copy=False)
    if scores.dtype == np.float64 and (is_above := rounded > scores).any():
        rounded[is_above] = np.nextafter(rounded[is_above], np.float32(-np.inf))
    return rounded


def _float_bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))
