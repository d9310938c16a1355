import csv
import dataclasses
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from report_run import RECIPE, trained
from typer.testing import CliRunner

from recontrast import checkpoint as checkpoints
from recontrast.app.cli import app
from recontrast.app.report import svg, thumbnails
from recontrast.app.report import write as write_module
from recontrast.app.report.findings import FALSE_ALARM, FOUND, MISSED, PASSED, Recall, gather
from recontrast.app.report.map_summaries import small
from recontrast.app.report.threshold_section import decision
from recontrast.app.report.write import write_report
from recontrast.calibration.conformal import Calibration
from recontrast.data import datasets

NASTY = "<script>alert('x')&quot;\"><img src=x onerror=alert(1)>.png"  # a file may be called that


class Page(HTMLParser):
    """Elements with their attributes, and the text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.text += data

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    folder, data = trained(root, "nut & <b>bolt<b>")
    good = data / "nut & <b>bolt<b>" / "test/good"
    (good / "000.png").rename(good / NASTY.replace("/", "-"))
    return folder, data


@pytest.fixture(scope="module")
def text(run):
    return write_report(run[0], [run[1]], device="cpu").path.read_text()


def test_nothing_is_loaded_and_no_name_is_code(text):
    page = Page(text)
    for tag, attributes in page.elements:
        assert not {key for key in attributes if key.startswith("on")}, (tag, attributes)
        for key in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(key, "data:").startswith(("data:", "#")), (tag, attributes)
    assert len(page.of("script")) == len(page.of("style")) == 1
    outside = re.sub(r"data:image/\w+;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", outside)
    assert "default-src 'none'" in page.of("meta")[3]["content"]
    assert "<script>alert" not in outside and NASTY in page.text
    assert {card["data-category"] for card in page.of("li")} == {"nut & <b>bolt<b>"}


def test_every_image_is_there_with_heat_and_mask(text):
    page = Page(text)
    assert len(page.of("li")) == 8
    assert sum(img["src"].startswith("data:image/webp") for img in page.of("img")) == 2 * 8  # image, heat
    assert sum(img["src"].startswith("data:image/png") for img in page.of("img")) == 4  # masks
    assert all("alt" in img for img in page.of("img"))
    labelled = {label["for"] for label in page.of("label")}
    assert {e["id"] for tag in ("select", "input") for e in page.of(tag)} == labelled


def test_without_calibration_it_says_so_and_with_one_what_is_promised(run, text):
    assert "There is no calibrated threshold" in text and f"recontrast calibrate {run[0]} --good DIR" in text
    assert "p = " not in text
    assert "AUPRO, data set" in text and "AUPRO, per image" in text


def found(run, calibration=None, recipe=None):
    model, own, _ = checkpoints.load_model(run[0] / "checkpoint.pt", "cpu")
    return gather(model, datasets.load(run[1]), recipe or own, calibration)


def test_images_unlike_those_of_the_calibration_are_warned_of(run):
    looks = tuple((0.9 + i / 1000, 0.1, 0.1, 0.0) for i in range(40))
    known = Calibration(tuple(map(float, range(40))), 0.25, 30.0, None, 0.02, False, "", "", looks)
    seen = found(run, known)
    assert any("do not look like the calibration images" in said for said in seen.warnings), seen.warnings
    assert "<strong>Warning.</strong> 4 new good images do not look like" in decision(seen, "run")


def test_decisions_are_those_of_the_calibration(run):
    seen = found(run)
    scores = sorted(shot.score for shot in seen.shots)
    cut = (scores[3] + scores[4]) / 2  # half of the images lie above it
    known = Calibration((cut - 0.1, cut - 0.05, cut), 0.25, cut, 0.5, 0.02, False, "<b>lot</b> 7", "")
    seen = found(run, known)
    shots = seen.shots
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
    assert sum(r.called for r in seen.sections[0].recalls) == 4
    assert seen.sections[0].threshold == cut
    from recontrast.app.report.threshold_section import decision

    said = decision(seen, "run")
    assert "25 %" in said and "3 good images" in said and "&lt;b&gt;lot&lt;/b&gt; 7" in said
    assert "no guarantee" in said and "1/4" in said and "no calibrated threshold" not in said


def test_a_data_set_of_one_kind_has_no_threshold_and_no_curves(tmp_path):
    run, data = trained(tmp_path, good=2, defects=0)
    text = write_report(run, [data], device="cpu").path.read_text()
    assert "no decision" in text and "not of both kinds" in text and "ROC" not in text
    assert "no image metrics" in text


def test_several_categories_have_a_mean_and_a_filter(tmp_path):
    run, data = trained(tmp_path, "bolt")
    trained(tmp_path / "other", "screw")
    made = write_report(run, [data, tmp_path / "other/data"], category="all", device="cpu", images=5)
    page = Page(made.path.read_text())
    assert (made.images, made.shown) == (16, 5) and len(page.of("li")) == 5
    assert "these 5 are shown" in page.text and "mean" in page.text
    assert len(page.of("figure")) == 5 + 2 * 3 + 1  # cards, two times three drawings, the loss
    made = write_report(run, [data, tmp_path / "other/data"], device="cpu")
    assert made.images == 8  # what it was trained on


def test_without_data_the_evaluated_images_are_taken(run, tmp_path):
    folder, data = trained(tmp_path)
    with pytest.raises(ValueError, match=r"scores\.csv: wanted the images .* name DATA"):
        write_report(folder, [])
    with (folder / "scores.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "category", "defect", "label", "score"])
        tests = [s for s in datasets.load(data)["nut"] if s.split == "test"]
        rows.writerows([s.path, s.category, s.defect, s.label, 1.0] for s in tests)
    assert write_report(folder, [], device="cpu").images == 8
    tests[0].path.unlink()
    with pytest.raises(ValueError, match="it is gone: name DATA"):
        write_report(folder, [])


def test_pictures_keep_to_a_budget(run, tmp_path):
    seen = found(run)
    large = thumbnails.encode(seen, seen.shots, RECIPE, 10**7)
    whole = sum(one.bytes for one in large)
    small = thumbnails.encode(seen, seen.shots, RECIPE, whole // 2)
    assert 0 < sum(one.bytes for one in small) <= whole // 2
    with pytest.raises(ValueError, match="wanted pictures of 8 images in 1,000 bytes"):
        thumbnails.encode(seen, seen.shots, RECIPE, 1000)


def test_a_whole_gallery_stays_below_eight_megabytes(tmp_path):
    """300 pictures of noise, which compresses worse than any photograph: the first level of quality is too good."""
    run, data = trained(tmp_path, good=150, defects=150)
    file = run / "checkpoint.pt"
    checkpoints.save(file, dataclasses.replace(checkpoints.load(file), recipe=RECIPE.replace(size=32)))  # for speed
    random, side = np.random.default_rng(0), 176
    noise = [tmp_path / f"{i}.png" for i in range(4)]
    for path in noise:
        Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).save(path)
    Image.fromarray(np.pad(np.full((30, 40), 255, np.uint8), ((50, side - 80), (60, side - 100)))).save(
        mask := tmp_path / "mask.png"
    )
    for place, path in enumerate(sorted((data / "nut").rglob("*.png"))):
        path.unlink()
        os.link(mask if "ground_truth" in path.parts else noise[place % 4], path)
    made = write_report(run, [data], device="cpu", batch=50)
    assert (made.images, made.shown) == (300, 300) and made.bytes == made.path.stat().st_size < 8e6, made.bytes
    sources = [img["src"] for img in Page(made.path.read_text()).of("img")]
    assert len(sources) == 300 + 300 + 150  # images, heat, masks
    level = thumbnails._encode(thumbnails._Source(Image.open(noise[0]), np.zeros((64, 64)), None, 1.0), 320, 82)
    assert 300 * len(level.image) > write_module.BUDGET  # or there was nothing to keep to


def test_wilsons_interval():
    assert Recall("x", 1, 16, 12).interval == pytest.approx((0.5050, 0.8982), abs=1e-4)
    assert Recall("x", 1, 10, 10).interval == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert Recall("x", 1, 10, 0).interval == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_bars_of_the_histogram_count_the_images():
    drawing = svg.histogram([1.0] * 30 + [2.0] * 15, [3.0] * 6, 2.5, "a<b")
    heights = [float(h) for h in re.findall(r'<rect class="good"[^>]*height="([\d.]+)"', drawing)]
    assert len(heights) == 2 and heights[0] == pytest.approx(2 * heights[1], abs=0.2)
    (below,) = (float(h) for h in re.findall(r'<rect class="defect"[^>]*height="([\d.]+)"', svg))
    assert below == pytest.approx(heights[0] / 5, abs=0.2)
    assert "a&lt;b" in svg and "threshold 2.5" in svg
    assert "nan" not in svg.histogram([1.0], [], None, "x")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{run}", "{data}", "--out", "{data}"], "wanted a file to write the report to, got a folder"),
        (["{data}", "{data}"], "wanted a checkpoint file"),
        (["{run}", "{data}/nothing"], "got no such folder"),
        (["{run}", "{data}", "--category", "x"], "--category: wanted one of"),
        (["{run}", "{data}", "--out", "{run}/checkpoint.pt/x.html"], "run/checkpoint.pt (not a folder)"),
        (["{run}", "{data}", "--batch", "0"], "batch: wanted at least 1"),
    ],
)
def test_bad_input_is_one_sentence(run, arguments, sentence):
    folder, data = run
    done = CliRunner().invoke(app, ["report", *(a.format(run=folder, data=data) for a in arguments)])
    assert done.exit_code == 2 and sentence in done.stderr, done.output
    assert not [path for path in folder.iterdir() if path.name.endswith((".tmp", ".partial"))]


def test_a_detector_of_tiles_shows_each_image_whole(tmp_path):
    run, data = trained(tmp_path, good=2, defects=2)
    file = run / "checkpoint.pt"
    recipe = RECIPE.replace(tile=64)
    checkpoints.save(file, dataclasses.replace(checkpoints.load(file), recipe=recipe))
    shapes = {}
    for i, path in enumerate(sorted((data / "nut/test").rglob("*.png"))):
        shapes[path.name, path.parent.name] = width, height = 300 + 40 * i, 150
        for one in (path, data / "nut/ground_truth" / path.parent.name / f"{path.stem}_mask.png"):
            if one.is_file():
                Image.open(one).resize((width, height), Image.Resampling.NEAREST).save(one)
    seen = found((run, data), recipe=recipe)
    ratios = [heat.shape[1] / heat.shape[0] for heat in seen.heats]
    assert ratios == pytest.approx([width / height for width, height in shapes.values()], rel=0.03)
    section = seen.sections[0]
    x, y = section.pro
    assert np.trapezoid(y, x) / x[-1] == pytest.approx(section.row.aupro, abs=2e-3)  # thinned to a few corners
    page = Page(write_report(run, [data], device="cpu").path.read_text())
    assert "tiles of 64 px" in page.text and len(page.of("li")) == 4
    assert {f["style"] for f in page.of("figure") if "style" in f} == {
        f"--ratio:{width / height:.4f}" for width, height in shapes.values()
    }


def test_a_small_defect_of_a_large_map_stays_hot():
    anomaly = np.zeros((3000, 4000), np.float32)
    anomaly[1500, 2000] = 1.0
    found = small(anomaly)
    assert found.shape == (96, 128) and found.max() == 1  # a mean of the same area is 0.001
    assert np.unravel_index(found.argmax(), found.shape) == (48, 64)
    assert small(anomaly[:200, :100]).shape == (128, 64) and small(np.ones((1, 500), np.uint8)).shape == (1, 128)
