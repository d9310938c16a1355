"""ReContrast: visual anomaly detection by contrastive reconstruction (Guo et al., NeurIPS 2023)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recontrast import metrics, ops
    from recontrast.anomaly_map import AnomalyMap
    from recontrast.app.api import calibrate, evaluate, extend, find_samples, train
    from recontrast.app.estimator import ReContrastDetector
    from recontrast.app.load import load
    from recontrast.architectures import Architecture
    from recontrast.loss import global_cosine, hard_mined_cosine, pairs_loss, point_cosine
    from recontrast.mining import alpha_at, deviation, hardest, power
    from recontrast.models.recontrast import ReContrast
    from recontrast.recipes.paper import RECIPES
    from recontrast.recipes.recipe import Recipe
    from recontrast.registration import import_architectures, register_architecture

__all__ = [
    "RECIPES",
    "AnomalyMap",
    "Architecture",
    "ReContrast",
    "ReContrastDetector",
    "Recipe",
    "alpha_at",
    "calibrate",
    "deviation",
    "evaluate",
    "extend",
    "find_samples",
    "global_cosine",
    "hard_mined_cosine",
    "hardest",
    "import_architectures",
    "load",
    "metrics",
    "ops",
    "pairs_loss",
    "point_cosine",
    "power",
    "register_architecture",
    "train",
]
__version__ = "0.2.0"

# Imported on first use: torch and timm take seconds to import, and `recontrast --help` needs neither.
_MODULES = {
    "AnomalyMap": "anomaly_map",
    "Architecture": "architectures",
    "RECIPES": "recipes.paper",
    "ReContrast": "models.recontrast",
    "ReContrastDetector": "app.estimator",
    "Recipe": "recipes.recipe",
    "alpha_at": "mining",
    "calibrate": "app.api",
    "deviation": "mining",
    "evaluate": "app.api",
    "extend": "app.api",
    "find_samples": "app.api",
    "global_cosine": "loss",
    "hard_mined_cosine": "loss",
    "hardest": "mining",
    "import_architectures": "registration",
    "load": "app.load",
    "pairs_loss": "loss",
    "point_cosine": "loss",
    "power": "mining",
    "register_architecture": "registration",
    "train": "app.api",
}


def __getattr__(name: str) -> Any:
    if name in ("metrics", "ops"):
        return importlib.import_module(f"recontrast.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'recontrast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"recontrast.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
