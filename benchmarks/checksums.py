"""Time to load a checkpoint with and without its checks: checksums, and the search for values that are not finite.

    python benchmarks/checksums.py [--backbone wide_resnet50_2] [--repeat 7]

The variants take turns, so that a load from outside meets all of them alike.
"""

import argparse
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

from recontrast import ReContrast
from recontrast import checkpoint as checkpoints
from recontrast.checkpoint import file as checkpoint_file
from recontrast.data.archive import Archive
from recontrast.recipes.recipe import Recipe

VARIANTS = {"as it is": (), "without checksums": ("checksums",), "without any check": ("checksums", "finite")}


def write_checkpoint(path: Path, backbone: str) -> None:
    """Save a checkpoint of an untrained model, as at the end of a training."""
    torch.manual_seed(0)
    recipe = Recipe(backbone=backbone, weights="random", encoder_bn="eval")
    model = ReContrast(backbone, weights="random", encoder_bn="eval")
    preprocessing = {"size": [256, 256], "crop": None, "mean": list(model.mean), "std": list(model.std)}
    images = {"count": 1, "digest": ""}
    checkpoints.save(
        path,
        checkpoints.Checkpoint(1, "tile", recipe, model.config, preprocessing, images, model.state_dict()),
    )


def disable(checks: tuple[str, ...], stack: ExitStack) -> None:
    """Disable checks of `recontrast.checkpoint.load` until the stack is closed."""
    if "checksums" in checks:
        read = Archive.read
        stack.enter_context(
            mock.patch.object(Archive, "read", lambda self, name, *, verify=True: read(self, name, verify=False))
        )
        stack.enter_context(mock.patch.object(Archive, "verify", lambda self, names: None))
    if "finite" in checks:
        stack.enter_context(mock.patch.object(checkpoint_file, "find_not_finite", lambda weights: None))


def main() -> None:
    """Print the medians of wall-clock and CPU seconds of each variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="wide_resnet50_2")
    parser.add_argument("--repeat", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        write_checkpoint(path, arguments.backbone)
        cases = [(mapped, name) for mapped in (True, False) for name in VARIANTS]
        times: dict[tuple[bool, str], list[tuple[float, float]]] = {case: [] for case in cases}
        for turn in range(arguments.repeat + 1):
            for mapped, name in cases:
                with ExitStack() as stack:
                    disable(VARIANTS[name], stack)
                    begin, cpu = time.perf_counter(), time.process_time()
                    checkpoints.load(path, mapped=mapped)
                    taken = time.perf_counter() - begin, time.process_time() - cpu
                if turn:  # the first turn fills the caches of the system
                    times[mapped, name].append(taken)
        print(f"{arguments.backbone}, {path.stat().st_size / 1e6:.0f} MB, median of {arguments.repeat}, load average "
              f"{os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} CPUs")  # fmt: skip
        for (mapped, name), values in times.items():
            wall, cpu = (statistics.median(value[kind] for value in values) for kind in (0, 1))
            print(f"{'mapped' if mapped else 'whole':<7} {name:<18} {wall:6.2f} s, {cpu:6.2f} s of CPU")


if __name__ == "__main__":
    main()
