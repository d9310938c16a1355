"""ReContrast: visual anomaly detection by contrastive reconstruction (Guo et al., NeurIPS 2023)."""

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recontrast import metrics, ops
    from recontrast.anomaly_map import AnomalyMap
    from recontrast.app.estimator import ReContrastDetector
    from recontrast.engine.recipes import RECIPES, Recipe
    from recontrast.loss import (
        alpha_at,
        deviation,
        global_cosine,
        hard_mined_cosine,
        hardest,
        pairs_loss,
        point_cosine,
        power,
    )
    from recontrast.model import ReContrast

__all__ = [
    "RECIPES",
    "AnomalyMap",
    "ReContrast",
    "ReContrastDetector",
    "Recipe",
    "alpha_at",
    "deviation",
    "global_cosine",
    "hard_mined_cosine",
    "hardest",
    "metrics",
    "ops",
    "pairs_loss",
    "point_cosine",
    "power",
]
__version__ = "0.1.0"


class _Kernels:
    """Finds ``recontrast.kernels``, and nothing else, beside the package: in a checkout kernels/ is not in it."""

    folder = Path(__file__).parents[1] / "kernels"

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """What the import system asks of every finder; it asks this one last."""
        if name != f"{__name__}.kernels":
            return None
        return spec_from_file_location(name, cls.folder / "__init__.py", submodule_search_locations=[str(cls.folder)])


if not Path(__file__).with_name("kernels").exists() and _Kernels.folder.with_name("setup.py").exists():
    sys.meta_path.append(_Kernels)

# Imported on first use: torch and timm take seconds, and `recontrast --help` needs neither.
_MODULES = {
    "AnomalyMap": "anomaly_map",
    "ReContrast": "model",
    "ReContrastDetector": "app.estimator",
    "RECIPES": "engine.recipes",
    "Recipe": "engine.recipes",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'recontrast' has no attribute {name!r}")
    if name in ("metrics", "ops"):
        return importlib.import_module(f"recontrast.{name}")
    return getattr(importlib.import_module(f"recontrast.{_MODULES.get(name, 'loss')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
