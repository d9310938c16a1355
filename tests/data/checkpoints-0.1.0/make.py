"""Write the checkpoints of this folder and the results to expect of them: ``python make.py OUT``.

This needs recontrast 0.1.0 (commit 45f52b4) on the path. In the initial model all but the first `KEPT` channels of each
layer are zero. Their gradients are zero too, so they stay zero, and a checkpoint of 181 MB compresses to 0.5 MB. The
training from there, the calibration and the predictions are those of the command line.
"""

import json
import lzma
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from typer.testing import CliRunner

from recontrast.app.cli import app
from recontrast.data.cache import ImageCache
from recontrast.engine import checkpoint, train
from recontrast.engine.batches import Batches, described
from recontrast.engine.holdout import held_out
from recontrast.engine.optimise import optimisers
from recontrast.engine.recipes import RECIPES
from recontrast.engine.run import Run, snapshot

sys.path.insert(0, str(Path(__file__).parents[2]))
from tiny import tiny_set

KEPT = 12
STEPS, SAVED = 200, 196  # of the finished run, and of the checkpoint to resume
DATA = {"train": 28, "good": 4, "defects": 4, "seed": 5}
RECIPE = RECIPES["mvtec"].replace(
    backbone="test_resnet", weights="random", size=64, batch=6, steps=STEPS, log_every=1, checkpoint_every=SAVED,
    seed=3, holdout=0.5, channels_last=False,
)  # fmt: skip


def prune(model):
    """Set all but the first `KEPT` channels of each layer to zero, in place."""
    joined = torch.zeros(704, dtype=torch.bool)
    for start in (0, 256, 512):  # the bottleneck joins three levels
        joined[start : start + KEPT] = True
    with torch.no_grad():
        for value in model.parameters():
            value[KEPT:] = 0
            if value.ndim == 4 and value.shape[1] == len(joined):
                value[:, ~joined] = 0
            elif value.ndim == 4 and value.shape[1] > 3:
                value[:, KEPT:] = 0
    return model


def works(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def main(out):
    torch.set_num_threads(1)
    samples = [s for s in tiny_set(out / "images", **DATA) if s.split == "train"]
    used, _ = held_out(samples, RECIPE.holdout, RECIPE.seed)
    torch.manual_seed(RECIPE.seed)
    model = prune(train.new_model(RECIPE, "nut"))
    images = ImageCache(used, RECIPE.size, None)
    batches = Batches(len(images), RECIPE.batch, drop_last=False, seed=RECIPE.seed)
    start = Run(RECIPE, "nut", torch.device("cpu"), model, optimisers(model, RECIPE, torch.device("cpu")), batches,
                described(images))  # fmt: skip
    run = out / "run"
    checkpoint.save(run / "checkpoint.pt", snapshot(start))

    original_save = checkpoint.save

    def save(path, state):
        original_save(path, state)
        if state.step == SAVED:  # the run overwrites it at its end
            shutil.copy(path, out / "resumable.pt")

    checkpoint.save = save
    works("train", out / "images", "--resume", run, "--device", "cpu", "--no-evaluate")
    checkpoint.save = original_save
    shutil.copy(run / "checkpoint.pt", out / "calibrated.pt")
    works("predict", run, out / "images/nut/test", "--out", out / "predicted", "--decide", "--maps", "npy",
          "--device", "cpu")  # fmt: skip
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    predicted = json.loads((out / "predicted/scores.json").read_text())
    saved = checkpoint.load(out / "calibrated.pt")
    images = {}
    for entry in predicted["images"]:
        anomaly_map = np.load(out / "predicted" / entry["map"])
        peak = np.unravel_index(anomaly_map.argmax(), anomaly_map.shape)
        name = Path(entry["path"]).relative_to(out / "images/nut/test").as_posix()
        images[name] = {key: entry[key] for key in ("score", "p_value", "decision")}
        images[name] |= {"map_mean": float(anomaly_map.mean(dtype="float64")), "map_peak": [int(i) for i in peak]}
    expected = {
        "version": saved.version,
        "data": DATA,
        "images_digest": saved.images["digest"],
        "steps": STEPS,
        "saved_step": SAVED,
        "losses": {str(line["step"]): line["loss"] for line in log if line["step"] > SAVED},
        "rate": saved.calibration.rate,
        "threshold": saved.calibration.threshold,
        "pixel_threshold": saved.calibration.pixel_threshold,
        "calibration_scores": list(saved.calibration.scores),
        "images": images,
    }
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    for name in ("resumable", "calibrated"):
        data = (out / f"{name}.pt").read_bytes()
        (out / f"{name}.pt.xz").write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
        print(name, len(data), (out / f"{name}.pt.xz").stat().st_size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
