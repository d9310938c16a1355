"""More good images later: images under other light, added to a finished detector, beside training anew.

The good training images of a category are sorted by their mean brightness. A detector is trained on a part of the
darker half and calibrated on the rest of it. Then 40 images of the brighter half are added with `recontrast.extend`,
others of that half calibrate it again, and the remaining ones count false alarms before and after. Training anew on the
former and the new images is measured beside it. The images of each part are drawn at random, by ``--seeds``.

    python benchmarks/extend.py --data FOLDER/screw --backbone resnet18 --weights resnet18.pth --out extend.json
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurements import name_machine, write_record

import recontrast
from recontrast.data.images import read_image
from recontrast.data.listing import list_images
from recontrast.inference.detector import CheckpointDetector

METHODS: dict[str, dict[str, Any]] = {
    "patchcore": {"architecture": "patchcore", "size": 128},
    "padim": {"architecture": "padim", "size": 128},
    "ensemble": {"architecture": "ensemble", "size": 256, "small_size": 128},
    "recontrast": {"size": 128, "batch": 8, "encoder_bn": "eval", "ramp": 1.0, "encoder_lr": 1e-4},
}
NEW = 40  # images under new light


def divide(paths: list[Path], seed: int) -> dict[str, list[Path]]:
    """Divide images by their brightness into those of each use, drawn at random within each half."""
    by_brightness = sorted(paths, key=lambda path: float(read_image(path).mean()))
    generator = np.random.default_rng(seed)
    half = len(paths) // 2
    dark, bright = (
        [part[i] for i in generator.permutation(len(part))] for part in (by_brightness[:half], by_brightness[half:])
    )
    return {
        "train": dark[: half * 2 // 3],
        "calibrate": dark[half * 2 // 3 :],
        "new": bright[:NEW],
        "calibrate_new": bright[NEW : NEW + (len(bright) - NEW) // 2],
        "judge": bright[NEW + (len(bright) - NEW) // 2 :],
    }


def judge(
    detector: CheckpointDetector, good: list[Path], calibration: list[Path], data: Path, rate: float
) -> dict[str, Any]:
    """Calibrate, count the false alarms among good images, and compute the image AUROC of the test images."""
    calibrated = recontrast.calibrate(detector, calibration, false_alarm_rate=rate)
    auroc = recontrast.evaluate(calibrated, data).mean.i_auroc
    decisions = [prediction.decision for prediction in calibrated.predict(good)]
    return {
        "false_alarms": decisions.count("defect"),
        "of": len(good),
        "calibrated_on": len(calibration),
        "i_auroc": None if auroc is None else 100 * auroc,
    }


def time_cpu(function: Callable[[], Any]) -> tuple[Any, float]:
    """Call a function, and return its result and its processor time in seconds."""
    begin = time.process_time()
    result = function()
    return result, time.process_time() - begin


def measure(method: str, seed: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train, extend and train anew; what each costs, and its false alarms."""
    parts = divide(list_images(args.data / "train" / "good"), seed)
    fields = {"backbone": args.backbone, "weights": args.weights, "seed": seed, "device": "cpu", **METHODS[method]}
    steps = None
    if method == "recontrast":
        fields["steps"], steps = args.steps, args.steps // 2

    samples = {sample.path: sample for sample in recontrast.find_samples(args.data)}

    def train(paths: list[Path], name: str) -> CheckpointDetector:
        return recontrast.train([samples[path] for path in paths], folder / name, **fields)

    record: dict[str, Any] = {"images": {name: len(paths) for name, paths in parts.items()}}
    former, seconds = time_cpu(lambda: train(parts["train"], "former"))
    record["before"] = {"cpu_s": seconds} | judge(former, parts["judge"], parts["calibrate"], args.data, args.rate)
    both = parts["train"] + parts["new"]
    given = both if method in ("recontrast", "ensemble") else parts["new"]  # these need the former images as well
    extended, seconds = time_cpu(lambda: recontrast.extend(former, given, steps=steps, device="cpu"))
    calibration = parts["calibrate"] + parts["calibrate_new"]
    record["extended"] = {"cpu_s": seconds} | judge(extended, parts["judge"], calibration, args.data, args.rate)
    anew, seconds = time_cpu(lambda: train(both, "anew"))
    record["anew"] = {"cpu_s": seconds} | judge(anew, parts["judge"], calibration, args.data, args.rate)
    return record


def main() -> None:
    """Measure the methods and seeds, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="category in MVTec AD layout")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--steps", type=int, default=100, help="of ReContrast; half as many to extend")
    parser.add_argument("--rate", type=float, default=0.1, help="promised false-alarm rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = {"date": date.today().isoformat(), "machine": name_machine(), "torch": torch.__version__, "rate": args.rate}
    rows: dict[str, list[dict[str, Any]]] = {}
    for method in args.methods:
        for seed in args.seeds:
            folder = Path(tempfile.mkdtemp())
            try:
                rows.setdefault(method, []).append(measure(method, seed, args, folder))
            finally:
                shutil.rmtree(folder)
            write_record(args.out, {"about": about, "rows": rows})
    for method, records in rows.items():
        for name in ("before", "extended", "anew"):
            found = [record[name] for record in records]
            alarms, count = (sum(row[key] for row in found) for key in ("false_alarms", "of"))
            seconds, auroc = (statistics.mean(row[key] for row in found) for key in ("cpu_s", "i_auroc"))
            print(f"{method:10} {name:8} {alarms} of {count} false alarms, {seconds:6.1f} CPU s, I-AUROC {auroc:.1f}")


if __name__ == "__main__":
    main()
