"""Stages of `gpu.py` that measure inference: from decoded images, and whole evaluations from files."""

import copy
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import upstream
from measurements import Run
from PIL import Image
from upstream_model import upstream_from

from recontrast.data.cache import ImageCache
from recontrast.data.datasets import Sample
from recontrast.data.images import normalise, read_mask
from recontrast.evaluation.evaluate import evaluate
from recontrast.inference.infer import infer
from recontrast.inference.options import InferenceOptions
from recontrast.recipes.paper import RECIPES
from recontrast.training.train import build_model


def evaluation(run: Run) -> None:
    """Measure images/s from decoded images to maps and scores: ours with batch 64, the reference with batch 1."""
    backbone, size, count = ("resnet18", 64, 4) if run.tiny else ("wide_resnet50_2", 256, 256)
    batch = 2 if run.tiny else 64
    base = RECIPES["mvtec"].replace(backbone=backbone, weights="random", encoder_bn="eval", size=size)
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    group = f"evaluation before metrics, {backbone}, {size} px"
    initial = build_model(base, "carpet")
    model = upstream_from(initial, backbone).to(run.device)
    model.eval()
    few = normalise(images[: max(count // 16, 2)], initial.mean, initial.std)

    def one_by_one():
        with torch.no_grad():
            for image in few:
                pairs = list(zip(*model(image[None].to(run.device)), strict=True))
                upstream.anomaly_map_sum(pairs, (size, size)).max()

    run.measure(group, "reference, batch 1", one_by_one, images=len(few), seconds=1.0, most=5)
    for name, way in {  # the compiled one comes last, since it may take all remaining time
        "ours + bfloat16 + folded": InferenceOptions(precision="bfloat16"),
        "ours, NCHW": InferenceOptions(channels_last=False, folded=False),
        "ours": InferenceOptions(folded=False),
        "ours + folded": InferenceOptions(),
        "ours + bfloat16": InferenceOptions(precision="bfloat16", folded=False),
        "ours, trained view + bfloat16 + folded": InferenceOptions(views="trained", precision="bfloat16"),
        "ours + bfloat16 + folded + compiled": InferenceOptions(precision="bfloat16", compiled=True),
    }.items():
        if run.is_out_of_time() or (way.compiled and run.tiny):
            continue
        recipe = way.apply_to(base)
        network = way.build_network(copy.deepcopy(initial).to(run.device), recipe, base)

        def work(network=network, recipe=recipe):
            return [scores for _, scores in infer(network, images, recipe, batch=batch)]

        run.measure(group, f"{name}, batch {batch}", work, images=count, seconds=1.0, most=5)


def whole(run: Run) -> None:
    """Measure a whole evaluation from files to pixel metrics: exact, streaming on the device, and the reference."""
    backbone, size, count = ("resnet18", 64, 8) if run.tiny else ("wide_resnet50_2", 256, 256)
    base = RECIPES["mvtec"].replace(backbone=backbone, weights="random", encoder_bn="eval", size=size)
    group = f"whole evaluation, {backbone}, {size} px, {count} images in files"
    with tempfile.TemporaryDirectory() as folder:
        samples = draw_samples(Path(folder), count, size)
        few = samples[:: max(count // 8, 1) | 1]  # an odd step selects good and defective images
        initial = build_model(base, "carpet")
        model = upstream_from(initial, backbone).to(run.device)
        model.eval()
        images = normalise(ImageCache(few, size)[:], initial.mean, initial.std)  # decoding is not timed
        empty = np.zeros((size, size), bool)
        masks = [empty if s.mask is None else read_mask(s.mask, size=size) for s in few]
        truth, labels = torch.from_numpy(np.stack(masks))[:, None], np.array([s.label for s in few])

        def pairs(batch):
            return list(zip(*model(batch.to(run.device)), strict=True))

        def loop():
            return upstream.evaluate(pairs, images, truth, labels)

        run.measure(group, f"reference, {len(few)} of them", loop, images=len(few), seconds=1.0, most=1)
        for name, way, streaming in (
            ("ours, exact", InferenceOptions(), False),
            ("ours, streaming, bfloat16", InferenceOptions(precision="bfloat16"), True),
            ("ours, exact, bfloat16", InferenceOptions(precision="bfloat16"), False),
            ("ours, streaming", InferenceOptions(), True),
        ):
            if run.is_out_of_time():
                return
            recipe = way.apply_to(base)
            network = way.build_network(copy.deepcopy(initial).to(run.device), recipe, base)
            work = partial(evaluate, network, samples, recipe, batch=2 if run.tiny else 64, streaming=streaming)
            run.measure(group, name, work, images=count, seconds=1.0, most=3)


def draw_samples(folder: Path, count: int, size: int) -> list[Sample]:
    """Draw test images of noise; every second one has a square and a mask of it."""
    random, samples = np.random.default_rng(0), []
    for number in range(count):
        pixels, mask = random.integers(0, 256, (size, size, 3), dtype=np.uint8), np.zeros((size, size), np.uint8)
        path, mask_path = folder / f"{number:04}.png", None
        if number % 2:
            top, left = random.integers(0, size - size // 8, 2)
            mask[top : top + size // 8, left : left + size // 8] = 255
            pixels[mask > 0] = 0
            mask_path = folder / f"{number:04}_mask.png"
            Image.fromarray(mask).save(mask_path, compress_level=1)
        Image.fromarray(pixels).save(path, compress_level=1)
        kind = "square" if number % 2 else "good"
        samples.append(Sample(path, mask_path, number % 2, "drawn", "test", kind))
    return samples
