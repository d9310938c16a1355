"""Reports of parts with several views: which views they show, and how."""

import re

import numpy as np
import pytest
from browser import browser, open_page
from command_line import works
from part_views import PATCHCORE
from PIL import Image

import recontrast
from recontrast.app.report.shown_views import select_views
from recontrast.data.datasets import Sample

PATTERN = r"_v(\d)\."


def write_parts(root, views, shows, pages=False):
    """Six good parts for training, and two for the test, of which one has a defect in the view ``shows``."""
    rng, size = np.random.default_rng(1), (64, 96)
    for folder, count in (("train/good", 6), ("test/good", 1), ("test/square", 1)):
        (root / folder).mkdir(parents=True)
        for part in range(count):
            base = 110 + 40 * np.sin(np.arange(64) / 3)[:, None] + rng.normal(0, 8, size)
            pictures = []
            for view in range(views):
                pixels = (1 - 0.1 * view) * base
                if folder == "test/square" and view == shows:
                    pixels[20:36, 50:66] += 120
                pictures.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
            if pages:
                pictures[0].save(root / folder / f"{part}.tif", save_all=True, append_images=pictures[1:])
            for view, picture in () if pages else enumerate(pictures):
                picture.save(root / folder / f"{part}_v{view}.png")
    return root


def report(root, views, shows, *options, pages=False):
    """Train on parts, write the report, and return its HTML by path of the page, and the cards."""
    write_parts(root / "nut", views, shows, pages)
    source = "pages" if pages else PATTERN
    words = [*PATCHCORE, "--views-from", source, "--holdout", 0, "--no-evaluate", *options]
    works("train", root / "nut", "--out", root / "run", *words)
    works("report", root / "run", root / "nut", "--out", root / "report.html", "--device", "cpu")
    html = (root / "report.html").read_text()
    return html, re.findall(r'<li class="card.*?</li>', html)


def list_names(card):
    return re.findall(r'<span class="view">(.*?)</span>', card)


def test_all_of_a_few_views_are_shown_in_order(tmp_path):
    html, cards = report(tmp_path, 3, 1)
    assert len(cards) == 2 and all(list_names(card) == ["0", "1", "2"] for card in cards)
    assert "The pictures show all views, and the heat map lies over the first" in html
    assert "The other views are below." in html and 'alt="View 2 of 0_v0.png"' in html
    pictures = [re.findall(r'<img (?:class="photo" )?src="(data:[^"]*)" alt="View', card) for card in cards]
    assert all(len(set(own)) == 3 for own in pictures)


@pytest.mark.parametrize(("pages", "options"), [(False, ()), (True, ()), (True, ("--tile", 64))])
def test_of_many_views_those_with_the_highest_maps_are_shown(pages, options, tmp_path):
    html, cards = report(tmp_path, 6, 4, *options, pages=pages)
    (card,) = [card for card in cards if 'data-defect="square"' in card]
    assert len(list_names(card)) == 4 and list_names(card)[0] == ("5" if pages else "4")
    assert "the 4 views whose own maps have the highest values, the highest first" in html
    detector = recontrast.load(tmp_path / "run", "cpu")
    missing = Sample(tmp_path / "nut/test/good" / ("9.tif" if pages else "9_v0.png"), None, 0, "nut", "test", "good")
    assert select_views(detector.model, missing, detector.recipe) == [0, 1, 2, 3]
    assert select_views(detector.model, missing, detector.recipe.of_single_images) == [0]


def test_views_lie_side_by_side_below_the_first(tmp_path):
    report(tmp_path, 4, 2)
    with browser() as window:
        open_page(window, tmp_path / "report.html")
        boxes = window.execute_script(
            "return [...document.querySelector('#cards > li').querySelectorAll('.pic')].map(e => {"
            "const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })"
        )
        broken = window.execute_script("return [...document.images].filter(i => !i.naturalWidth).length")
    assert len(boxes) == 6 and broken == 0
    first, below = np.array(boxes[:3]), np.array(boxes[3:])
    np.testing.assert_allclose(below[:, [0, 2, 3]], first[:, [0, 2, 3]], atol=0.5)  # the same columns and sizes
    assert (below[:, 1] >= (first[:, 1] + first[:, 3])).all()
