"""What the compiled kernels save: the same work with them and on PyTorch and NumPy alone.

    python benchmarks/without_kernels.py [--repeat 7]

Each variant runs in its own process; the processes take turns, so that a load from outside meets both alike.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

LEVELS = ((256, 64, 64), (512, 32, 32), (1024, 16, 16))  # of WideResNet-50-2 at 256 px


def time_work(work: Callable[[], object]) -> float:
    """Return the shortest duration of three calls, in seconds."""
    durations = []
    for _ in range(3):
        begin = time.perf_counter()
        work()
        durations.append(time.perf_counter() - begin)
    return min(durations)


def measure_once() -> dict[str, float]:
    """Return the durations of each kind of work in this process, in seconds."""
    import numpy as np
    import torch

    from recontrast import AnomalyMap, deviation, hard_mined_cosine, metrics
    from recontrast.architectures import build_model
    from recontrast.recipes.recipe import Recipe
    from recontrast.training.optimisers import build_optimisers
    from recontrast.training.step import train_step

    torch.manual_seed(0)
    teachers, students = ([torch.randn(8, *level) for level in LEVELS] for _ in range(2))
    for student in students:
        student.requires_grad_(True)
    maps, rng = AnomalyMap([level[1:] for level in LEVELS] * 2, (256, 256)), np.random.default_rng(0)
    distances = [torch.rand(16, *level[1:]) for level in LEVELS] * 2
    scores, masks = rng.random((100, 256, 256), np.float32), np.zeros((100, 256, 256), bool)
    for index in range(50):
        masks[index, 40:90, 60 + index : 110 + index] = True
    recipe = Recipe(backbone="resnet18", weights="random", encoder_bn="eval", batch=8)
    model = build_model(recipe, "").to(memory_format=torch.channels_last)
    optimisers = build_optimisers(model, recipe, torch.device("cpu"))
    images = torch.randn(8, 3, 256, 256).contiguous(memory_format=torch.channels_last)
    return {
        "loss, forward and backward": time_work(
            lambda: hard_mined_cosine(teachers, students, deviation(1.0)).backward()
        ),
        "maps of 16 images": time_work(lambda: maps.from_distances(distances)),
        "pixel metrics of 100 maps": time_work(lambda: metrics.pixel_metrics(scores, masks)),
        "training step, resnet18, batch 8": time_work(lambda: train_step(model, optimisers, images, 1.0, recipe)),
    }


def main() -> None:
    """Print the medians of both variants and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--once", choices=("native", "torch"))
    arguments = parser.parse_args()
    if arguments.once:
        if arguments.once == "torch":
            sys.modules["recontrast._metrics"] = None  # type: ignore[assignment]  # as if it were not built
        print(json.dumps(measure_once()))
        return
    results: dict[str, list[dict[str, float]]] = {"native": [], "torch": []}
    for _ in range(arguments.repeat):
        for variant, rows in results.items():
            command = [sys.executable, __file__, "--once", variant]
            environment = {**os.environ, "RECONTRAST_BACKEND": variant}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    for name in results["native"][0]:
        native, torch = (statistics.median(row[name] for row in rows) for rows in results.values())
        print(f"{name:<36} {1000 * native:9.1f} ms  {1000 * torch:9.1f} ms  {torch / native:6.1f} x")


if __name__ == "__main__":
    main()
