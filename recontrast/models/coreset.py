"""Greedy coreset: a small subset that covers a large set of feature vectors, and nearest neighbours in it.

PatchCore keeps such a subset of the training features (Roth et al., CVPR 2022, https://arxiv.org/abs/2106.08265,
section 3.2). Both functions compute distances as ``|x|^2 - 2 <x, y> + |y|^2`` with matrix products.
"""

import math

import torch
from torch import Tensor

BLOCK = 8192  # rows per matrix product in `select_coreset`
ACTIVE_SHARE = 32  # one in 32 points is updated after each selection, see `select_coreset`
PAIRS = 1 << 23  # pairs of query and bank vector per matrix product in `find_nearest`, 32 MB in float32


def project_randomly(features: Tensor, dimension: int, seed: int) -> Tensor:
    """Project vectors to fewer dimensions by a random Gaussian matrix, which keeps their distances approximately.

    Args:
        features: Vectors (N, d), floating point.
        dimension: Number of dimensions of the result. At least ``d`` returns the vectors as they are.
        seed: Seed of the matrix.

    Returns:
        Vectors (N, min(d, dimension)), float32.
    """
    width = features.shape[1]
    if dimension >= width:
        return features.float()
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(width, dimension, generator=generator) / math.sqrt(dimension)
    return features.float() @ matrix.to(features.device)


@torch.no_grad()
def select_coreset(features: Tensor, count: int, *, start: int = 0, centres: Tensor | None = None) -> Tensor:
    """Select vectors greedily: each is the one farthest from those selected before (k-center greedy).

    The plain algorithm updates the distance of all N vectors after each selection. Here, a round updates only the
    1/32 of them that were farthest at its beginning, and ends when its farthest vector is nearer than all the others
    were. Distances never grow, so no other vector can have been the farthest. All vectors are then updated by one
    matrix product for the whole round. The selection is that of the plain algorithm up to rounding, in a fraction of
    its time.

    Args:
        features: Vectors (N, d), floating point, N at least 1.
        count: Number of vectors to select, from 1 to N.
        start: Index of the first selected vector.
        centres: Vectors (M, d) that are selected already. The first vector is then the farthest from them, and
            ``start`` is ignored.

    Returns:
        Indices of the selected vectors, (count,), int64, in the order of selection.

    Raises:
        ValueError: If ``count`` or ``start`` is out of range, or a vector is not finite.
    """
    total = len(features)
    if not 1 <= count <= total:
        raise ValueError(f"select_coreset: count: wanted 1 to {total} (the number of vectors), got {count}")
    if not 0 <= start < total:
        raise ValueError(f"select_coreset: start: wanted 0 to {total - 1}, got {start}")
    features = features.float().contiguous()
    squares = features.square().sum(1)
    if not bool(squares.isfinite().all()):
        raise ValueError("select_coreset: features: wanted finite vectors, got NaN, infinity or values above 1e19")
    distances = torch.full_like(squares, math.inf)  # squared, to the nearest selected vector
    if centres is not None and len(centres):
        distances = find_nearest(features, centres)[0][:, 0].square()
        start = int(distances.argmax())
    active_count = max(total // ACTIVE_SHARE, min(total, 256))
    selected, added = [start], [start]
    while True:
        for begin in range(0, total, BLOCK):
            block = slice(begin, begin + BLOCK)
            products = torch.addmm(squares[added], features[block], features[added].T, alpha=-2)
            distances[block] = torch.minimum(distances[block], products.amin(1) + squares[block])
        distances[added] = -math.inf  # never again, even if equal vectors or rounding leave nothing above zero
        if len(selected) == count:
            return torch.tensor(selected, device=features.device)
        farthest = distances.topk(active_count)
        added = _select_among(
            features[farthest.indices], squares[farthest.indices], farthest.values, count - len(selected),
            limit=-math.inf if active_count == total else float(farthest.values[-1]),
        )  # fmt: skip
        added = farthest.indices[added].tolist()
        selected += added


def _select_among(features: Tensor, squares: Tensor, distances: Tensor, count: int, *, limit: float) -> list[int]:
    """Select up to ``count`` of the vectors greedily, until the farthest one is nearer than ``limit``."""
    selected: list[int] = []
    products = torch.empty_like(squares)
    while len(selected) < count:
        index = int(distances.argmax())
        if selected and float(distances[index]) < limit:
            break
        selected.append(index)
        torch.addmv(squares, features, features[index], alpha=-2, out=products)
        torch.minimum(distances, products.add_(squares[index]), out=distances)
        distances[index] = -math.inf
    return selected


@torch.no_grad()
def find_nearest(queries: Tensor, bank: Tensor, neighbours: int = 1) -> tuple[Tensor, Tensor]:
    """Find the nearest vectors of a bank, exactly.

    The candidates come from matrix products. The distances of the result are computed again from the differences, so
    that they lose no digits where a query is close to its neighbour.

    Args:
        queries: Vectors (N, d), floating point.
        bank: Vectors (M, d), floating point, M at least ``neighbours``.
        neighbours: Number of neighbours of each query.

    Returns:
        distances: Euclidean distances, (N, neighbours), float32, in ascending order.
        indices: Positions in the bank, (N, neighbours), int64.

    Raises:
        ValueError: If the bank has fewer vectors than ``neighbours``, or vectors of another length than the queries.
    """
    if not 1 <= neighbours <= len(bank):
        raise ValueError(f"find_nearest: neighbours: wanted 1 to {len(bank)} (the size of the bank), got {neighbours}")
    if queries.shape[1] != bank.shape[1]:
        raise ValueError(f"find_nearest: queries: wanted vectors of {bank.shape[1]} values, got {queries.shape[1]}")
    queries, bank = queries.float(), bank.float()
    squares = bank.square().sum(1)
    distances = queries.new_empty(len(queries), neighbours)
    indices = torch.empty(len(queries), neighbours, dtype=torch.int64, device=queries.device)
    rows = max(PAIRS // len(bank), 1)
    for begin in range(0, len(queries), rows):
        block = queries[begin : begin + rows]
        products = torch.addmm(squares, block, bank.T, alpha=-2)
        if neighbours == 1:
            nearest = products.argmin(1, keepdim=True)
        else:
            nearest = products.topk(neighbours, largest=False, sorted=True).indices
        exact = (block.unsqueeze(1) - bank[nearest]).square().sum(2).sqrt()
        if neighbours > 1:
            exact, order = exact.sort(1)
            nearest = nearest.gather(1, order)
        distances[begin : begin + rows], indices[begin : begin + rows] = exact, nearest
    return distances, indices
