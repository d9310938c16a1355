"""ReContrast: visual anomaly detection by contrastive reconstruction (Guo et al., NeurIPS 2023)."""

import importlib
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

# Python that is started in a checkout takes the package from there, where kernels/ lies beside it, not in it.
_CHECKOUT = Path(__file__).parents[1]
if not Path(__file__).with_name("kernels").exists() and (_CHECKOUT / "setup.py").exists():
    __path__.append(str(_CHECKOUT))

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
