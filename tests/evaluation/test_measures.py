"""Measures of benchmarks: on prepared miniatures, against their definitions on the maps of the evaluation."""

import csv
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import call, works
from downloads import OTHERS, write_image, write_mask
from metric_cases import spro_by_definition
from PIL import Image
from saved_model import RECIPE, save
from sklearn.metrics import f1_score, roc_auc_score

import recontrast
from recontrast import metrics
from recontrast.app.report.html_tables import render_metrics
from recontrast.data import datasets
from recontrast.data.prepare import prepare
from recontrast.evaluation import scorers
from recontrast.evaluation.category import Category
from recontrast.evaluation.evaluate import evaluate
from recontrast.evaluation.measures import LocoMeasures, build_measures
from recontrast.evaluation.results import Result, Row, parse_row
from recontrast.runtime.distributed import World
from recontrast.training.train import build_model

pytestmark = pytest.mark.filterwarnings("ignore::recontrast.data.listing.DataWarning")  # images for validation

SMALL = RECIPE.replace(size=32, map_size=8)
CONFIG = [
    {"defect_name": "missing_pin", "pixel_value": 255, "saturation_threshold": 4, "relative_saturation": False},
    {"defect_name": "scratch", "pixel_value": 254, "saturation_threshold": 0.6, "relative_saturation": True},
]
KINDS = ("logical_anomalies", "structural_anomalies")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return build_model(SMALL, "pushpins").eval()


@pytest.fixture
def brightness(monkeypatch):
    """Maps of the brightness of 4 x 4 pixels in place of those of the untrained model, which find no defect."""

    def infer(model, images, recipe, *, batch, **_):
        for start in range(0, len(images), batch):
            pixels = np.asarray(images[np.arange(start, min(start + batch, len(images)))], np.float32) / 255
            maps = torch.from_numpy(pixels.reshape(len(pixels), 8, 4, 8, 4, 3).mean((2, 4, 5)))
            yield maps, maps.flatten(1).amax(1)

    monkeypatch.setattr(scorers, "infer", infer)


