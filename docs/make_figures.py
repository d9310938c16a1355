"""Draw the figures of the guide into ``docs/figures``: ``python docs/make_figures.py [--work DIR]``.

It runs the demo and trains a second small detector on its photographs (brick, grass and gravel, which scikit-image
distributes under CC0) through the command line, and draws what they give. That takes 5 to 15 minutes on two CPU cores.
Runs that are already below ``--work`` are used again. The screenshot of the report needs Chromium.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from charts import bar_chart, histograms, save_svg
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from recontrast import ReContrastDetector, load
from recontrast.data import synthetic

HERE = Path(__file__).parent
FIGURES = HERE / "figures"
SIZE = 128  # pixels, of the images and of the network's input
CALIBRATION = 40  # good images of each surface that set the threshold
RATE = 0.05  # promised share of false alarms
NETWORK = ["--backbone", "tf_efficientnet_lite0", "--weights", "package", "--batch", "8", "--steps", "100"]
DEMO_RATES = ["--set", "encoder_lr=1e-4", "--set", "ramp=1.0", "--encoder-bn", "eval", "--channels-last"]
STRIP = (("brick", "good"), ("brick", "scratch"), ("grass", "good"), ("grass", "stain"), ("gravel", "good"),
         ("gravel", "hole"))  # fmt: skip
ZOOM, GAP, LABEL, HEAD = 2, 8, 142, 38  # enlargement of an image, and pixels between, left of and above the images
OUTLINE = (0, 229, 255)


def recontrast(work: Path, *arguments: object) -> None:
    """Run one command of the package in the folder ``work``, so that no absolute path is written into a result."""
    subprocess.run([sys.executable, "-m", "recontrast", *map(str, arguments)], cwd=work, check=True)


def train_demo(work: Path) -> None:
    """The demo in ``work/demo``, calibrated on good images of its own that are drawn like its test images."""
    if not (work / "demo" / "checkpoint.pt").exists():
        recontrast(work, "demo")
    if not (work / "demo" / "report.html").exists():
        synthetic.make_demo(work / "more", train=1, test=CALIBRATION, size=SIZE, seed=1)
        good = [f"--good=more/{category}/test/good" for category in synthetic.NAMES]
        recontrast(work, "calibrate", "demo", *good, "--false-alarm-rate", RATE)
        tests = [f"demo/data/{category}/test" for category in synthetic.NAMES]
        recontrast(work, "predict", "demo", *tests, "--out", "demo/predictions", "--maps", "npy")
        recontrast(work, "report", "demo", "demo/data")


def train_tiles(work: Path) -> None:
    """A detector of tiles of gravel in ``work/tiles``, and its map of one large picture with several defects."""
    folder = work / "tiles"
    if not (folder / "predictions" / "scores.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        synthetic.make_demo(folder / "data", train=40, test=8, size=256)
        Image.fromarray(large_picture()).save(folder / "large.png")
        recontrast(
            work, "train", "tiles/data/gravel", "--out", "tiles/run", "--tile", SIZE, "--seed", 0, "--holdout", 0,
            "--no-evaluate", *NETWORK, *DEMO_RATES,
        )  # fmt: skip
        recontrast(work, "predict", "tiles/run", "tiles/large.png", "--out", "tiles/predictions")


def large_picture() -> np.ndarray:
    """The part of the gravel photograph that training does not see, enlarged, with one defect of each kind."""
    photograph = synthetic.photographs()["gravel"]
    unseen = Image.fromarray(photograph[:, int(photograph.shape[1] * synthetic.SPLIT) :]).rotate(90, expand=True)
    picture = np.asarray(unseen.resize((928, 416), Image.Resampling.BICUBIC)).copy()
    rng = np.random.default_rng(3)
    for kind, (top, left) in zip(synthetic.KINDS, ((20, 40), (200, 260), (60, 470), (190, 700)), strict=True):
        window = picture[top : top + 200, left : left + 200]
        window[:] = synthetic.draw_defect(window, kind, rng)[0]
    return picture


def draw_prediction(run: Path) -> None:
    """The drawing of one prediction, the first hole in brick: ``prediction.png``."""
    path = min((run / "data" / "brick" / "test" / "hole").iterdir())
    picture = load(run).predict(path)[0].draw()
    width = 12 * SIZE  # three pictures side by side
    size = (width, round(picture.height * width / picture.width))
    picture.resize(size, Image.Resampling.LANCZOS).save(FIGURES / "prediction.png")


def draw_sheet(run: Path) -> None:
    """The demo's contact sheet of brick: ``heatmaps_brick.jpg``."""
    Image.open(run / "heatmaps_brick.png").convert("RGB").save(
        FIGURES / "heatmaps_brick.jpg", quality=82, optimize=True
    )


