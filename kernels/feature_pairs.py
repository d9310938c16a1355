"""Group pairs of features into Triton launches, and find the strides to read them in place."""

from collections.abc import Iterator, Sequence

from torch import Tensor

PAIRS = 16  # maximum pairs per launch: the kernel is unrolled over them


def strides_of(t: Tensor) -> tuple[int, int, int] | None:
    """Return the strides of (image, channel, position), or None if no single stride covers all positions."""
    n, c, h, w = t.stride()
    height, width = t.shape[2:]
    if width == 1:
        return n, c, h
    return (n, c, w) if height == 1 or h == width * w else None


def readable(t: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Return ``t`` and its strides (`strides_of`); a contiguous copy of ``t`` if there are none."""
    strides = strides_of(t)
    _, C, H, W = t.shape
    return (t, strides) if strides else (t.contiguous(), (C * H * W, H * W, 1))


Shapes = tuple[tuple[int, ...], ...]


def by_layout(tensors: Sequence[Sequence[Tensor]], pairs: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
    """Yield the layout and the pairs of each launch: "rows" (channels_last) or "planes", at most PAIRS pairs."""
    layouts: dict[str, list[int]] = {}
    for i in pairs:
        strides = [strides_of(ts[i]) for ts in tensors]
        rows = all(s is not None and s[1] == 1 for s in strides)
        layouts.setdefault("rows" if rows else "planes", []).append(i)
    for layout, members in layouts.items():
        for first in range(0, len(members), PAIRS):
            yield layout, members[first : first + PAIRS]


def read(tensors: Sequence[Tensor], members: Sequence[int]) -> tuple[tuple[Tensor, ...], Shapes]:
    """Return the tensors of the members and their strides, as `readable` does for each."""
    readable_tensors, strides = zip(*(readable(tensors[i]) for i in members), strict=True)
    return readable_tensors, strides


def shapes(tensors: Sequence[Tensor], members: Sequence[int]) -> Shapes:
    """Return the index of the first sum of each member, and N, C and P of each."""
    firsts, total = [], 0
    for t in tensors:
        firsts.append(total)
        total += 3 * t.shape[0] * t.shape[2] * t.shape[3]
    sizes = [(firsts[i], tensors[i].shape[0], tensors[i].shape[1], tensors[i].shape[2:].numel()) for i in members]
    return tuple(tuple(column) for column in zip(*sizes, strict=True))