def brighten(path, by, rows, columns):
    pixels = np.asarray(Image.open(path)).astype(int)
    pixels[rows, columns] += by
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def write_mask_of_value(path, value, rows, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.zeros((12, 16), np.uint8)
    levels[rows, columns] = value
    Image.fromarray(levels).save(path)


def prepare_loco(root, *, keep_config=True):
    """Prepare a miniature of MVTec LOCO AD: three images of each kind, one of them with two defects that overlap.

    Defects are brighter than what is around them, by less in the first images of a kind.
    """
    folder = root / "download" / "pushpins"
    for split in ("train", "validation", "test"):
        for number in range(3):
            write_image(folder / split / "good" / f"{number:03}.png", seed=len(split) + number)
    for kind_number, kind in enumerate(KINDS):
        for number in range(3):
            image = folder / "test" / kind / f"{number:03}.png"
            write_image(image, seed=30 + 10 * kind_number + number)
            brighten(image, 25 + 15 * number, slice(1, 4 + number), slice(2, 7))
            masks = folder / "ground_truth" / kind / f"{number:03}"
            write_mask_of_value(masks / "000.png", 255 - kind_number, slice(1, 4 + number), slice(2, 7))
            if number == 2:
                write_mask_of_value(masks / "001.png", 254, slice(4, 9), slice(5, 9))
    if keep_config:
        (folder / "defects_config.json").write_text(json.dumps(CONFIG))
    prepare("mvtec_loco", root / "download", root / "data")
    return root / "data" / "pushpins"


def evaluate_with_maps(model, samples, **options):
    maps = {}
    result = evaluate(
        model, samples, SMALL, on_maps=lambda chosen, found: maps.update(
            zip([sample.path for sample in chosen], found.copy(), strict=True)
        ), **options,
    )  # fmt: skip
    return result, maps


def expect_loco(samples, maps, kind):
    """Compute AU-sPRO of one kind by definition, from the original masks and enlarged maps."""
    images, defects, areas = [], [], []
    for sample in samples:
        if sample.split != "test" or (sample.label and sample.defect != kind):
            continue
        images.append(np.asarray(Image.fromarray(maps[sample.path]).resize((16, 12), Image.Resampling.BILINEAR)))
        masks = []
        if sample.label:
            folder = sample.path.parents[3].parent / "download/pushpins/ground_truth" / kind / sample.path.stem
            masks = [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]
        defects.append(np.array([mask > 0 for mask in masks]))
        sizes = [(int((mask > 0).sum()), mask.max()) for mask in masks]
        areas.append([min(4, area) if value == 255 else int(0.6 * area) for area, value in sizes])
    return spro_by_definition(images, defects, areas, 0.05)


def test_loco(tmp_path, model, brightness):
    folder = prepare_loco(tmp_path)
    samples = datasets.load(folder)["pushpins"]
    result, maps = evaluate_with_maps(model, samples)
    extra = result.rows[0].extra
    scores = {Path(image.path): image.score for image in result.scored}
    for kind in KINDS:
        name = kind.removesuffix("_anomalies")
        assert extra[f"AU-sPRO@0.05 {name}"] == pytest.approx(expect_loco(samples, maps, kind), abs=1e-4)
        assert 0.1 < extra[f"AU-sPRO@0.05 {name}"] < 0.9
        chosen = [s for s in samples if s.split == "test" and (not s.label or s.defect == kind)]
        expected = roc_auc_score([s.label for s in chosen], [scores[s.path] for s in chosen])
        assert extra[f"I-AUROC {name}"] == pytest.approx(expected)
    for heading, mean in (("AU-sPRO@0.05", "AU-sPRO@0.05"), ("I-AUROC", "I-AUROC mean")):
        assert extra[mean] == pytest.approx((extra[f"{heading} logical"] + extra[f"{heading} structural"]) / 2)
    assert result.rows[0].aupro is not None and result.rows[0].note == ""
    streamed = evaluate(model, samples, SMALL, streaming=True, batch=2)
    assert streamed.rows[0].extra == pytest.approx(extra, abs=1e-6)
    assert evaluate(model, samples, SMALL, measures="none").rows[0].extra == {}


def test_loco_of_several_processes(tmp_path, model, brightness):
    folder = prepare_loco(tmp_path)
    samples = [sample for sample in datasets.load(folder)["pushpins"] if sample.split == "test"]
    _, maps = evaluate_with_maps(model, samples)
    whole, *parts = (LocoMeasures(samples, folder, SMALL) for _ in range(4))
    for position, sample in enumerate(samples):
        for measures in (whole, parts[position % 3]):
            measures.update(position, torch.from_numpy(maps[sample.path]))
    parts[0].merge([part.state() for part in parts])
    scores, usable = torch.arange(float(len(samples))), list(range(len(samples)))
    assert parts[0].compute(scores, usable) == whole.compute(scores, usable)
    assert 0.1 < whole.compute(scores, usable)["AU-sPRO@0.05"] < 0.9


def test_loco_with_damaged_masks(tmp_path, model):
    folder = prepare_loco(tmp_path)
    samples = datasets.load(folder)["pushpins"]
    mask = folder / "defects/logical_anomalies/001/000.png"
    mask.unlink()
    write_mask_of_value(mask, 7, slice(1, 3), slice(1, 3))
    expected = (
        f"{mask}: wanted a grey mask of 12 x 16 with 0 and one value of defects_config.json, got 12 x 16 with [7]"
    )
    with pytest.raises(ValueError, match="wanted a grey mask") as error:
        evaluate(model, samples, SMALL)
    assert str(error.value) == expected
    result = evaluate(model, samples, SMALL, errors="keep")
    assert result.rows[0].skipped == 1 and expected in result.errors[0]
    (folder / "defects_config.json").unlink()  # a link to the download
    (folder / "defects_config.json").write_text("[3]")
    with pytest.raises(ValueError, match=r"wanted a list of pixel_value, .*, got a value of another type"):
        evaluate(model, samples, SMALL)
    (folder / "defects_config.json").write_text(json.dumps([{"pixel_value": 255, "relative_saturation": True}]))
    with pytest.raises(ValueError, match=r", got none with the name saturation_threshold$"):
        evaluate(model, samples, SMALL)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_image_with_a_damaged_mask_counts_in_no_measure(tmp_path, model, brightness, streaming):
    """The joined mask of an image is damaged; the single ones, which AU-sPRO is computed from, are not."""
    folder = prepare_loco(tmp_path)
    samples = [sample for sample in datasets.load(folder)["pushpins"] if sample.split == "test"]
    skipped = next(sample for sample in samples if sample.defect == KINDS[0])
    rest = [sample for sample in samples if sample is not skipped]
    expected, whole = (evaluate(model, some, SMALL, streaming=streaming, batch=2).rows[0] for some in (rest, samples))
    assert abs(whole.extra["AU-sPRO@0.05 logical"] - expected.extra["AU-sPRO@0.05 logical"]) > 0.01
    skipped.mask.unlink()
    skipped.mask.write_bytes(b"not an image")
    shown = []
    result = evaluate(
        model, samples, SMALL, errors="keep", streaming=streaming, batch=2, on_maps=lambda some, _: shown.extend(some)
    )
    assert result.rows[0].extra == pytest.approx(expected.extra) and result.rows[0].skipped == 1
    assert len(result.errors) == 1 and str(skipped.mask) in result.errors[0]
    assert shown == samples  # it has a map


def test_other_processes_leave_out_images_with_a_damaged_mask(tmp_path, model):
    """A process that is not the first one holds no masks, and reads those of its own images."""
    folder = prepare_loco(tmp_path)
    samples = [sample for sample in datasets.load(folder)["pushpins"] if sample.split == "test"]
    skipped = len(samples) - 1
    samples[skipped].mask.unlink()
    samples[skipped].mask.write_bytes(b"not an image")
    measures = LocoMeasures(samples, folder, SMALL)
    added = []
    measures.update = lambda position, anomaly: added.append(position)
    with ThreadPoolExecutor(1) as readers:
        category = Category("pushpins", samples, SMALL, World(1, 2), readers, None, 2**20, True, measures)
        own = range(len(samples))[category.start :]
        category.add(0, torch.zeros(len(own), 8, 8), torch.zeros(len(own)))
    assert list(category.errors) == [skipped] and added == list(own[:-1])


@pytest.mark.parametrize("streaming", [False, True])
def test_curves_are_released_with_their_category(tmp_path, model, monkeypatch, streaming):
    folder = prepare_loco(tmp_path)
    built = []

    def build(*arguments):
        built.append(build_measures(*arguments))
        return built[-1]

    monkeypatch.setattr("recontrast.evaluation.evaluate.build_measures", build)
    row = evaluate(model, datasets.load(folder)["pushpins"], SMALL, streaming=streaming).rows[0]
    assert "AU-sPRO@0.05" in row.extra and [measures.overlaps for measures in built] == [{}]


def test_loco_without_its_masks_or_with_parts_of_images(tmp_path, model):
    folder = prepare_loco(tmp_path, keep_config=False)
    samples = datasets.load(folder)["pushpins"]
    row = evaluate(model, samples, SMALL).rows[0]
    assert "no AU-sPRO: " in row.note and "prepare the data set again" in row.note
    assert set(row.extra) == {"I-AUROC mean", "I-AUROC logical", "I-AUROC structural"}
    with pytest.raises(ValueError, match="measures: wanted those of mvtec_loco, got no AU-sPRO: "):
        evaluate(model, samples, SMALL, measures="mvtec_loco")
    (folder / "defects_config.json").write_text(json.dumps(CONFIG))
    (folder / "defects").mkdir(exist_ok=True)
    tests = [sample for sample in samples if sample.split == "test"]
    with pytest.raises(
        ValueError, match=r"wanted those of mvtec_loco, got no AU-sPRO: maps show a part of the images$"
    ):
        build_measures("mvtec_loco", tests, SMALL.replace(crop=16))
    assert build_measures("auto", tests, SMALL.replace(crop=16)).notes == ["no AU-sPRO: maps show a part of the images"]


def prepare_ad2(root):
    folder = root / "download" / "can"
    for split in ("train", "validation"):
        for number in range(3):
            write_image(folder / split / "good" / f"{number:03}_regular.png", seed=len(split) + number)
    for number in range(3):
        write_image(folder / "test_public/good" / f"{number:03}_regular.png", seed=50 + number)
        write_image(folder / "test_public/bad" / f"{number:03}_regular.png", seed=60 + number)
        write_mask(folder / "test_public/ground_truth/bad" / f"{number:03}_regular_mask.png", 255)
    prepare("mvtec_ad_2", root / "download", root / "data")
    return root / "data" / "can"


def test_ad2(tmp_path, model):
    folder = prepare_ad2(tmp_path)
    samples = datasets.load(folder)["can"]
    result, maps = evaluate_with_maps(model, samples)
    row = result.rows[0]
    tests = [sample for sample in samples if sample.split == "test"]
    good = [replace(tests[0], path=path) for path in sorted((folder / "validation/good").iterdir())]
    _, found = evaluate_with_maps(model, good, measures="none")
    values = np.stack(list(found.values())).astype(np.float64)
    assert row.seg_threshold == pytest.approx(values.mean() + 3 * values.std(), rel=1e-6)
    masks = []
    for sample in tests:
        mask = np.zeros((32, 32), bool)
        if sample.label:  # any pixel of the mask, as the usual pixel metrics read it
            mask = recontrast.evaluation.ground_truth.read_ground_truth(sample, SMALL.replace(map_size=None))
        masks.append(mask[::4, ::4])
    stacked, masks = np.stack([maps[sample.path] for sample in tests]), np.stack(masks)
    assert row.extra["AUPRO@0.05"] == pytest.approx(metrics.aupro(stacked, masks, 0.05))
    for threshold in (None, float(np.median(stacked))):
        used = row.seg_threshold if threshold is None else threshold
        expected = f1_score(masks.ravel(), stacked.ravel() >= used, zero_division=0)
        for streaming in (False, True):
            other = evaluate(model, samples, SMALL, threshold=threshold, streaming=streaming, batch=4).rows[0]
            assert other.extra["SegF1"] == pytest.approx(expected) and other.seg_threshold == pytest.approx(used)
            bound = other.bounds.get("AUPRO@0.05", 0.0)
            assert other.extra["AUPRO@0.05"] == pytest.approx(row.extra["AUPRO@0.05"], abs=bound + 1e-9)
    shutil.rmtree(folder / "validation")
    row = evaluate(model, samples, SMALL).rows[0]
    assert set(row.extra) == {"AUPRO@0.05"} and "no SegF1: there is no threshold" in row.note
    with pytest.raises(ValueError, match="threshold: wanted a finite number, got nan"):
        evaluate(model, samples, SMALL, threshold=float("nan"))


@pytest.mark.parametrize("tile", [None, 32])
def test_damaged_validation_images_are_left_out_and_named(tmp_path, model, tile):
    folder = prepare_ad2(tmp_path)
    samples, recipe = datasets.load(folder)["can"], SMALL.replace(tile=tile, map_size=None if tile else 8)
    good = sorted((folder / "validation/good").iterdir())
    away = tmp_path / "away.png"
    good[1].rename(away)
    expected = evaluate(model, samples, recipe, batch=2).rows[0]
    good[1].write_bytes(b"not an image")
    with pytest.raises(ValueError, match=good[1].name):
        evaluate(model, samples, recipe)
    row = evaluate(model, samples, recipe, errors="keep", batch=2).rows[0]
    assert row.seg_threshold == pytest.approx(expected.seg_threshold) and row.extra["SegF1"] == expected.extra["SegF1"]
    assert f"threshold without 1 of 3 validation images: {good[1]}: " in row.note and row.skipped == 0
    for path in good:
        path.unlink()
        path.write_bytes(b"not an image")
    row = evaluate(model, samples, recipe, errors="keep").rows[0]
    assert set(row.extra) == {"AUPRO@0.05"} and f"no image in {good[0].parent} could be scored: {good[0]}" in row.note


def test_no_threshold_within_a_region_of_interest(tmp_path, model):
    folder = prepare_ad2(tmp_path)
    tests = [sample for sample in datasets.load(folder)["can"] if sample.split == "test"]
    roi = np.zeros((12, 16), bool)
    roi[2:10, 2:14] = True
    recipe, _ = recontrast.inference.rois.apply_roi(SMALL, roi)
    row = evaluate(model, tests, recipe).rows[0]
    assert "SegF1" not in row.extra and "none is chosen within a region of interest" in row.note
    assert "validation/good" not in row.note


def test_real_iad(tmp_path, model):
    OTHERS["real_iad"](tmp_path / "download", ["usb"])
    prepare("real_iad", tmp_path / "download", tmp_path / "data")
    samples = datasets.load(tmp_path / "data/usb")["usb"]
    result = evaluate(model, samples, SMALL)
    by_sample, by_view = {}, {}
    for image in result.scored:
        name = Path(image.path).name
        sample, view = name.split("_C")[0], name.split("_C")[1][0]
        best, label = by_sample.get(sample, (-1.0, 0))
        by_sample[sample] = (max(best, image.score), max(label, image.label))
        by_view.setdefault(view, []).append((image.score, image.label))
    assert len(by_sample) == 2
    scores, labels = zip(*by_sample.values(), strict=True)
    extra = result.rows[0].extra
    assert extra["S-AUROC"] == roc_auc_score(labels, scores) and {"S-AP", "S-F1"} < set(extra)
    for view in ("1", "3"):  # the views that show the defect
        scores, labels = zip(*by_view[view], strict=True)
        assert extra[f"I-AUROC C{view}"] == roc_auc_score(labels, scores)
    assert "I-AUROC C2" not in extra
    renamed = [replace(sample, path=sample.path.with_name(f"{number}.jpg")) for number, sample in enumerate(samples)]
    with pytest.raises(ValueError, match="measures: wanted those of real_iad, got no S-AUROC: "):
        evaluate(model, renamed, SMALL, measures="real_iad")


def test_tables_and_command(tmp_path):
    prepare_loco(tmp_path / "a")
    prepare_ad2(tmp_path / "b")
    checkpoint = save(tmp_path / "checkpoint.pt", SMALL)
    data = [tmp_path / "a/data", tmp_path / "b/data"]
    printed = works("evaluate", checkpoint, *data, "--out", tmp_path / "out", "--device", "cpu")
    headings = ["I-AUROC mean", "AU-sPRO@0.05", "AU-sPRO@0.05 logical", "AUPRO@0.05", "SegF1"]
    with open(tmp_path / "out/results.csv") as file:
        rows = list(csv.DictReader(file))
    stored = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["category"] for row in rows] == ["pushpins", "can", "mean"]
    text = (tmp_path / "out/results.md").read_text()
    for heading in headings:
        assert heading in printed and heading in rows[0] and f"| {heading} |" in text
    assert rows[0]["SegF1"] == "" and float(rows[1]["SegF1"]) == stored["rows"][1]["extra"]["SegF1"]
    assert "SegF1 at the threshold: can " in text and "not over all categories: " in rows[2]["note"]
    assert [parse_row(row).extra for row in stored["rows"]] == [row["extra"] for row in stored["rows"]]
    failed = call("evaluate", checkpoint, data[1], "--measures", "x")
    assert failed.exit_code == 2 and "measures: wanted one of auto, none, mvtec_loco" in failed.stderr
    assert call("evaluate", checkpoint, data[1], "--threshold", "much").exit_code == 2
    result = recontrast.evaluate(checkpoint, data[1], measures="none", threshold=0.1, device="cpu")
    assert set(result.mean.extra) == {"SegF1"} and result.rows[0].seg_threshold == 0.1


def test_report_has_the_measures():
    rows = [Row("can", 4, 2, i_auroc=0.5, extra={"SegF1": 0.25}), Row("<b>", 4, 2, i_auroc=0.75)]
    for chosen in (rows[:1], rows):
        result = Result(chosen, "mvtec", (8, 8), "max", None, "sum", "any")
        html = render_metrics(SimpleNamespace(result=result))
        assert ">SegF1</th>" in html and ">25.00</td>" in html and "<b>" not in html
        assert html.count("measure of the benchmark that the data set belongs to") == 1