def draw_strip(run: Path) -> None:
    """Image, anomaly map and decision of the first test image of a few kinds: ``strip.jpg``."""
    calibration = ReContrastDetector.from_checkpoint(run / "checkpoint.pt").calibration_
    predictions = json.loads((run / "predictions" / "scores.json").read_text())["images"]
    rows = {row["path"]: row for row in predictions}
    chosen = []
    for category, kind in STRIP:
        path = min(path for path in rows if f"/{category}/test/{kind}/" in path)
        chosen.append((f"{category}, {kind}", path, rows[path]))
    maps = [np.load(run / "predictions" / row["map"]) for _, _, row in chosen]
    side = SIZE * ZOOM
    canvas = Image.new("RGB", (LABEL + len(chosen) * (side + GAP), 2 * HEAD + 3 * (side + GAP)), "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(30)
    for row, label in enumerate(("image", "anomaly\nmap", "decision")):
        pen.multiline_text((6, HEAD + row * (side + GAP) + side // 2 - 30), label, "black", font)
    highest = max(float(anomaly.max()) for anomaly in maps)
    for column, ((title, path, row), anomaly) in enumerate(zip(chosen, maps, strict=True)):
        left = LABEL + column * (side + GAP)
        pen.text((left, 1), title, "black", font)
        image = Image.open(run.parent / path).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        large = np.asarray(Image.fromarray(anomaly).resize((side, side), Image.Resampling.BICUBIC))
        low = float(np.median(np.stack(maps)))
        decided = outlined(image, large, calibration) if row["decision"] == "defect" else image
        pictures = (image, Image.fromarray(heat((large - low) / (highest - low))), decided)
        for number, picture in enumerate(pictures):
            canvas.paste(picture, (left, HEAD + number * (side + GAP)))
        verdict = f"{row['decision']}, p = {row['p_value']:.3f}"
        pen.text(
            (left, HEAD + 3 * (side + GAP)), verdict, "#b3261e" if row["decision"] == "defect" else "#1b7f5c", font
        )
    canvas.save(FIGURES / "strip.jpg", quality=82, optimize=True)


def heat(values: np.ndarray) -> np.ndarray:
    """Black to pale yellow, as the package's overlays: (H, W) in [0, 1] -> (H, W, 3) uint8."""
    anchors = np.array([(0, 0, 4), (101, 21, 110), (212, 72, 66), (250, 193, 39), (252, 255, 164)])
    at = np.linspace(0, 1, len(anchors))
    clipped = np.clip(values, 0, 1)
    return np.stack([np.interp(clipped, at, channel) for channel in anchors.T], -1).astype(np.uint8)


def outlined(image: Image.Image, anomaly: np.ndarray, calibration) -> Image.Image:
    """The image with the border of the region above the calibrated pixel threshold."""
    if calibration.pixel_threshold is None:
        raise ValueError("calibration: wanted a pixel threshold, got none")
    flagged = Image.fromarray(((anomaly > calibration.pixel_threshold) * 255).astype(np.uint8))
    border = np.asarray(flagged.filter(ImageFilter.MaxFilter(5))) > np.asarray(flagged)
    pixels = np.asarray(image).copy()
    pixels[border] = OUTLINE
    return Image.fromarray(pixels)


def draw_histogram(run: Path) -> None:
    """Scores of calibration images, and of good and defective test images, with the threshold: ``calibration.svg``."""
    calibration = ReContrastDetector.from_checkpoint(run / "checkpoint.pt").calibration_
    good, defects = [], []
    with open(run / "predictions" / "scores.csv", newline="") as file:
        for row in csv.DictReader(file):
            (good if "/test/good/" in row["path"] else defects).append(float(row["score"]))
    rows = {
        f"{calibration.count} good images that set the threshold": ("calibration", list(calibration.scores)),
        f"{len(good)} new good images": ("good", good),
        f"{len(defects)} new images with a defect": ("defect", defects),
    }
    save_svg(FIGURES / "calibration.svg", histograms(rows, calibration.threshold, "anomaly score of the image"))


def draw_tiles(folder: Path) -> None:
    """The large picture above its overlay: ``large.jpg``."""
    (overlay,) = (folder / "predictions" / "overlays").rglob("*.png")
    pictures = [Image.open(path).convert("RGB") for path in (folder / "large.png", overlay)]
    width, height = pictures[0].size
    canvas = Image.new("RGB", (width, 2 * height + GAP), "white")
    for row, picture in enumerate(pictures):
        canvas.paste(picture, (0, row * (height + GAP)))
    canvas.save(FIGURES / "large.jpg", quality=80, optimize=True)


def draw_report(run: Path) -> None:
    """Screenshots of the report: ``report.png`` (its beginning) and ``report_gallery.jpg`` (its first images)."""
    picture = FIGURES / "report.png"
    subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=900,5200",
         f"--screenshot={picture}", (run / "report.html").resolve().as_uri()],
        check=True, capture_output=True,
    )  # fmt: skip
    page = Image.open(picture).convert("RGB")
    page.crop((0, 0, page.width, 1100)).quantize(128).save(picture, optimize=True)
    page.crop((0, 4130, page.width, 4950)).save(FIGURES / "report_gallery.jpg", quality=85, optimize=True)


def draw_speed() -> None:
    """Time of the loss beside the other ways to compute it, from the recorded benchmark: ``speed.svg``."""
    record = json.loads((HERE.parent / "benchmarks" / "results" / "cpu-zen4-2-cores.json").read_text())
    groups = {}
    for layout in ("NCHW", "channels_last"):
        rows = record["groups"][f"loss, forward and backward, batch 16, float32, {layout}, cpu"]
        groups[layout] = {
            label: rows[f"cpu-{name}-float32-{layout}"]["median_ms"]
            for label, name in (
                ("reference form", "reference"),
                ("repaired", "repaired"),
                ("repaired, torch.compile", "repaired, compiled"),
                ("recontrast", "ours"),
                ("copy of the same bytes", "copy of the same bytes"),
            )
        }
    title = "Loss, forward and backward (ms, logarithmic)"
    save_svg(FIGURES / "speed.svg", bar_chart(groups, title, highlight="recontrast"))


def main() -> None:
    """Draw all figures."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--work", type=Path, default=Path("docs/_build/figures"), help="folder for data and runs")
    work = options.parse_args().work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    draw_speed()
    train_demo(work)
    demo = work / "demo"
    draw_prediction(demo)
    draw_sheet(demo)
    draw_strip(demo)
    draw_histogram(demo)
    draw_report(demo)
    train_tiles(work)
    draw_tiles(work / "tiles")


if __name__ == "__main__":
    main()
