"""Replacement of submodules of a network."""

from collections.abc import Mapping

from torch import nn


def replace_modules(module: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace submodules in place. A submodule that is registered under several names is replaced under all of them.

    Args:
        module: Module.
        replacements: New submodules by the old ones.

    Returns:
        ``module``, or its replacement if it is replaced itself.
    """
    if module in replacements:
        return replacements[module]
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])
    return module
