"""Layers of a vision transformer that serve as feature levels: which blocks, and how they are grouped.

All blocks of a vision transformer have the same size and width. A level is therefore a group of blocks whose outputs
are averaged, as in Dinomaly (Guo et al., CVPR 2025, https://arxiv.org/abs/2405.14325, section 3.4, loose constraint).
"""

from collections.abc import Sequence
from itertools import chain, pairwise

# Blocks that Dinomaly takes from a transformer of 12 blocks (section 4.1); of 24 blocks it takes 4, 6, ..., 18.
_MIDDLE_BLOCKS = range(2, 10)
_BLOCKS = 12


def list_middle_blocks(depth: int) -> tuple[int, ...]:
    """Return the middle blocks of a transformer, by the proportion of Dinomaly's 2 to 9 of 12.

    Args:
        depth: Number of blocks.

    Returns:
        Indices of the blocks, counted from 0, ascending; 8 of them if there are at least 12 blocks.
    """
    return tuple(sorted({block * depth // _BLOCKS for block in _MIDDLE_BLOCKS}))


def group_middle_blocks(name: str, depth: int, levels: int) -> tuple[tuple[int, ...], ...]:
    """Divide the middle blocks into groups of equal size; the first ones have one block more if that is impossible.

    Args:
        name: Name of the backbone, for the message.
        depth: Number of blocks of the transformer.
        levels: Number of groups.

    Returns:
        Indices of the blocks of each group, counted from 0, ascending.

    Raises:
        ValueError: If there are more levels than middle blocks, or none.
    """
    blocks = list_middle_blocks(depth)
    if not 1 <= levels <= len(blocks):
        wanted = f"1 to {len(blocks)} for {name!r}, which has {depth} blocks"
        raise ValueError(f"backbone: levels: wanted {wanted}, got {levels}")
    size, rest = divmod(len(blocks), levels)
    starts = [level * size + min(level, rest) for level in range(levels + 1)]
    return tuple(blocks[start:stop] for start, stop in pairwise(starts))


def check_layers(name: str, depth: int, layers: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Check groups of blocks.

    Args:
        name: Name of the backbone, for the message.
        depth: Number of blocks of the transformer.
        layers: Indices of the blocks of each group, counted from 0.

    Returns:
        The groups as tuples.

    Raises:
        ValueError: If a group is empty, the indices do not ascend from the first group to the last, or a block does
            not exist.
    """
    groups = tuple(tuple(group) for group in layers)
    blocks = list(chain.from_iterable(groups))
    is_whole = all(isinstance(block, int) for block in blocks)
    if not groups or not all(groups) or not is_whole or blocks != sorted(set(blocks)):
        wanted = "groups of blocks, such as [[2, 3], [4, 5]], whose numbers ascend"
        raise ValueError(f"backbone: layers: wanted {wanted}, got {[list(group) for group in groups]}")
    if blocks[0] < 0 or blocks[-1] >= depth:
        wanted = f"blocks 0 to {depth - 1} of {name!r}"
        raise ValueError(f"backbone: layers: wanted {wanted}, got {blocks[0] if blocks[0] < 0 else blocks[-1]}")
    return groups
