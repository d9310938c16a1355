"""A time budget: what to train so that it is done in time, from the measured speed of this machine.

By default the plan is an ensemble of PatchCore and PaDiM at the largest image size that fits, because of all detectors
here it reaches most in minutes on a CPU (benchmarks/README.md, "Accuracy per minute"): larger images help more than a
larger bank. For architectures that are trained by steps, the plan is the number of steps.
"""

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from operator import gt
from typing import Any

import numpy as np
import torch

from recontrast.architectures import build_model, compute_rule_parameter, get_architecture
from recontrast.data.augment import count_views
from recontrast.data.encoded_image import ImageSource
from recontrast.data.images import image_size, normalise, read_image
from recontrast.data.tiles import count_tiles
from recontrast.inference.tiling import resolve_overlap
from recontrast.models.ensemble import Ensemble
from recontrast.models.network import Network
from recontrast.models.patchcore import PatchCore
from recontrast.recipes.recipe import Recipe, to_pair
from recontrast.runtime.device import move_model, synchronize
from recontrast.training.optimisers import build_optimisers
from recontrast.training.step import train_step

SIZES = (128, 160, 192, 224, 256, 288, 320)  # image sizes to choose from, in pixels
BANK = 4096  # vectors of the bank, unless 1 % of all vectors are more
MIN_SHARE = 0.01
BYTES = 2 << 30  # of features that may be in memory at once
SAFETY = 0.75  # share of the budget that is planned; the speed of a machine varies
AFTER_FACTOR = 1.5  # on the estimated time of what follows the last image or step
WRITING = 2.0  # seconds for the files of a run
BFLOAT16_GAIN = 1.2  # bfloat16 is used if it is this many times faster
MIN_IMAGES = 10  # for the Gaussians of PaDiM
PROBE_SIZE, PROBE_BATCH = 256, 4
STEP_BATCH = 8  # largest batch of a timed training step; larger ones take at most as long per image
COSTS_PER_SELECTION = 2.0  # time of the coreset, relative to one product of all vectors with all selected ones


@dataclass(frozen=True)
class BudgetPlan:
    """A training run that fits into a time budget.

    Attributes:
        recipe: Recipe of the run.
        seconds: Expected duration, in seconds.
        seconds_after: Part of ``seconds`` after the last image is observed, or after the last step.
        description: What was chosen and why, in one sentence.
    """

    recipe: Recipe
    seconds: float
    description: str
    seconds_after: float = 0.0

    def compute_time_limit(self, remaining: float) -> float:
        """Compute in what time the training must have seen its last image.

        Args:
            remaining: Time until the end of the budget, in seconds.

        Returns:
            Argument ``time_limit`` of `recontrast.training.train.train`, in seconds.
        """
        return remaining - AFTER_FACTOR * self.seconds_after


def plan_budget(
    recipe: Recipe,
    fixed: Collection[str],
    paths: Sequence[ImageSource],
    held_out: int,
    seconds: float,
    device: torch.device,
    category: str = "",
) -> BudgetPlan:
    """Choose a training run that is done within a time budget.

    Args:
        recipe: Recipe to start from.
        fixed: Fields of the recipe that must not be changed. Without "architecture" among them, the ensemble is chosen,
            or PatchCore for fewer than 10 images and for tiles.
        paths: Good images to train on.
        held_out: Number of good images that are held out and scored for the calibration.
        seconds: Time budget of the training, with reading and calibration, in seconds.
        device: Device of the training.
        category: Category, for `Recipe.encoder_bn_for`.

    Returns:
        The plan.

    Raises:
        ValueError: If the budget is too short for any run; the message gives the shortest that works.
        OSError: If an image or the weights cannot be read.
    """
    started = time.perf_counter()
    if "architecture" not in fixed:
        recipe = _choose_architecture(recipe, fixed, len(paths))
    probe = _Probe(recipe, paths, held_out, device, category)
    remaining = seconds * SAFETY - WRITING - (time.perf_counter() - started)
    if recipe.uses_steps:
        return _plan_steps(probe, recipe, fixed, seconds, remaining)
    return _plan_pass(probe, recipe, fixed, seconds, remaining)


def _choose_architecture(recipe: Recipe, fixed: Collection[str], count: int) -> Recipe:
    """Return the recipe with the ensemble, or with PatchCore for few images and for tiles, which PaDiM cannot learn."""
    if count < MIN_IMAGES or recipe.tile is not None:
        return recipe.replace(architecture="patchcore")
    changes: dict[str, Any] = {"architecture": "ensemble"}
    small = to_pair(recipe.small_size)
    if "small_size" not in fixed and ("size" in fixed or recipe.crop is not None) and any(map(gt, small, recipe.out)):
        changes["small_size"] = tuple(map(min, small, recipe.out))
    if "score" not in fixed and recipe.roi is None:
        changes["score"] = "model"
    return recipe.replace(**changes)


