"""One process of tests/runtime/test_distributed.py: trains every case on DATA and writes the results to OUT.

python -m torch.distributed.run --nproc_per_node 3 tests/torchrun_worker.py DATA OUT
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from recontrast.data import datasets
from recontrast.evaluation.evaluate import evaluate
from recontrast.experiments.reproduce import reproduce
from recontrast.models.recontrast import ReContrast
from recontrast.recipes.recipe import Recipe
from recontrast.runtime import distributed
from recontrast.training.train import train

RECIPE = Recipe(
    backbone="resnet18", weights="random", steps=5, batch=5, size=64, encoder_bn="train", log_every=2, seed=3,
    encoder_lr=1e-4, ramp=0.0, channels_last=False,
)  # fmt: skip
CASES = {
    "plain": RECIPE,
    "partial": RECIPE.replace(partial_norm=True),
    "single": RECIPE.replace(batch=2, encoder_bn="eval"),  # one of three processes never has an image
    "classes": RECIPE.replace(sampling="classes", augment="flips"),
}


def build_small_model(recipe):
    """Return a float64 model whose weights depend on the seed alone."""
    torch.manual_seed(recipe.seed)
    return ReContrast(
        recipe.backbone, weights="random", levels=2, encoder_bn=recipe.encoder_bn, partial_norm=recipe.partial_norm
    ).double()


def train_case(case, data, out):
    """Train one case and save its losses and weights."""
    recipe = CASES[case]
    out.mkdir(parents=True, exist_ok=True)
    samples = [s for group in datasets.load(data).values() for s in group]
    result = train(recipe, samples, out=out / "run", model=build_small_model(recipe), device="cpu")
    rank = distributed.current_world().rank
    (out / f"losses{rank}.json").write_text(json.dumps(result.losses))
    torch.save(result.model.state_dict(), out / f"model{rank}.pt")


def evaluate_untrained_model(data, out):
    """Evaluate an untrained model in batches of one image, so that the results do not depend on the processes."""
    samples = datasets.load(data)
    model, rank = build_small_model(RECIPE).eval(), distributed.current_world().rank
    for streaming in (False, True):
        result = evaluate(model, samples, RECIPE, batch=1, streaming=streaming)
        rows = [{**asdict(row), "seconds": None} for row in result.rows]
        text = json.dumps({"rows": rows, "scored": [asdict(s) for s in result.scored]})
        (out / f"{'streamed' if streaming else 'exact'}{rank}.json").write_text(text)


def train_on_different_images(data, out):
    """Train on different images in each process, and save the error."""
    samples = [s for group in datasets.load(data).values() for s in group]
    rank = distributed.current_world().rank
    try:
        train(
            RECIPE, samples[rank:], out=out / "refused", category="all", model=build_small_model(RECIPE), device="cpu"
        )
    except ValueError as error:
        (out / f"error{rank}.txt").write_text(str(error))


def reproduce_table(data, out):
    """Reproduce a table of two runs in all processes together."""
    changes = {"backbone": "test_resnet", "weights": "random", "size": 32, "batch": 3, "steps": 2}
    comparison = reproduce("maps", data, out / "table", categories=["nut"], changes=changes, device="cpu")
    (out / f"table{distributed.current_world().rank}.json").write_text(json.dumps(comparison.to_dict()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    data, out = map(Path, sys.argv[1:])
    with distributed.join_processes("cpu"):
        for case in CASES:
            train_case(case, data, out / case)
        evaluate_untrained_model(data, out)
        reproduce_table(data, out)
        train_on_different_images(data, out)
