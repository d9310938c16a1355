"""Parts with several views: a form with one file for each view, or a file of pages, is answered as `predict` does."""

import io
import json
import unicodedata

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
from recontrast.data.views import Views
from recontrast.service.messages import RequestError
from recontrast.service.uploads import find_images

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

    refuse(415, "wanted one file for each of the views left, right (multipart/form-data), got image/png",
           "files", left, "image/png")  # fmt: skip
    refuse(400, "got no right", "files", *join_forms(("left", "a.png", left)))
    refuse(400, "got left twice", "files", *join_forms(("left", "a", left), ("x", "b_left.png", right)))
    refuse(400, "got 'c.png' in the field 'x', which names none", "files", *join_forms(("x", "c.png", left)))
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
        status, _, answer = client.ask("POST", "/predict", body, Content_Type=kind)
        assert status == 413
        assert json.loads(answer)["error"] == "left: wanted at most 4,095 pixels in each of 2 views, got 64 x 64"


def test_parts_may_have_many_views(part):
    """As many as there are, and one that is named like the field of the page."""
    names = (*map(str, range(39)), "view")
    views = Views(r"_(view|\d+)\.", names)
    forms = [join_forms(*[(field or name, f"7_{name}.png", name.encode()) for name in reversed(names)])
             for field in ("", "x")]  # fmt: skip
    for body, kind in forms:
        assert find_images(body, kind, views) == [name.encode() for name in names]
    body, kind = join_forms(*[(name, "a", b"") for name in names[2:]])
    with pytest.raises(RequestError, match=r"of the views 0, 1, 2, 3, 4, 5, 6, 7 and 32 others .*, got no 0, 1$"):
        find_images(body, kind, views)
    body, kind = join_forms(*[("left", "a", b"")] * 23)
    with pytest.raises(RequestError, match="too many parts"):
        find_images(body, kind, Views(PATTERN, ("left", "right")))


def test_views_are_named_in_any_language():
    """Browsers and curl send the names of fields and files in UTF-8."""
    views = Views(r"_(\w+)\.", ("größe", "表"))
    for names in ([("größe", "a.png"), ("表", "b.png")], [("", "7_größe.png"), ("", "7_表.png")]):
        body, kind = join_forms(*[(field, file, str(n).encode()) for n, (field, file) in enumerate(names)])
        assert find_images(body, kind, views) == [b"0", b"1"]
    body, kind = join_forms(("größe", "a.png", b"0"), ("höhe", "b.png", b"1"))
    with pytest.raises(RequestError, match=r"got 'b.png' in the field 'höhe', which names none"):
        find_images(body, kind, views)
    body = body.replace("höhe".encode(), "höhe".encode("latin-1"))
    with pytest.raises(RequestError, match=r"in the field 'h.he', which names none"):
        find_images(body, kind, views)


@pytest.mark.parametrize("name", ["größe", 'a"b', "a%22b", "line\nbreak"])
def test_names_as_browsers_and_macos_send_them(name):
    """Browsers escape quotes and line breaks in forms, and macOS decomposes letters with marks."""
    views = Views(r"_([^/]+)\.", (name, "other"))
    sent = unicodedata.normalize("NFD", name).replace('"', "%22").replace("\n", "%0A")
    for names in ((sent, "x.png"), ("", f"7_{sent}.png")):
        body, kind = join_forms(("other", "y.png", b"1"), (*names, b"0"))
        assert find_images(body, kind, views) == [b"0", b"1"]
    body, kind = join_forms((sent, "7_other.png", b"0"), ("other", "y.png", b"1"))  # the field counts, not the file
    assert find_images(body, kind, views) == [b"0", b"1"]


def test_page_sends_the_views_of_a_part_together(detectors, part):
    with serving({"files": detectors["files"]}) as client, browser() as driver:
        open_service(driver, client)
        assert "parts with 2 views (left, right)" in text(driver, "about")
        assert driver.find_element("css selector", "h1").text == "Inspect a part"
        assert text(driver, "invitation") == "Drop all views of a part here, or of several parts"
        upload(driver, "\n".join(map(str, (part[1], part[0]))))
        body, kind = join_forms(("left", "a", part[0].read_bytes()), ("right", "b", part[1].read_bytes()))
        score = client.predict(body, Content_Type=kind)["score"]
        assert float(text(driver, "score")) == pytest.approx(score, rel=1e-3)
        assert text(driver, "file-name").startswith("7_left.png")


def test_page_sends_views_with_names_of_any_language(part, tmp_path):
    """Letters that \\w is for Python and not for browsers, in the decomposed form of macOS."""
    recipe = RECIPE.replace(views_from=r"_(\w+)\.", view_names=("größe", "right"))
    checkpoint = save(tmp_path / "checkpoint.pt", recipe)
    first = part[0].rename(tmp_path / unicodedata.normalize("NFD", "7_größe.png"))
    with serving({"parts": checkpoint}) as client, browser() as driver:
        open_service(driver, client)
        upload(driver, f"{first}\n{part[1]}")
        body, kind = join_forms(("größe", "a", first.read_bytes()), ("right", "b", part[1].read_bytes()))
        score = client.predict(body, Content_Type=kind)["score"]
        assert float(text(driver, "score")) == pytest.approx(score, rel=1e-3)


def test_page_sends_a_view_that_is_named_view(tmp_path, part):
    """The name of the field is that of the view, whatever it is."""
    recipe = RECIPE.replace(views_from=r"_(view|top)\.", view_names=("top", "view"))
    paths = [path.rename(tmp_path / f"7_{name}.png") for path, name in zip(part, recipe.view_names, strict=False)]
    with serving({"parts": save(tmp_path / "parts.pt", recipe)}) as client, browser() as driver:
        open_service(driver, client)
        upload(driver, "\n".join(map(str, paths)))
        assert text(driver, "file-name").startswith("7_top.png")
