"""Modules that are imported when they are first used: PyTorch takes seconds, and is missing on an inspection PC."""

from importlib import import_module
from types import ModuleType
from typing import Any


class LazyModule(ModuleType):
    """A module that is imported when the first of its attributes is used.

    Args:
        name: Full name of the module.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)
