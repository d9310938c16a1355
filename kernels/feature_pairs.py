"""Pairs of features that go into one Triton launch, and how they are read in place."""

from collections.abc import Iterator, Sequence

from torch import Tensor

TOGETHER = 16  # pairs of a launch: each is compiled into the kernel


def strides_of(t: Tensor) -> tuple[int, int, int] | None:
    """Strides of (image, channel, position), or None where one stride does not walk through all positions."""
    n, c, h, w = t.stride()
    height, width = t.shape[2:]
    if width == 1:
        return n, c, h
    return (n, c, w) if height == 1 or h == width * w else None


def readable(t: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """``t`` with its strides; a copy of it (the only one made here) where the layout is a rare one."""
    found = strides_of(t)
    _, C, H, W = t.shape
    return (t, found) if found else (t.contiguous(), (C * H * W, H * W, 1))


Shapes = tuple[tuple[int, ...], ...]


def by_layout(tensors: Sequence[Sequence[Tensor]], pairs: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
    """Pairs that go into one launch: the same layout, at most TOGETHER."""
    layouts: dict[str, list[int]] = {}
    for i in pairs:
        strides = [strides_of(ts[i]) for ts in tensors]
        rows = all(s is not None and s[1] == 1 for s in strides)
        layouts.setdefault("rows" if rows else "planes", []).append(i)
    for layout, members in layouts.items():
        for first in range(0, len(members), TOGETHER):
            yield layout, members[first : first + TOGETHER]


def read(tensors: Sequence[Tensor], members: Sequence[int]) -> tuple[tuple[Tensor, ...], Shapes]:
    """The members as `readable` gives them: tensors, and strides."""
    found, strides = zip(*(readable(tensors[i]) for i in members), strict=True)
    return found, strides


def shapes(tensors: Sequence[Tensor], members: Sequence[int]) -> Shapes:
    """Where the sums of each member begin, and its N, C and P."""
    firsts, at = [], 0
    for t in tensors:
        firsts.append(at)
        at += 3 * t.shape[0] * t.shape[2] * t.shape[3]
    sizes = [(firsts[i], tensors[i].shape[0], tensors[i].shape[1], tensors[i].shape[2:].numel()) for i in members]
    return tuple(tuple(column) for column in zip(*sizes, strict=True))