class _Probe:
    """Measured speed of this machine: reading an image, the network, and matrix products.

    ``count`` and ``held_out`` are numbers of images that the network sees: tiles, if the recipe has them, including
    those outside a region of interest. ``reading`` is the time to read all files.
    """

    def __init__(
        self, recipe: Recipe, paths: Sequence[ImageSource], held_out: int, device: torch.device, category: str
    ) -> None:  # fmt: skip
        self.device, copies = device, count_views(recipe.augment)
        self.count, self.held_out = len(paths) * copies, held_out
        if (tile := recipe.tile) is not None:
            shapes = [image_size(path) for path in paths]
            trained, scored = (
                sum(count_tiles(shape, tile, stride) for shape in shapes)
                for stride in (recipe.stride or tile, tile - resolve_overlap(tile))
            )
            self.count, self.held_out = trained * copies, math.ceil(held_out * scored / len(paths))
        self.model = build_model(recipe.replace(**_probe_size(recipe)), category)
        self.channels_last = move_model(self.model, device, recipe.channels_last) == torch.channels_last
        self.size = recipe.out if recipe.tile is not None else _probe_pair(recipe)
        chosen = [paths[index] for index in np.linspace(0, len(paths) - 1, min(PROBE_BATCH, len(paths))).astype(int)]
        begin = time.perf_counter()
        images = [read_image(path, size=self.size, bits=recipe.bits, window=recipe.window) for path in chosen]
        self.reading = (time.perf_counter() - begin) / len(images) * (len(paths) * copies + held_out)
        repeated = np.stack([images[index % len(images)] for index in range(PROBE_BATCH)])
        self.pixels = torch.from_numpy(repeated).to(device)

    def time(self, work: Callable[[], object]) -> float:
        """Return the shortest duration of two calls after one that is not counted."""
        durations = []
        for _ in range(3):
            begin = time.perf_counter()
            work()
            synchronize(self.device)
            durations.append(time.perf_counter() - begin)
        return min(durations[1:])

    def time_network(self, precision: str, is_whole: bool = True) -> float:
        """Return the seconds per image of the network, or of its encoder alone, at the size of the probe."""
        model, dtype = self.model.eval(), next(self.model.parameters()).dtype
        x = normalise(self.pixels, model.mean, model.std, dtype=dtype, channels_last=self.channels_last)

        @torch.inference_mode()
        def run() -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                (model if is_whole else model.encoder)(x)

        return self.time(run) / PROBE_BATCH

    def time_products(self) -> float:
        """Return the seconds of a multiplication and addition in large float32 matrix products."""
        a, b = (torch.randn(2048, 256, device=self.device) for _ in range(2))
        return self.time(lambda: a @ b.T) / (2048 * 2048 * 256)


def _probe_pair(recipe: Recipe) -> tuple[int, int]:
    """Return the image size of the probe: that of the recipe if it is smaller, else about `PROBE_SIZE`."""
    height, width = recipe.out
    side = _round_to_multiple(PROBE_SIZE, get_architecture(recipe).compute_stride(recipe))
    return (height, width) if max(height, width) <= PROBE_SIZE else (side, side)


def _round_to_multiple(size: int, stride: int) -> int:
    """Return the multiple of ``stride`` nearest to ``size``, at least one."""
    return max(round(size / stride), 1) * stride


def _probe_size(recipe: Recipe) -> dict[str, Any]:
    """Return the fields that give the network the size of the probe."""
    if recipe.tile is not None or recipe.crop is not None:
        return {}
    height, width = _probe_pair(recipe)
    small = tuple(map(min, to_pair(recipe.small_size), (height, width)))
    return {"size": (height, width), **({"small_size": small} if recipe.architecture == "ensemble" else {})}


def _plan_steps(
    probe: _Probe, recipe: Recipe, fixed: Collection[str], seconds: float, remaining: float
) -> BudgetPlan:  # fmt: skip
    """Plan as many training steps as fit."""
    model, pixels = probe.model.train(), recipe.out[0] * recipe.out[1] / (probe.size[0] * probe.size[1])
    optimisers, dtype = build_optimisers(model, recipe, probe.device), next(model.parameters()).dtype
    parameter = compute_rule_parameter(recipe, 0)
    batch = min(recipe.batch, probe.count)
    timed = min(batch, STEP_BATCH)  # the optimiser takes its time once a step: fewer images would count it often
    drawn = probe.pixels[torch.arange(timed, device=probe.device) % PROBE_BATCH]
    x = normalise(drawn, model.mean, model.std, dtype=dtype, channels_last=probe.channels_last)
    per_step = probe.time(lambda: train_step(model, optimisers, x, parameter, recipe)) * batch / timed * pixels
    after = probe.held_out * probe.time_network(recipe.precision) * pixels + WRITING
    once = probe.reading + after - WRITING
    steps = math.floor((remaining - once) / per_step)
    if steps < 1 or ("steps" in fixed and steps < recipe.steps):
        least = recipe.steps if "steps" in fixed else 1
        _raise_too_short(seconds, (seconds * SAFETY - remaining) + once + least * per_step)
    steps = recipe.steps if "steps" in fixed else steps
    expected = seconds * SAFETY - remaining + once + steps * per_step
    size = " x ".join(map(str, recipe.out))
    kind = "images" if recipe.tile is None else "tiles"
    text = f"{steps} steps of {batch} {kind} at {size} px ({per_step:.3g} s a step on this machine)"
    return BudgetPlan(recipe.replace(steps=steps), expected, f"{recipe.architecture}: {text}", after)


