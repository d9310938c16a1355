"""recontrast.data.in_memory: which arguments are several images, and which are refused with the right call."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from recontrast.data.in_memory import InMemoryImages, as_image_list
from recontrast.inference.given_images import list_given

GREY = np.zeros((40, 50), np.uint8)
COLOUR = np.zeros((40, 50, 3), np.uint8)


class Table:
    """Like a DataFrame: iterating over it gives the names of its columns."""

    columns = ("path", "label")
    shape = (3, 2)

    def __len__(self):
        return 3

    def __iter__(self):
        return iter(self.columns)


REFUSED_EVERYWHERE = [
    (Table(), "a table (Table): pass the column"),
    ({"a.png": 1}, "a dictionary: pass list(images.values())"),
    ({"a.png", "b.png"}, "a set, which has no order"),
    (torch.zeros(2, 3, 8, 8), "tensor.cpu().permute(0, 2, 3, 1).numpy()"),
    (torch.zeros(3, 8, 8), "tensor.cpu().permute(1, 2, 0).numpy()"),
    ([torch.zeros(3, 8, 8)], "tensor.cpu().permute(1, 2, 0).numpy() at position 0"),
    (b"\x89PNG", "bytes: pass paths"),
    ([GREY, None], "NoneType at position 1"),
    ([GREY, [1, 2]], "list at position 1"),
    ([np.zeros((8, 8, 4), np.uint8)], "pass image[:, :, :3] to drop the alpha channel"),
    ([np.zeros((8, 8, 1), np.uint8)], "pass image[:, :, 0] for a grey image"),
    ([np.zeros((3, 8, 8), np.uint8)], "pass image.transpose(1, 2, 0)"),
    ([np.zeros((8, 0, 3), np.uint8)], "got (8, 0, 3)"),
    ([COLOUR, np.zeros((2, 8, 8, 3), np.uint8)], "pass a list of images, or one array of them all"),
    (np.array([["a.png", "1"], ["b.png", "0"]]), "got an array (2, 2)"),
    ([], "got"),
    (5, "got int"),
]


@pytest.mark.parametrize(("images", "got"), REFUSED_EVERYWHERE)
def test_refused_by_estimator_and_detector(images, got):
    for read in (as_image_list, list_given):
        with pytest.raises(ValueError, match=rf"wanted .*{re.escape(got)}"):
            read(images)


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (COLOUR, "(40, 50, 3) of uint8, which is one image: pass [image]"),
        (np.zeros((40, 50, 4), np.uint8), "which is one image"),
        (np.zeros((3, 40, 50), np.uint8), "pass [image.transpose(1, 2, 0)] or list(images)"),
        (GREY, "which is one grey image: pass [image]"),
        (np.zeros((2, 3, 40, 50), np.uint8), "pass images.transpose(0, 2, 3, 1)"),
        (np.zeros((2, 40, 50, 4), np.uint8), "pass images[..., :3]"),
        (np.zeros((2, 40, 50, 1), np.uint8), "pass images[..., 0]"),
        (np.zeros((2, 1, 40, 50), np.uint8), "pass images[:, 0]"),
        ("a.png", "one path, 'a.png': put it into a list"),
        (Image.fromarray(COLOUR), "one PIL image: put it into a list"),
        (iter([GREY]), "an iterator (list_iterator): pass list(images)"),
        (np.float32(3), "got float32"),
        (np.zeros(5), "got an array (5,)"),
    ],
)
def test_one_image_is_not_several(images, got):
    with pytest.raises(ValueError, match=rf"^images: wanted .*{re.escape(got)}"):
        as_image_list(images)


@pytest.mark.parametrize(
    "images",
    [np.stack([GREY] * 2), np.stack([COLOUR] * 2), [GREY, COLOUR / 255, "a.png", Image.fromarray(GREY)], (GREY, COLOUR),
     np.array(["a.png", "b.png"]), np.array(["a.png", "b.png"], object), list(np.zeros((3, 9, 9), np.uint8))],
)  # fmt: skip
def test_several_images(images):
    assert len(as_image_list(images)) == len(images)
    assert InMemoryImages(images, 32).shape == (len(images), 32, 32, 3)


@pytest.mark.parametrize(
    ("pixels", "got"),
    [
        (COLOUR.astype(np.int64) + 200, "got int64: pass image.astype(np.uint8)"),
        (COLOUR.astype(np.uint16) + 4000, "got uint16 with values from 4000 to 4000"),
        (COLOUR.astype(bool), "got bool: pass image.astype(np.uint8) * 255"),
        (COLOUR + 255.0, r"wanted floats in [0, 1] (divide by 255, or pass uint8), got 255 to 255"),
    ],
)
def test_values_that_are_refused(pixels, got):
    with pytest.raises(ValueError, match=rf"^image 0: .*{re.escape(got)}"):
        InMemoryImages([pixels], 32)[[0]]


def test_detector_takes_one_image_too():
    assert len(list_given(COLOUR)) == len(list_given(GREY)) == 1
    assert len(list_given(iter([GREY, COLOUR]))) == 2
    with pytest.raises(ValueError, match=r"pass list\(images\) for a stack of grey images"):
        list_given(np.zeros((9, 40, 50), np.uint8))
    with pytest.raises(ValueError, match=r"wanted .*, got SimpleNamespace"):
        list_given(SimpleNamespace())
