"""A detector as one graph: images of any size in; map, score, p-value and decision out.

The graph does what the command line does with PIL, the network and the calibration. It contains only operators of
PyTorch, so that `torch.export` can trace it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recontrast.calibration.conformal import Calibration
from recontrast.data.pillow_resize import FloatResize, PillowResize
from recontrast.export.decisions import decide, round_scores
from recontrast.export.tile_region import TileRegion
from recontrast.inference.infer import build_anomaly_map
from recontrast.inference.rois import Rois
from recontrast.models.fold import fold
from recontrast.models.network import Network
from recontrast.ops import void_unless_finite
from recontrast.recipes.recipe import Recipe, to_pair


class DetectorGraph(nn.Module):
    """Module with preprocessing, network (BatchNorm folded), anomaly map, score and decision, all in float32.

    A region of interest is part of the graph; with tiles, which lie elsewhere in each image, its masks are an input.

    Args:
        model: Trained model on the CPU. It is not changed.
        recipe: Recipe, for size, crop, views, map and score.
        calibration: Calibration of the float32 scores; None for a graph without decisions.
        input_size: Height and width of all images; None for images of any size.

    Attributes:
        has_masks: Whether masks are an input.
    """

    means: Tensor
    stds: Tensor
    rows: Tensor
    good: Tensor
    inside: Tensor
    pixels: Tensor

    def __init__(
        self, model: Network, recipe: Recipe, calibration: Calibration | None,
        input_size: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        (height, width), self.is_resized = recipe.out, recipe.tile is None
        size = to_pair(recipe.size) if self.is_resized else recipe.out
        self.resize = PillowResize(size, input_size) if recipe.window is None else FloatResize(size, input_size)
        self.input_size = input_size if self.is_resized else size
        self.input_dtype = torch.uint8 if recipe.window is None else torch.float32
        self.full = 255.0 if recipe.window is None else 1.0
        self.window = tuple(  # margins round half to even, as in recontrast.data.images
            slice(start, start + length)
            for start, length in ((round((size[0] - height) / 2), height), (round((size[1] - width) / 2), width))
        )
        self.network = fold(model, recipe.out).float().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.network.fix_size(recipe.out)
        self.views, self.score_rule = recipe.views, recipe.score
        self.amap = build_anomaly_map(model, recipe, "matmul")
        rows, cols = self.amap.matrices()
        self.register_buffer("rows", torch.cat(rows, dim=1), persistent=False)
        for level, matrix in enumerate(cols):
            self.register_buffer(f"cols{level}", matrix, persistent=False)
        self.has_region = recipe.roi is not None
        self.has_masks = self.has_region and not self.is_resized
        if self.has_masks:
            self._store_rows()
            self.region = TileRegion(self.amap, recipe.score)  # type: ignore[arg-type]  # not "model", see contradictions
        elif self.has_region:
            self._store_region(torch.tensor(Rois(recipe)[0]))
        self.register_buffer("means", torch.tensor(model.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("stds", torch.tensor(model.std).view(1, 3, 1, 1), persistent=False)
        self.calibrated = calibration is not None
        if calibration is not None:  # the scores are float32 values, so the conversion is exact
            good, threshold = round_scores(calibration)
            self.register_buffer("good", torch.from_numpy(good), persistent=False)
            self.threshold = float(threshold)
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor, inside: Tensor | None = None) -> tuple[Tensor, ...]:
        """Score a batch of images.

        Args:
            image: RGB images (N, H, W, 3), uint8, or float32 in [0, 1] if the recipe has a window, with N at least 1
                and H and W from 1 to `recontrast.data.exact_length.max_exact_length`; or tiles of the size of the
                recipe, if it has one.
            inside: Whether each pixel of a tile is in the region of interest, (N, H, W) bool, if `has_masks`.

        Returns:
            Maps (N, height, width), float32, of size ``recipe.map_out``, and scores (N,), float32. With a
            calibration also p-values (N,), float32, and decisions (N,), bool, True for a defect. The score and the
            p-value of a map that is not finite are NaN, and its decision is True, so that it never passes as good.
        """
        if self.is_resized:
            pixels = self.resize(image)[:, :, self.window[0], self.window[1]]
        else:
            pixels = image.float().permute(0, 3, 1, 2)
        normalised = (pixels / self.full - self.means) / self.stds
        distances, own_scores = self.network.distances(normalised, self.views, exportable=True)
        if inside is not None:
            maps = self._build_map_inside(distances, inside, *self.region.weigh(inside))
            return maps, self.region.score(maps, inside)
        maps = self._build_map_of_region(distances) if self.has_region else self._build_map(distances)
        if self.score_rule != "model":
            counted = maps.flatten(1)[:, self.pixels].unsqueeze(1) if self.has_region else maps
            score = self.amap.score(counted, self.score_rule)
        elif own_scores is not None:
            score = void_unless_finite(own_scores, maps)
        if not self.calibrated:
            return maps, score
        return maps, score, *decide(score, self.good, self.threshold)

    def _store_region(self, inside: Tensor) -> None:
        """Store a region of interest (1, H, W): its pixels, and for each level its points and their factors."""
        points, factors = self.amap.weigh_inside(inside)
        self.register_buffer("inside", inside, persistent=False)
        self.register_buffer("pixels", inside.flatten().nonzero()[:, 0], persistent=False)
        for level, (mask, factor) in enumerate(zip(points, factors, strict=True)):
            self.register_buffer(f"points{level}", mask, persistent=False)
            self.register_buffer(f"factors{level}", factor, persistent=False)
        self._store_rows()

    def _store_rows(self) -> None:
        for level, rows in enumerate(self.amap.matrices()[0]):
            self.register_buffer(f"rows{level}", rows, persistent=False)

    def _build_map_of_region(self, distances: list[Tensor]) -> Tensor:
        """Compute the map of the region of interest that is part of the graph."""
        points, factors = (
            [getattr(self, f"{name}{level}") for level in range(len(self.amap.sizes))] for name in ("points", "factors")
        )
        return self._build_map_inside(distances, self.inside, points, factors)

    def _build_map_inside(
        self, distances: list[Tensor], inside: Tensor, points: Sequence[Tensor], factors: Sequence[Tensor]
    ) -> Tensor:
        """Compute the map of a region of interest, see `AnomalyMap.from_distances` and `AnomalyMap.weigh_inside`."""
        levels = len(self.amap.sizes)
        parts = []
        for level in range(levels):
            first, *others = distances[level::levels]
            masked = torch.where(points[level], sum(others, first), 0.0)
            spread = getattr(self, f"rows{level}") @ masked @ getattr(self, f"cols{level}").mT
            parts.append(spread * factors[level])
        first, *others = parts
        maps = sum(others, first)
        return torch.where(inside, maps / len(distances) if self.amap.reduce == "mean" else maps, 0.0)

    def _build_map(self, distances: list[Tensor]) -> Tensor:
        """Upsample, blur and sum the distances by the two matrix products of `AnomalyMap`."""
        levels = len(self.amap.sizes)
        products = []
        for level in range(levels):
            first, *others = distances[level::levels]
            products.append(sum(others, first) @ getattr(self, f"cols{level}").mT)
        maps = self.rows @ torch.cat(products, dim=1)
        return maps / len(distances) if self.amap.reduce == "mean" else maps
