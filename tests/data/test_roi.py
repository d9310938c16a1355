"""Regions of interest: mask images, rectangles and polygons in JSON, folders of them, and how they fit images."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from recontrast.data.notices import ImageWarning, forget_warnings
from recontrast.data.roi import (
    ImageRois,
    RoiFolder,
    check_aspect,
    decode_mask,
    describe_roi,
    encode_mask,
    fit_mask,
    read_roi,
    resize_mask,
)
from recontrast.data.roi_shapes import fill_polygon


def make_mask(shape=(20, 30)):
    mask = np.zeros(shape, bool)
    mask[3:11, 5:22] = True
    return mask


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16", "0/1"])
def test_mask_images(mode, tmp_path):
    mask = make_mask()
    pixels = mask.astype(np.uint8) * (1 if mode == "0/1" else 255)
    picture = Image.fromarray(pixels)
    if mode == "I;16":
        picture = Image.fromarray(mask.astype(np.uint16) * 60000)
    elif mode != "0/1":
        picture = picture.convert(mode)
    picture.save(tmp_path / "roi.png")
    assert np.array_equal(read_roi(tmp_path / "roi.png"), mask)


def write_json(path, **content):
    path.write_text(json.dumps({"width": 30, "height": 20, **content}))
    return path


def test_shapes(tmp_path):
    shapes = {"rectangles": [[5, 3, 10, 8]], "polygons": [[[20, 2], [28, 2], [24, 18]]]}
    mask = read_roi(write_json(tmp_path / "roi.json", **shapes, ignore={"rectangles": [[6, 4, 2, 2]]}))
    picture = Image.new("L", (30 * 8, 20 * 8))  # drawn eight times as large, so that borders matter little
    draw = ImageDraw.Draw(picture)
    draw.rectangle((5 * 8, 3 * 8, 15 * 8 - 1, 11 * 8 - 1), fill=255)
    draw.polygon([(20 * 8, 2 * 8), (28 * 8, 2 * 8), (24 * 8, 18 * 8)], fill=255)
    draw.rectangle((6 * 8, 4 * 8, 8 * 8 - 1, 6 * 8 - 1), fill=0)
    assert np.array_equal(mask, np.asarray(picture)[4::8, 4::8] > 0)
    rest = read_roi(write_json(tmp_path / "rest.json", ignore={"rectangles": [[0, 0, 30, 5]]}))
    assert np.array_equal(rest, np.arange(20)[:, None] >= 5 + np.zeros(30, int))


def test_polygons_equal_the_even_odd_rule():
    rng = np.random.default_rng(0)
    for _ in range(30):
        corners = rng.uniform(0, 12, (int(rng.integers(3, 9)), 2))
        if rng.random() < 0.5:
            corners = corners.round()  # corners and edges on the grid
        ours = fill_polygon(corners, (12, 12))
        for y in range(12):
            for x in range(12):
                inside = False
                for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
                    if (y0 <= y + 0.5) != (y1 <= y + 0.5):
                        crossing = x0 + (y + 0.5 - y0) * (x1 - x0) / (y1 - y0)
                        inside ^= bool(crossing <= x + 0.5)
                assert ours[y, x] == inside


def test_encoded_masks_are_read_back():
    rng = np.random.default_rng(1)
    for shape in ((1, 1), (7, 13), (64, 64), (300, 1)):
        mask = rng.random(shape) < 0.5
        mask[0, 0] = True
        assert np.array_equal(decode_mask(encode_mask(mask)), mask)
    assert describe_roi(encode_mask(make_mask())) == "22.67 % of the image (30 x 20 px)"
    assert describe_roi(None) == "the whole image"
    with pytest.raises(ValueError, match=r"got one of .*: draw it smaller or simpler"):
        encode_mask(rng.random((3000, 3000)) < 0.5)
    good = encode_mask(make_mask())
    for text in ("", "20x30", "20x30 ????", good.replace("20x30", "20x31"), good[:-8], "0x5 AAAA", "1x1 eJxjAAAAAQAB"):
        with pytest.raises(ValueError, match=r"roi: wanted"):
            decode_mask(text)


def test_masks_of_another_size():
    mask = make_mask()
    forget_warnings()
    check_aspect(mask.shape, mask.shape, "roi.png", "a.png")
    with pytest.warns(ImageWarning, match=r"roi.png: the mask of 30 x 20 px is resized to the images, 60 x 40 px here"):
        check_aspect(mask.shape, (40, 60), "roi.png", "a.png")
    check_aspect((341, 512), (2000, 3000), "roi.png", "a.png")  # one ratio, up to a pixel
    check_aspect((2000, 3000), (341, 512), "roi.png", "a.png")
    for shape in ((30, 20), (20, 33), (200, 320)):
        with pytest.raises(ValueError, match=r"roi.png: wanted a mask of the size of a.png, .* got 30 x 20 px"):
            check_aspect(mask.shape, shape, "roi.png", "a.png")
    expected = np.asarray(Image.fromarray(mask).resize((16, 8), Image.Resampling.NEAREST))
    assert np.array_equal(resize_mask(mask, (8, 16)), expected)
    assert np.array_equal(resize_mask(mask, (40, 60)), np.kron(mask, np.ones((2, 2), bool)))


def test_masks_are_cropped_as_images():
    mask = make_mask((40, 40))
    whole = np.asarray(Image.fromarray(mask).resize((32, 32), Image.Resampling.NEAREST))
    assert np.array_equal(fit_mask(mask, 32, 24, (24, 24)), whole[4:28, 4:28])
    assert np.array_equal(fit_mask(mask, 32, None, (16, 16)), whole[1::2, 1::2])
    border = np.zeros((40, 40), bool)
    border[0] = True
    with pytest.raises(
        ValueError, match=r"roi.png: wanted .* at least one pixel of the map of 24 x 24 px, got one that"
    ):
        fit_mask(border, 32, 24, (24, 24), "roi.png")


BAD_JSON = {
    "{": "wanted a region of interest in JSON, got a text that is not JSON",
    "[]": "wanted a region of interest in JSON with width, height and shapes, got list",
    "{}": "width and height: wanted those of the image that the shapes were drawn on, 1 to 65536 px, got neither",
    '{"width": 30, "height": 20}': "wanted rectangles, polygons or ignore, got none of them",
    '{"width": 30, "height": 20, "circles": []}': "wanted the keys width, .* got 'circles'",
    '{"width": 30, "height": 20, "rectangles": [[25, 3, 10, 8]]}': (
        r"rectangles: number 1: wanted corners in the image of 30 x 20 px, got \(35, 3\)"
    ),
    '{"width": 30, "height": 20, "rectangles": [[1, 2, 0, 4]]}': "number 1: wanted left, top, and a width and a height",
    '{"width": 30, "height": 20, "polygons": [[[0, 0], [1, 2]]]}': "number 1: wanted at least three corners",
    '{"width": 30, "height": 20, "polygons": [[[0, 0], [40, 2], [3, 3]]]}': r"wanted corners in .* got \(40, 2\)",
    '{"width": 30, "height": 20, "polygons": [[[0, 0], ["a", 2], [3, 3]]]}': "number 1: wanted at least three corners",
    '{"width": 30, "height": 20, "rectangles": {}}': "rectangles: wanted a list, got dict",
    '{"width": 30, "height": 20, "ignore": 3}': "ignore: wanted rectangles and polygons, got int",
    '{"width": 30, "height": 20, "rectangles": []}': "wanted a region of interest with at least one pixel",
}


@pytest.mark.parametrize("text", BAD_JSON)
def test_bad_json_is_refused(text, tmp_path):
    path = tmp_path / "roi.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"roi\.json: .*{BAD_JSON[text]}"):
        read_roi(path)


def test_bad_masks_are_refused(tmp_path):
    def save(values):
        Image.fromarray(np.array(values, np.uint8)).save(tmp_path / "roi.png")
        return tmp_path / "roi.png"

    with pytest.raises(
        ValueError, match=r"roi.png: wanted a region of interest with at least one pixel, got an empty one"
    ):
        read_roi(save([[0, 0], [0, 0]]))
    with pytest.raises(ValueError, match=r"roi.png: wanted a mask of two values, black outside .*, got 3 values"):
        read_roi(save([[0, 100], [255, 0]]))
    with pytest.raises(ValueError, match=r"roi.png: wanted a mask of two values, .* got the values 100 and 255"):
        read_roi(save([[100, 100], [255, 255]]))
    with pytest.raises(FileNotFoundError, match=r"none.png"):
        read_roi(tmp_path / "none.png")
    with pytest.raises(FileNotFoundError, match=r"none.json"):
        read_roi(tmp_path / "none.json")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text.png"):
        read_roi(tmp_path / "text.png")


def test_folder_of_masks(tmp_path):
    for name in ("a.png", "bad/000_mask.png", "good/000.png"):
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_mask()).save(tmp_path / "masks" / name)
    folder = RoiFolder(tmp_path / "masks")
    assert folder.find("photos/a.jpg") == tmp_path / "masks/a.png"
    assert folder.find("test/bad/000.png") == tmp_path / "masks/bad/000_mask.png"
    assert folder.find("test/good/000.png") == tmp_path / "masks/good/000.png"
    with pytest.raises(
        ValueError, match=r"masks: wanted a mask for each image, got none named 001 for test/bad/001.png"
    ):
        folder.find("test/bad/001.png")
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg")
    rois = ImageRois([tmp_path / "masks/a.png"], [tmp_path / "a.jpg"], 16, None, (16, 16))
    assert rois[[0]].shape == (1, 16, 16)
    assert np.array_equal(rois[[0]][0], fit_mask(make_mask(), 16, None, (16, 16)))
    Image.new("RGB", (60, 60)).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a.png: wanted a mask of the size of .*a.jpg, 60 x 60 px"):
        rois[[0]]
    Image.fromarray(make_mask()).save(tmp_path / "masks/a.bmp")
    with pytest.raises(ValueError, match=r"a.png: wanted one mask of this name, got a.bmp as well"):
        RoiFolder(tmp_path / "masks")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: wanted a folder with a mask for each image, got an empty one"):
        RoiFolder(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"none: wanted a folder of masks"):
        RoiFolder(tmp_path / "none")
