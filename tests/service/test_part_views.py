"""Parts with several views: a form with one file for each view, or a file of pages, is answered as `predict` does."""

import io
import json

import numpy as np
import pytest
from browser import browser
from client import form, serving
from part_views import PATTERN, draw_part
from PIL import Image
from saved_model import RECIPE, save
from test_page import open_service, text, upload

import recontrast
from recontrast.data.roi import encode_mask

BOUNDARY = "----boundary"


def join_forms(*files):
    """Return a form with several files, given as name of the field, name of the file, and content."""
    bodies = [form(content, field, name)[0].removesuffix(b"--\r\n") for field, name, content in files]
    body = bodies[0] + b"".join(one.removeprefix(f"--{BOUNDARY}".encode()) for one in bodies[1:]) + b"--\r\n"
    return body, f"multipart/form-data; boundary={BOUNDARY}"


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    """Checkpoints of untrained detectors: of files with the largest value, of pages with the mean, and of tiles."""
    folder = tmp_path_factory.mktemp("parts")
    mask = np.zeros((64, 64), bool)
    mask[:, :40] = True
    files = RECIPE.replace(views_from=PATTERN, view_names=("left", "right"))
    pages = RECIPE.replace(views_from="pages", view_names=("1", "2"), view_map="mean", roi=encode_mask(mask))
    return {name: save(folder / f"{name}.pt", recipe) for name, recipe in
            {"files": files, "pages": pages, "tiles": files.replace(tile=32)}.items()}  # fmt: skip


@pytest.fixture(scope="module")
def client(detectors):
    with serving(detectors) as client:
        yield client


@pytest.fixture
def part(tmp_path):
    """Paths of the two views of a part, and of the same as pages."""
    views, _ = draw_part(np.random.default_rng(3), 1)
    paths = [tmp_path / f"7_{name}.png" for name in ("left", "right")]
    for path, view in zip(paths, views, strict=True):
        Image.fromarray(view).save(path)
    first, second = map(Image.fromarray, views)
    first.save(tmp_path / "7.tif", save_all=True, append_images=[second])
    return [*paths, tmp_path / "7.tif"]


def test_scores_are_those_of_predict(client, detectors, part):
    left, right, pages = part
    contents = [path.read_bytes() for path in part]
    by_field = join_forms(("right", "b.png", contents[1]), ("left", "a.png", contents[0]))
    by_file = join_forms(("view", left.name, contents[0]), ("view", right.name, contents[1]))
    for name in ("files", "tiles"):
        wanted = recontrast.load(detectors[name], "cpu").predict([left, right])
        assert len(wanted) == 1
        for body, kind in (by_field, by_file):
            answer = client.predict(body, f"/predict/{name}", Content_Type=kind)
            assert answer["score"] == pytest.approx(wanted[0].score, rel=1e-6)
            assert (answer["height"], answer["width"]) == (64, 64)
    (wanted,) = recontrast.load(detectors["pages"], "cpu").predict(pages)
    assert client.predict(contents[2], "/predict/pages", Content_Type="image/tiff")["score"] == pytest.approx(
        wanted.score, rel=1e-6
    )


def test_map_and_overlay_are_those_of_the_part(client, detectors, part):
    body, kind = join_forms(("left", "a", part[0].read_bytes()), ("right", "b", part[1].read_bytes()))
    status, headers, picture = client.ask("POST", "/predict/files?image=map", body, Content_Type=kind)
    values = np.asarray(Image.open(io.BytesIO(picture))) * float(headers["X-Recontrast-Map-Scale"])
    (wanted,) = recontrast.load(detectors["files"], "cpu").predict(part[:2])
    assert status == 200
    np.testing.assert_allclose(values, wanted.anomaly_map, atol=float(headers["X-Recontrast-Map-Scale"]))
    assert client.ask("POST", "/predict/pages?image=overlay", part[2].read_bytes(), Content_Type="image/tiff")[0] == 200


def test_model_names_the_views(client):
    views = {one["name"]: one["views"] for one in json.loads(client.get("/model"))["detectors"]}
    assert views["files"] == {"from": PATTERN, "names": ["left", "right"], "map": "max"}
    assert views["pages"] == {"from": "pages", "names": ["1", "2"], "map": "mean"}


def test_what_is_no_part_is_refused(client, part):
    left, right, pages = (path.read_bytes() for path in part)

    def refuse(status, message, name, body, kind):
        got, _, answer = client.ask("POST", f"/predict/{name}", body, Content_Type=kind)
        assert (got, message in json.loads(answer)["error"]) == (status, True), answer

    refuse(415, "wanted a form (multipart/form-data) with one file for each of the views left, right, got image/png",
           "files", left, "image/png")  # fmt: skip
    refuse(400, "got no right", "files", *join_forms(("left", "a.png", left)))
    refuse(400, "got left twice", "files", *join_forms(("left", "a", left), ("x", "b_left.png", right)))
    refuse(400, "got a file of no view ('c.png' in the field 'x')", "files", *join_forms(("x", "c.png", left)))
    refuse(
        400, "right: wanted the bytes of an image file", "files", *join_forms(("left", "a", left), ("right", "b", b""))
    )
    small = io.BytesIO()
    Image.new("L", (64, 60)).save(small, "PNG")
    refuse(422, "right: wanted a view of the size of left, 64 x 64, got 60 x 64", "files",
           *join_forms(("left", "a", left), ("right", "b", small.getvalue())))  # fmt: skip
    refuse(422, "image: wanted 2 pages as in training, got 1", "pages", left, "image/png")
    refuse(422, "left: wanted one image, got a file with several", "files",
           *join_forms(("left", "a", pages), ("right", "b", right)))  # fmt: skip


def test_pixels_of_all_views_count(detectors, part):
    from recontrast.service.limits import Limits

    with serving({"files": detectors["files"]}, limits=Limits(pixels=64 * 64 * 2 - 1)) as client:
        body, kind = join_forms(("left", "a", part[0].read_bytes()), ("right", "b", part[1].read_bytes()))
        assert client.ask("POST", "/predict", body, Content_Type=kind)[0] == 413


def test_page_sends_the_views_of_a_part_together(detectors, part):
    with serving({"files": detectors["files"]}) as client, browser() as driver:
        open_service(driver, client)
        upload(driver, "\n".join(map(str, (part[1], part[0]))))
        body, kind = join_forms(("left", "a", part[0].read_bytes()), ("right", "b", part[1].read_bytes()))
        score = client.predict(body, Content_Type=kind)["score"]
        assert float(text(driver, "score")) == pytest.approx(score, rel=1e-3)
        assert text(driver, "file-name").startswith("7_left.png")
