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
    from recontrast.loss import global_cosine, hard_mined_cosine, pairs_loss, point_cosine
    from recontrast.mining import alpha_at, deviation, hardest, power
    from recontrast.models.recontrast import ReContrast
    from recontrast.recipes.paper import RECIPES
    from recontrast.recipes.recipe import Recipe

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

# Imported on first use: torch and timm take seconds to import, and `recontrast --help` needs neither.
_MODULES = {
    "AnomalyMap": "anomaly_map",
    "RECIPES": "recipes.paper",
    "ReContrast": "models.recontrast",
    "ReContrastDetector": "app.estimator",
    "Recipe": "recipes.recipe",
    "alpha_at": "mining",
    "deviation": "mining",
    "global_cosine": "loss",
    "hard_mined_cosine": "loss",
    "hardest": "mining",
    "pairs_loss": "loss",
    "point_cosine": "loss",
    "power": "mining",
}


def __getattr__(name: str) -> Any:
    if name in ("metrics", "ops"):
        return importlib.import_module(f"recontrast.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'recontrast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"recontrast.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
