"""Pixel metrics in constant memory: histograms of whole numbers, and from them each metric with a proven bound.

Scores fall into bins whose width is a share of the score, 2^-17 of an octave, so that the bounds do not depend on the
scale of the maps. A bin counts good pixels, positives, and for each positive 1 / area of its region in units of 2^-40.
Sums of whole numbers do not depend on their order: batches, threads and processes merge exactly.
`recontrast.metrics.bounds` has the proof. The reference's per-image AUPRO is a mean over images, streamed as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recontrast.metrics import bounds, inputs, reference
from recontrast.metrics.bounds import UNIT, Estimate

DETAIL = 17  # 2 ** 17 bins an octave: with fewer, bounds of narrow maps pass 1e-4
OCTAVES = 20  # 63 MB of histograms at most; what is a millionth of the largest value shares the lowest bin
MOST_REGIONS = 1 << 22  # of 2 ** 40 units each: an int64 holds their sum
SLACK = 1e-3  # of the range: rounding takes no value further outside, it has another range
FINE = 1 << 30  # per-image areas are summed in two words of 30 binary places each: exact, in any order
IMAGES, REGIONS, HIGH_WORD, LOW_WORD, DEFINED, UNDEFINED = range(6)  # of `totals`


@dataclass(frozen=True)
class StreamedMetrics:
    """What `recontrast.metrics.PixelMetrics` holds, with bounds; their proof: `recontrast.metrics.bounds`.

    Attributes:
        auroc: area under the ROC curve.
        ap: average precision.
        f1_max: largest F1 over all thresholds.
        f1_threshold: calling score >= it gives F1 of ``f1_max``'s value less its bound.
        aupro: of the data set, at the first limit.
        aupro_per_image: the reference's, exact; NaN where an image leaves it undefined.
        aupro_at: AUPRO of the data set by limit, of each that was asked for.
    """

    auroc: Estimate
    ap: Estimate
    f1_max: Estimate
    f1_threshold: float
    aupro: Estimate
    aupro_per_image: float
    aupro_at: dict[float, Estimate] = field(default_factory=dict)


class Streaming:
    """Accumulates maps and masks, batch by batch, in memory that does not depend on how many there are.

    On a CUDA device the histograms fill there; only they are copied off it, and of images with a defect what the
    per-image AUPRO counts. Processes merge exactly by adding up what `state` holds::

        for tensor in streaming.state().values():
            torch.distributed.all_reduce(tensor)

    What the histograms hold, and the proof of the bounds: `recontrast.metrics.bounds`.

    Args:
        high: largest value of a map: twice the number of pairs for ``reduce="sum"``, 2 for ``"mean"``. Maps lie in
            [0, high]; what rounding takes out of it is put back.
        limit: false positive rate at which the per-image AUPRO ends, and AUPRO where `compute` names no other.
        device: where the histograms are; maps are brought there.
        detail: 2 ** detail bins an octave of scores, 4 to 17; one less halves the memory and doubles the bounds.

    Attributes:
        counts: (3, bins) int64: good pixels, positives, and shares of regions in units of 2^-40.
        totals: (6,) int64: images, regions, and what the per-image AUPRO needs.

    Raises:
        ValueError: high, limit or detail is out of range.
    """

    def __init__(
        self, high: float, limit: float = 0.3, device: str | torch.device = "cpu", detail: int = DETAIL
    ) -> None:
        if not 1e-20 <= high <= 1e20:  # a float32 holds all octaves
            raise ValueError(f"high: wanted the largest value of a map, from 1e-20 to 1e20, got {high}")
        self.high, self.limit = float(high), inputs.check_limits(limit)[0]
        if not 4 <= detail <= DETAIL:
            raise ValueError(f"detail: wanted from 4 to {DETAIL}, got {detail}")
        self._shift = 23 - detail  # bits of a float32 that its bin leaves out
        lowest = 2.0 ** (int(np.frexp(high)[1]) - OCTAVES)
        self._base = (_bits(lowest) >> self._shift) - 1  # bin 0 takes what is lower
        bins = (_bits(high) >> self._shift) - self._base + 1
        self.counts = torch.zeros(3, bins, dtype=torch.int64, device=device)  # good, positive, shares of regions
        self.totals = torch.zeros(6, dtype=torch.int64, device=device)

    def update(self, maps: Any, masks: Any, labels: Any = None) -> None:
        """Add a batch; where it is refused, nothing of it is added.

        Args:
            maps: (..., H, W) anomaly maps, NumPy or torch, real numbers in [0, high].
            masks: the shape of ``maps``: bool, 0/1 or 0/255.
            labels: one for each image, 1 anomalous; given, an image whose mask says otherwise is refused.

        Raises:
            ValueError: maps that are not finite or leave [0, high], or masks or labels that do not fit them.
        """
        if self.counts.device.type == "cpu" and inputs.native is not None:
            scores, positive = inputs.check_maps_and_masks(maps, masks, labels)
            self._check(float(scores.min()), float(scores.max()), scores)
            found, why = inputs.native.per_image(scores, positive, self.limit)
            rounded = scores.astype(np.float32, copy=False)  # keeps the order, if not every difference
            regions = inputs.native.histogram(rounded, positive, self.counts.numpy(), self._shift, self._base)
        else:
            tensor = maps if isinstance(maps, Tensor) else torch.from_numpy(np.array(inputs.as_scores(maps, "maps")))
            positive = inputs.check_masks(tensor.shape, masks, labels)
            if tensor.is_complex():
                raise ValueError(f"maps: wanted real numbers, got dtype {tensor.dtype}")
            tensor = tensor.detach().to(self.counts.device).reshape(positive.shape)
            tensor = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
            low, high = tensor.aminmax()
            self._check(float(low), float(high), tensor)
            found, why, regions = self._on_device(tensor, positive)
        self._count(len(positive), regions, found, why)

    def merge(self, other: "Streaming | Mapping[str, Tensor]") -> None:
        """Add what another one holds; exact.

        Args:
            other: of the same ``high``, ``limit`` and ``detail``; or its `state`, (3, bins) and (6,) int64.

        Raises:
            ValueError: another high or limit, or tensors of another shape or dtype.
        """
        if isinstance(other, Streaming):
            mine, yours = (self.high, self.limit), (other.high, other.limit)
            if mine != yours:
                raise ValueError(f"merge: other: wanted high and limit {mine}, got {yours}")
            other = other.state()
        for name, tensor in self.state().items():
            if other[name].shape != tensor.shape or other[name].dtype != torch.int64:
                wanted, got = tuple(tensor.shape), tuple(other[name].shape)
                raise ValueError(f"merge: {name}: wanted int64 {wanted}, got {other[name].dtype} {got}")
        for name, tensor in self.state().items():
            tensor += other[name].to(tensor.device)

    def state(self) -> dict[str, Tensor]:
        """All that was accumulated, as int64 tensors that add up: ``counts`` (3, bins), ``totals`` (6,), not copied."""
        return {"counts": self.counts, "totals": self.totals}

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        self.counts.zero_()
        self.totals.zero_()

    def compute(self, limit: float | Sequence[float] | None = None) -> StreamedMetrics:
        """Metrics of all that was added.

        Args:
            limit: false positive rate at which AUPRO ends, or several; None takes the one of the constructor. The
                per-image AUPRO ends where the constructor said.

        Returns:
            Values in [0, 1], each with its bound.

        Raises:
            ValueError: there are not both kinds of pixel, too many regions, or a limit outside of (0, 1].
        """
        limits = inputs.check_limits(self.limit if limit is None else limit)
        bins, used, totals = self._binned()
        f1, best = bounds.f1_max(bins)
        area = (totals[HIGH_WORD] + totals[LOW_WORD] / FINE) / FINE
        per_image = float("nan") if totals[UNDEFINED] else area / totals[DEFINED]
        at = {x: bounds.aupro(bins, x) for x in limits}
        edge = self._edge(int(used[best]))
        return StreamedMetrics(bounds.auroc(bins), bounds.ap(bins), f1, edge, at[limits[0]], per_image, at)

    @property
    def has_both_classes(self) -> bool:
        """Whether there are pixels of both kinds, without which no metric is defined."""
        return bool(self.counts[:2].any(dim=1).all())

    def overlap_curve(self, limit: float | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Per-region-overlap curve of all that was added, as `recontrast.metrics.curves.pro` gives it of maps.

        Args:
            limit: false positive rate at which the curve ends; None takes the one of the constructor.

        Returns:
            False positive rate and mean overlap, float64, from (0, 0) to ``limit``: a corner for each bin that holds
            something. Corners lie on the exact curve (but for the units in which regions are counted), the area
            between them is `compute`'s AUPRO.

        Raises:
            ValueError: as `compute`.
        """
        (stop,) = inputs.check_limits(self.limit if limit is None else limit)
        bins, _, _ = self._binned()
        x = np.append(0.0, np.cumsum(bins.good) / bins.good.sum())
        y = np.append(0.0, np.cumsum(bins.overlap))
        inside = x < stop
        return np.append(x[inside], stop), np.append(y[inside], np.interp(stop, x, y))

    def _binned(self) -> tuple[bounds.Bins, NDArray[Any], list[int]]:
        """Bins that hold something, their numbers, and the totals."""
        totals, counts = self.totals.tolist(), self.counts.cpu().numpy()
        good, positive = int(counts[0].sum()), int(counts[1].sum())
        if totals[REGIONS] > MOST_REGIONS:
            raise ValueError(f"masks: wanted at most {MOST_REGIONS} regions in all, got {totals[REGIONS]}")
        if good == 0 or positive == 0:
            got = f"{positive} positive and {good} negative in {totals[IMAGES]} images"
            raise ValueError(f"masks: wanted at least one positive and one negative, got {got}")
        return *bounds.select_bins(counts, totals[REGIONS]), totals

    def _edge(self, number: int) -> float:
        """Lower end of a bin."""
        if number == 0:
            return -SLACK * self.high
        return float(np.int32((number + self._base) << self._shift).view(np.float32))

    def _check(self, low: float, high: float, maps: Any) -> None:
        if not (np.isfinite(low) and np.isfinite(high)):
            values = inputs.as_array(maps)
            inputs.check_metrics_defined(values, np.arange(values.size) > 0, "maps")
        if low < -SLACK * self.high or high > (1 + SLACK) * self.high:
            raise ValueError(f"maps: wanted values in [0, {self.high:g}], got values from {low:g} to {high:g}")

    def _count(self, images: int, regions: int, areas: NDArray[Any], why: NDArray[Any]) -> None:
        words = areas[why == 0] * FINE
        high = np.floor(words)
        low = np.floor((words - high) * FINE)
        undefined = np.count_nonzero(why > reference.GOOD_IMAGE)
        added = [images, regions, int(high.sum()), int(low.sum()), words.size, undefined]
        self.totals += torch.tensor(added, device=self.totals.device)

    def _on_device(self, maps: Tensor, positive: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], int]:
        """Fill the histograms with stock operators: per-image areas, why they are NaN, and the number of regions."""
        labels, regions = inputs.regions(positive)
        label = labels[positive] - 1
        share = ((2 << UNIT) // np.bincount(label) + 1) // 2  # to the nearest
        found, why = self._per_image(maps, positive, labels)
        bits = maps.float().contiguous().view(torch.int32)
        last = self.counts.shape[1] - 1
        numbers = torch.where(bits > 0, (bits >> self._shift) - self._base, 0).clamp(0, last).flatten().long()
        mask = torch.tensor(positive, device=maps.device).flatten()
        classes = torch.bincount(numbers + mask * (last + 1), minlength=2 * (last + 1))
        self.counts[:2] += classes.view(2, -1)
        where, what = (torch.from_numpy(x).to(maps.device) for x in (np.flatnonzero(positive), share[label]))
        self.counts[2].index_add_(0, numbers[where], what)
        return found, why, regions

    def _per_image(
        self, maps: Tensor, positive: NDArray[Any], labels: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """As `recontrast.metrics.reference.per_image`; pixels are ranked on the device, all images at once."""
        areas, why = np.full(len(maps), np.nan), np.full(len(maps), reference.GOOD_IMAGE)
        extremes = torch.stack([maps.amin((1, 2)), maps.amax((1, 2))], 1).cpu().numpy()
        of: dict[int, NDArray[Any]] = {}
        for n in np.flatnonzero(positive.any(axis=(1, 2))).tolist():
            thresholds, why[n] = reference.compute_thresholds(extremes[n], positive[n])
            of |= {n: thresholds} if why[n] == 0 else {}
        if not of:
            return areas, why
        slots = 1 + max(thresholds.size for thresholds in of.values())
        padded = np.stack([np.pad(t, (0, slots - 1 - t.size), constant_values=np.inf) for t in of.values()])
        some, mask = list(of), torch.tensor(positive[list(of)], device=maps.device).flatten(1)
        ranks = torch.searchsorted(torch.from_numpy(padded).to(maps.device), maps[some].flatten(1).double())
        rows = 2 * torch.arange(len(some), device=maps.device)[:, None] + mask
        counts = torch.bincount((ranks + slots * rows).flatten(), minlength=2 * len(some) * slots)
        called, passed = counts.view(-1, 2, slots)[:, 0].cpu().numpy(), ranks[mask].cpu().numpy()
        for row, n in enumerate(some):
            weight = reference.compute_overlap_weights(labels[n][positive[n]])
            mine, passed = passed[: weight.size], passed[weight.size :]
            areas[n], why[n] = reference.compute_image_area(called[row, : of[n].size + 1], mine, weight, self.limit)
        return areas, why


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))