def _plan_pass(
    probe: _Probe, recipe: Recipe, fixed: Collection[str], seconds: float, remaining: float
) -> BudgetPlan:  # fmt: skip
    """Plan the largest image size that fits, for an architecture that is fitted in one pass."""
    network, precision = _choose_precision(probe, recipe, fixed)
    product, held_out = probe.time_products(), probe.held_out
    stride = get_architecture(recipe).compute_stride(recipe)
    sizes: list[int | tuple[int, int]] = sorted({_round_to_multiple(size, stride) for size in SIZES})
    if recipe.architecture == "padim":  # larger images lower its accuracy
        sizes = sizes[:1]
    if "size" in fixed or "tile" in fixed or recipe.tile is not None or recipe.crop is not None:
        sizes = [recipe.size]
    plans: list[tuple[float, float, Recipe]] = []
    for size in sizes:
        candidate = recipe.replace(size=size, precision=precision)
        height, width = candidate.out
        pixels = height * width
        if isinstance(probe.model, Ensemble):
            pixels += math.prod(to_pair(recipe.small_size))
        scale = pixels / (probe.size[0] * probe.size[1])
        points, vectors = _count_vectors(probe.model, candidate, probe.count)
        cost = probe.reading + (probe.count + held_out) * network * scale
        after = held_out * network * scale + WRITING
        if (bank_width := _get_bank_width(probe.model)) is not None:
            if "bank_share" not in fixed:
                candidate = candidate.replace(bank_share=min(max(BANK / vectors, MIN_SHARE), 1.0))
            bank = max(vectors * candidate.bank_share, 1)
            search = COSTS_PER_SELECTION * vectors * bank * 128 * product  # of the coreset, in 128 dimensions
            search += 1.5 * held_out * points * bank * bank_width * product
            cost, after = cost + search, after + search
            if vectors * bank_width * 14 > BYTES and plans:
                break
        plans.append((cost, after, candidate))
        if cost > remaining:
            break
    fitting = [plan for plan in plans if plan[0] <= remaining]
    before = seconds * SAFETY - remaining
    if not fitting:
        _raise_too_short(seconds, before + plans[0][0])
    cost, after, chosen = fitting[-1]
    text = f"{recipe.architecture} at {' x '.join(map(str, chosen.out))} px in {precision}"
    milliseconds = 1000 * network * chosen.out[0] * chosen.out[1] / (probe.size[0] * probe.size[1])
    kind, one = ("images", "an image") if recipe.tile is None else ("tiles", "a tile")
    text += f" ({milliseconds:.0f} ms {one} on this machine, {probe.count} {kind})"
    return BudgetPlan(chosen, before + cost, text, after)


def _choose_precision(probe: _Probe, recipe: Recipe, fixed: Collection[str]) -> tuple[float, str]:
    """Return the seconds per image and the precision of the encoder: bfloat16 where it is clearly faster."""
    if "precision" in fixed:
        return probe.time_network(recipe.precision, False), recipe.precision
    full, half = probe.time_network("float32", False), probe.time_network("bfloat16", False)
    return (half, "bfloat16") if half * BFLOAT16_GAIN < full else (full, "float32")


def _get_bank_width(model: Network) -> int | None:
    """Return the length of the vectors in the bank of a network; None if it has no bank."""
    if isinstance(model, Ensemble):
        return model.patchcore.width
    return model.width if isinstance(model, PatchCore) else None


def _count_vectors(model: Network, recipe: Recipe, images: int) -> tuple[int, int]:
    """Return the number of points in the finest map of an image, and in those of all images."""
    height, width = recipe.out
    bank = model.patchcore if isinstance(model, Ensemble) else model
    finest = model.encoder.strides[bank.levels[0] - 1 if isinstance(bank, PatchCore) else 0]
    points = (height // finest) * (width // finest)
    return points, points * images


def _raise_too_short(seconds: float, needed: float) -> None:
    least = math.ceil(needed / SAFETY)
    raise ValueError(f"--budget: wanted at least {least} s on this machine, got {seconds:g} s")
