"""Run folder of a tiny detector for report tests."""

import torch
from tiny import tiny_set

from recontrast import checkpoint as checkpoints
from recontrast.recipes.recipe import Recipe
from recontrast.training.json_log import JsonLog
from recontrast.training.train import build_model

RECIPE = Recipe(backbone="test_resnet", weights="random", size=64, encoder_bn="eval")


def make_run(root, category="nut", **sizes):
    """Create a run and its data, by default 4 good and 4 defective test images, and return both folders."""
    data = root / "data"
    tiny_set(data, category, train=2, **{"good": 4, "defects": 4, **sizes})
    torch.manual_seed(0)
    model = build_model(RECIPE, category)
    run = root / "run"
    about = {"size": [64, 64], "crop": None, "mean": list(model.mean), "std": list(model.std)}
    checkpoints.save(run / "checkpoint.pt", checkpoints.Checkpoint(
        40, category, RECIPE, model.config, about, {"count": 2, "digest": ""}, model.state_dict()
    ))  # fmt: skip
    log = JsonLog(run / "log.jsonl")
    for step in range(10, 50, 10):
        log.write(step=step, loss=2.0 / step, alpha=0.5, images_per_second=9.0, seconds=1.0 * step)
    return run, data
