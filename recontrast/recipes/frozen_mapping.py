"""A mapping of names to plain values that cannot be changed, for fields of a `Recipe`."""

from collections.abc import Iterator, Mapping
from typing import Any


class FrozenMapping(Mapping[str, Any]):
    """Mapping that cannot be changed and can be hashed; lists in it become tuples.

    Args:
        values: Values by name.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}

    def __getitem__(self, key: str) -> Any:
        """Return the value called ``key``."""
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._values)

    def __len__(self) -> int:
        """Number of values."""
        return len(self._values)

    def __hash__(self) -> int:
        """Hash of all names and values."""
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        """Return the mapping as a dictionary is written."""
        return repr(self._values)

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary with values that JSON can represent; tuples become lists."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self._values.items()}
