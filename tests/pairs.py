"""Combinations of parameters for tests: each pair of values in one of them, where all would be too many."""

from collections.abc import Iterable, Mapping
from itertools import combinations, product
from typing import Any

import pytest


def cover_pairs(**parameters: Iterable[Any] | Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrize a test with combinations in which each value of a parameter meets each value of every other.

    An ordinary run takes these; ``pytest -m exhaustive`` takes the other combinations.

    Args:
        parameters: Values of each parameter, or a mapping from their names in the test's name.
    """
    values = [
        list(given.items()) if isinstance(given, Mapping) else [(str(value), value) for value in given]
        for given in parameters.values()
    ]
    remaining = list(product(*(range(len(choices)) for choices in values)))
    wanted = {pair for combination in remaining for pair in _list_pairs(combination)}
    marked = []
    while remaining:
        best = max(remaining, key=lambda combination: len(wanted & _list_pairs(combination)))
        marks = () if wanted else pytest.mark.exhaustive
        wanted -= _list_pairs(best)
        remaining.remove(best)
        chosen = [choices[index] for choices, index in zip(values, best, strict=True)]
        name = "-".join(name for name, _ in chosen)
        marked.append(pytest.param(*(value for _, value in chosen), marks=marks, id=name))
    return pytest.mark.parametrize(tuple(parameters), marked)


def _list_pairs(combination: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    """Return the pairs of a combination: (parameter, value) twice."""
    return set(combinations(enumerate(combination), 2))
