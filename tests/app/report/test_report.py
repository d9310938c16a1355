import csv
import dataclasses
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from report_run import RECIPE, make_run
from tiny import tiny_set
from typer.testing import CliRunner

from recontrast import checkpoint as checkpoints
from recontrast.app.cli import app
from recontrast.app.report import findings, svg, thumbnails
from recontrast.app.report import write as write_module
from recontrast.app.report.findings import FALSE_ALARM, FOUND, MISSED, PASSED, Recall, gather
from recontrast.app.report.map_summaries import shrink_map
from recontrast.app.report.threshold_section import render_threshold
from recontrast.app.report.write import write_report
from recontrast.calibration.conformal import Calibration
from recontrast.data import datasets
from recontrast.training.json_log import JsonLog

NASTY = "<script>alert('x')&quot;\"><img src=x onerror=alert(1)>.png"  # a valid file name


class Page(HTMLParser):
    """Parsed page: elements with their attributes, and the text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.text += data

    def find_all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    folder, data = make_run(root, "nut & <b>bolt<b>")
    good = data / "nut & <b>bolt<b>" / "test/good"
    (good / "000.png").rename(good / NASTY.replace("/", "-"))
    return folder, data


@pytest.fixture(scope="module")
def text(run):
    return write_report(run[0], [run[1]], device="cpu").path.read_text()


def test_page_loads_nothing_and_escapes_names(text):
    page = Page(text)
    for tag, attributes in page.elements:
        assert not {key for key in attributes if key.startswith("on")}, (tag, attributes)
        for key in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(key, "data:").startswith(("data:", "#")), (tag, attributes)
    assert len(page.find_all("script")) == len(page.find_all("style")) == 1
    outside = re.sub(r"data:image/\w+;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", outside)
    (policy,) = (meta["content"] for meta in page.find_all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")
    assert "<script>alert" not in outside and NASTY in page.text
    assert {card["data-category"] for card in page.find_all("li")} == {"nut & <b>bolt<b>"}


def test_gallery_has_image_heat_map_and_mask(text):
    page = Page(text)
    assert len(page.find_all("li")) == 8
    assert sum(img["src"].startswith("data:image/webp") for img in page.find_all("img")) == 2 * 8  # image, heat
    assert sum(img["src"].startswith("data:image/png") for img in page.find_all("img")) == 4  # masks
    assert all("alt" in img for img in page.find_all("img"))
    labelled = {label["for"] for label in page.find_all("label")}
    assert {e["id"] for tag in ("select", "input") for e in page.find_all(tag)} == labelled


def test_page_without_calibration(run, text):
    assert "There is no calibrated threshold" in text and f"recontrast calibrate {run[0]} --good DIR" in text
    assert "p&nbsp;=" not in text
    assert "AUPRO, data set" in text and "AUPRO, per image" in text


def evaluate_run(run, calibration=None, recipe=None):
    model, own, _ = checkpoints.load_model(run[0] / "checkpoint.pt", "cpu")
    return gather(model, datasets.load(run[1]), recipe or own, calibration)


def test_warning_if_images_differ_from_calibration_images(run):
    looks = tuple((0.9 + i / 1000, 0.1, 0.1, 0.0) for i in range(40))
    calibration = Calibration(tuple(map(float, range(40))), 0.25, 30.0, None, 0.02, False, "", "", looks)
    findings = evaluate_run(run, calibration)
    assert any("do not look like the calibration images" in warning for warning in findings.warnings), findings.warnings
    assert "<strong>Warning.</strong> 4 new good images do not look like" in render_threshold(findings, "run")


def test_decisions_use_the_calibration(run):
    findings = evaluate_run(run)
    scores = sorted(shot.score for shot in findings.shots)
    cut = (scores[3] + scores[4]) / 2  # half of the images lie above it
    calibration = Calibration((cut - 0.1, cut - 0.05, cut), 0.25, cut, 0.5, 0.02, False, "<b>lot</b> 7", "")
    findings = evaluate_run(run, calibration)
    shots = findings.shots
    for shot in shots:
        above = shot.score > cut
        assert shot.outcome == (
            (FOUND if above else MISSED) if shot.sample.label else (FALSE_ALARM if above else PASSED)
        )
        assert (shot.p_value <= 0.25) is above
    wrong = [shot.outcome in (MISSED, FALSE_ALARM) for shot in shots]
    assert wrong == sorted(wrong, reverse=True) and any(wrong) and not all(wrong)
    margins = [shot.margin for shot in shots]
    first = wrong.count(True)
    assert margins[:first] == sorted(margins[:first], reverse=True) and margins[first:] == sorted(margins[first:])
    assert sum(r.called for r in findings.sections[0].recalls) == 4
    assert findings.sections[0].threshold == cut
    html = render_threshold(findings, "run")
    assert "25 %" in html and "3 good images" in html and "&lt;b&gt;lot&lt;/b&gt; 7" in html
    assert "no guarantee" in html and "1/4" in html and "no calibrated threshold" not in html


def test_data_set_with_one_class_has_no_threshold_or_curves(tmp_path):
    run, data = make_run(tmp_path, good=2, defects=0)
    text = write_report(run, [data], device="cpu").path.read_text()
    assert "no decision" in text and "all good or all defective" in text and "ROC" not in text
    assert "no image metrics" in text


def test_several_categories(tmp_path):
    run, data = make_run(tmp_path, "bolt")
    make_run(tmp_path / "other", "screw")
    report = write_report(run, [data, tmp_path / "other/data"], category="all", device="cpu", images=5)
    page = Page(report.path.read_text())
    assert (report.images, report.shown) == (16, 5) and len(page.find_all("li")) == 5
    assert "The first 5 of 16 images are shown" in page.text and "mean" in page.text
    assert len(page.find_all("figure")) == 5 + 2 * 3 + 1  # cards, two times three drawings, the loss
    report = write_report(run, [data, tmp_path / "other/data"], device="cpu")
    assert report.images == 8  # the training category only


def test_default_data_comes_from_scores_csv(run, tmp_path):
    folder, data = make_run(tmp_path)
    with pytest.raises(ValueError, match=r"scores\.csv: wanted the list of evaluated images, .* give DATA"):
        write_report(folder, [])
    with (folder / "scores.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "category", "defect", "label", "score"])
        tests = [s for s in datasets.load(data)["nut"] if s.split == "test"]
        rows.writerows([s.path, s.category, s.defect, s.label, 1.0] for s in tests)
    assert write_report(folder, [], device="cpu").images == 8
    tests[0].path.unlink()
    tests[-1].path.unlink()
    report = write_report(folder, [], device="cpu")
    text = report.path.read_text()
    assert report.images == 6 and len(report.errors) == 2 and "P-AUROC" in text
    for path in (tests[0].path, tests[-1].path):
        assert str(path) in " ".join(report.errors)
        assert f"{path.name} cannot be read" in text
    for sample in tests[1:-1]:
        sample.path.unlink()
    with pytest.raises(ValueError, match="got no such file: give DATA"):
        write_report(folder, [])


def test_damaged_pictures_and_masks_have_placeholders(tmp_path, monkeypatch):
    """Some fail when they are scored, some when they are read again for the gallery; the page is whole."""
    folder, data = make_run(tmp_path)
    tests = [s for s in datasets.load(data)["nut"] if s.split == "test"]
    tests[1].path.write_bytes(b"no image")
    tests[6].mask.write_bytes(b"no image")
    gather_first = findings.gather

    def gather_then_damage(*arguments, **options):
        result = gather_first(*arguments, **options)
        tests[2].path.unlink()
        tests[4].path.write_bytes(tests[4].path.read_bytes()[:100])
        tests[5].mask.unlink()
        return result

    monkeypatch.setattr(findings, "gather", gather_then_damage)
    result = CliRunner().invoke(app, ["report", str(folder), str(data), "--device", "cpu"])
    lines = [line for line in result.stderr.splitlines() if line.startswith("recontrast: ")]
    assert result.exit_code == 2 and len(lines) == 5 and "Traceback" not in result.output
    failing = [tests[1].path, tests[6].mask, tests[2].path, tests[4].path, tests[5].mask]
    for path in failing:
        assert sum(str(path) in line for line in lines) == 1, path
    assert "report of 6 images" in result.stdout
    text = (folder / "report.html").read_text()
    page = Page(text)
    cards = page.find_all("li")
    assert [card["data-outcome"] for card in cards].count("not read") == 2 and len(cards) == 8
    for path in (tests[1].path, tests[2].path, tests[4].path, tests[6].mask):
        assert f"{path.name} cannot be read" in page.text
    assert page.text.count("cannot be read") == 4 and text.rstrip().endswith("</html>")
    assert "2 of 8 test images are missing" in page.text
    assert len([img for img in page.find_all("img") if img.get("class") == "photo"]) == 4
    assert len([img for img in page.find_all("img") if img.get("class") == "heat"]) == 6


def test_category_without_test_images_is_in_the_report(tmp_path):
    folder, data = make_run(tmp_path)
    tiny_set(data, "bolt", train=2, good=0, defects=0)
    report = write_report(folder, [data], category="all", device="cpu")
    assert report.images == 8 and "bolt: no metrics: there are no test images" in report.path.read_text()


def test_report_shows_the_folders_of_the_training_images(tmp_path):
    folder, data = make_run(tmp_path)
    JsonLog(folder / "log.jsonl").write(step=1, loss=0.5, data="nut <b>: /data\n  train/good: 2 images")
    text = write_report(folder, [data], device="cpu").path.read_text()
    assert "<pre>nut &lt;b&gt;: /data\n  train/good: 2 images</pre>" in text


def test_pictures_fit_the_budget(run, tmp_path):
    findings = evaluate_run(run)
    large = thumbnails.encode_pictures(findings, findings.shots, RECIPE, 10**7)
    total = sum(picture.bytes for picture in large)
    small = thumbnails.encode_pictures(findings, findings.shots, RECIPE, total // 2)
    assert 0 < sum(picture.bytes for picture in small) <= total // 2
    with pytest.raises(ValueError, match="wanted pictures of 8 images in 1,000 bytes"):
        thumbnails.encode_pictures(findings, findings.shots, RECIPE, 1000)


def test_full_gallery_is_smaller_than_eight_megabytes(tmp_path):
    """300 noise images compress worse than photographs, so the highest quality level does not fit."""
    run, data = make_run(tmp_path, good=150, defects=150)
    file = run / "checkpoint.pt"
    checkpoints.save(file, dataclasses.replace(checkpoints.load(file), recipe=RECIPE.replace(size=32)))  # for speed
    random, side = np.random.default_rng(0), 176
    noise = [tmp_path / f"{i}.png" for i in range(4)]
    for path in noise:
        Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).save(path)
    Image.fromarray(np.pad(np.full((30, 40), 255, np.uint8), ((50, side - 80), (60, side - 100)))).save(
        mask := tmp_path / "mask.png"
    )
    for i, path in enumerate(sorted((data / "nut").rglob("*.png"))):
        path.unlink()
        os.link(mask if "ground_truth" in path.parts else noise[i % 4], path)
    report = write_report(run, [data], device="cpu", batch=50)
    assert (report.images, report.shown) == (300, 300) and report.bytes == report.path.stat().st_size < 8e6, (
        report.bytes
    )
    sources = [img["src"] for img in Page(report.path.read_text()).find_all("img")]
    assert len(sources) == 300 + 300 + 150  # images, heat, masks
    level = thumbnails._encode_one(thumbnails._Source([Image.open(noise[0])], np.zeros((64, 64)), None, 1.0), 320, 82)
    assert 300 * len(level.image) > write_module.BUDGET  # otherwise the budget would have no effect


def test_wilson_interval():
    assert Recall("x", 1, 16, 12).interval == pytest.approx((0.5050, 0.8982), abs=1e-4)
    assert Recall("x", 1, 10, 10).interval == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert Recall("x", 1, 10, 0).interval == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_histogram_bars_are_proportional_to_counts():
    drawing = svg.draw_histogram([1.0] * 30 + [2.0] * 15, [3.0] * 6, 2.5, "a<b")
    heights = [float(h) for h in re.findall(r'<rect class="good"[^>]*height="([\d.]+)"', drawing)]
    assert len(heights) == 2 and heights[0] == pytest.approx(2 * heights[1], abs=0.2)
    (below,) = (float(h) for h in re.findall(r'<rect class="defect"[^>]*height="([\d.]+)"', drawing))
    assert below == pytest.approx(heights[0] / 5, abs=0.2)
    assert "a&lt;b" in drawing and "threshold 2.5" in drawing
    assert "nan" not in svg.draw_histogram([1.0], [], None, "x")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{run}", "{data}", "--out", "{data}"], "--out: wanted a name for data, got a folder of that name"),
        (["{data}", "{data}"], "wanted a checkpoint file"),
        (["{run}", "{data}/nothing"], "got no such folder"),
        (["{run}", "{data}", "--category", "x"], "--category: wanted one of"),
        (["{run}", "{data}", "--out", "{run}/checkpoint.pt/x.html"], "run/checkpoint.pt (not a folder)"),
        (["{run}", "{data}", "--batch", "0"], "batch: wanted at least 1"),
    ],
)
def test_bad_input_is_reported_in_one_sentence(run, arguments, sentence):
    folder, data = run
    result = CliRunner().invoke(app, ["report", *(a.format(run=folder, data=data) for a in arguments)])
    assert result.exit_code == 2 and sentence in result.stderr, result.output
    assert not [path for path in folder.iterdir() if path.name.endswith((".tmp", ".partial"))]


def test_tiled_detector_shows_whole_images(tmp_path):
    run, data = make_run(tmp_path, good=2, defects=2)
    file = run / "checkpoint.pt"
    recipe = RECIPE.replace(tile=64)
    checkpoints.save(file, dataclasses.replace(checkpoints.load(file), recipe=recipe))
    shapes = {}
    for i, path in enumerate(sorted((data / "nut/test").rglob("*.png"))):
        shapes[path.name, path.parent.name] = width, height = 300 + 40 * i, 150
        for file_path in (path, data / "nut/ground_truth" / path.parent.name / f"{path.stem}_mask.png"):
            if file_path.is_file():
                Image.open(file_path).resize((width, height), Image.Resampling.NEAREST).save(file_path)
    findings = evaluate_run((run, data), recipe=recipe)
    ratios = [heat.shape[1] / heat.shape[0] for heat in findings.heats]
    assert ratios == pytest.approx([width / height for width, height in shapes.values()], rel=0.03)
    section = findings.sections[0]
    x, y = section.pro
    assert np.trapezoid(y, x) / x[-1] == pytest.approx(section.row.aupro, abs=2e-3)  # thinned to a few corners
    page = Page(write_report(run, [data], device="cpu").path.read_text())
    assert "tiles of 64 px" in page.text and len(page.find_all("li")) == 4
    assert "training tiles" in page.text and "training images" not in page.text
    assert {f["style"] for f in page.find_all("figure") if "style" in f} == {
        f"--ratio:{width / height:.4f}" for width, height in shapes.values()
    }


def test_small_defect_in_a_large_map_stays_visible():
    anomaly = np.zeros((3000, 4000), np.float32)
    anomaly[1500, 2000] = 1.0
    resized = shrink_map(anomaly)
    assert resized.shape == (96, 128) and resized.max() == 1  # a mean of the same area is 0.001
    assert np.unravel_index(resized.argmax(), resized.shape) == (48, 64)
    assert shrink_map(anomaly[:200, :100]).shape == (128, 64)
    assert shrink_map(np.ones((1, 500), np.uint8)).shape == (
        1,
        128,
    )


@pytest.mark.parametrize("seed", range(50))
def test_axes_have_three_to_nine_round_numbers(seed):
    generator = np.random.default_rng(seed)
    low = generator.normal(0, 10) ** 3
    high = low + abs(generator.normal(0, 10)) ** 3
    numbers = svg._round_numbers(low, high, 4)
    steps = np.diff(numbers)
    margin = 1e-6 * (high - low)
    assert 3 <= len(numbers) <= 9 and low - margin <= numbers[0] and numbers[-1] <= high + margin
    assert np.allclose(steps, steps[0]) and f"{steps[0]:e}"[0] in "125"
