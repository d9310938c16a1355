"""recontrast.recipes.describe: values of files in error messages, whatever they are."""

import numpy as np
import pytest

from recontrast.recipes.describe import describe_value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"), ("a b", "'a b'"), (None, "None"), ([1, 2], "[1, 2]"), ({"a": (1,)}, "{'a': (1,)}"),
        ("line\nbreak", "'line\\nbreak'"), (0.1, "0.1"), (True, "True"),
    ],
)  # fmt: skip
def test_short_values_are_written_whole(value, text):
    assert describe_value(value) == text


class Breaks:
    def __repr__(self):
        return "one\n   two"


def test_line_breaks_become_spaces():
    assert describe_value(Breaks()) == "one two"


def test_long_values_are_shortened():
    itself = []
    itself.append(itself)
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 10**6, list(range(10**5)), {str(i): i for i in range(10**5)}, [["y" * 150] * 6] * 6,
                  np.zeros((100, 100)), b"z" * 10**6, itself, deep, 10**3000):  # fmt: skip
        text = describe_value(value)
        assert 0 < len(text) <= 203 and "\n" not in text
        assert "..." in text
    assert describe_value(10**6000) == "a very large int"


def test_mapping_of_another_kind_is_bounded():
    """A frozen mapping of aliases, each of which holds the one before ten times, would be printed for minutes."""
    from recontrast.recipes.frozen_mapping import FrozenMapping

    value = ["x"]
    for _ in range(9):
        value = [value] * 10
    assert len(describe_value(FrozenMapping({"a": value}))) <= 203
