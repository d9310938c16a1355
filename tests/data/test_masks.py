"""recontrast.data.masks: the drawn area of masks in every form, and pictures that cannot be masks."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from recontrast.data import notices
from recontrast.data.images import read_mask
from recontrast.data.listing import DataWarning
from recontrast.data.masks import NOTES, MaskNotes

TRUTH = np.zeros((80, 96), bool)
TRUTH[20:33, 41:50] = True
TRUTH[60, 10:12] = True


def grey(normal, anomalous, mask=TRUTH):
    return Image.fromarray(np.where(mask, np.uint8(anomalous), np.uint8(normal)))


def rgba(colour, mask=TRUTH, under=None):
    """Paint ``colour`` where the mask is, on a transparent picture."""
    pixels = np.zeros((*mask.shape, 4), np.uint8)
    pixels[:, :, :3] = colour if under is None else under
    pixels[mask] = (*colour, 255)
    return Image.fromarray(pixels)


def palette(colours):
    picture = Image.fromarray(TRUTH.astype(np.uint8)).convert("P")
    picture.putdata(TRUTH.astype(np.uint8).ravel().tolist())
    picture.putpalette([value for colour in colours for value in colour])
    return picture


def read(path, picture, **options):
    picture.save(path, **options)
    notes = MaskNotes()
    mask = read_mask(path, notes=notes)
    return mask, set(notes._paths)


@pytest.mark.parametrize(
    "picture",
    [
        grey(0, 255), grey(0, 1), grey(0, 2), grey(0, 128), Image.fromarray(TRUTH),
        Image.fromarray(np.where(TRUTH, np.uint16(65535), np.uint16(0))),
        Image.fromarray(np.where(TRUTH, np.uint16(1), np.uint16(0))), grey(0, 255).convert("RGB"),
        grey(0, 255).convert("RGBA"), rgba((255, 0, 0), under=(0, 0, 0)), palette([(0, 0, 0), (200, 30, 0)]),
        grey(0, 255).convert("LA"),
    ],
)  # fmt: skip
def test_plain_masks_give_no_note(tmp_path, picture):
    mask, kinds = read(tmp_path / "a.png", picture)
    assert np.array_equal(mask, TRUTH) and not kinds


def test_labels_and_soft_borders_count_whole(tmp_path):
    labels = TRUTH.astype(np.uint8) * 90
    labels[70:75, 60:70] = 255
    labels[40:45, 70:90] = 20
    mask, kinds = read(tmp_path / "labels.png", Image.fromarray(labels))
    assert np.array_equal(mask, labels > 0) and not kinds
    soft = grey(0, 255).resize((192, 160), Image.Resampling.BICUBIC).filter(ImageFilter.BoxBlur(1))
    mask, kinds = read(tmp_path / "soft.png", soft)
    assert np.array_equal(mask, np.asarray(soft) > 0) and not kinds


@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
def test_large_defects_are_legal(tmp_path, share):
    mask = np.zeros((100, 100), bool)
    mask[1 : 1 + int(98 * share), 1:99] = True
    result, kinds = read(tmp_path / "a.png", grey(0, 255, mask))
    assert np.array_equal(result, mask) and not kinds


@pytest.mark.parametrize(
    ("kind", "name", "picture", "options"),
    [
        ("lossy", "a.jpg", grey(0, 255), {"quality": 60}), ("lossy", "a.jpg", grey(0, 255), {"quality": 95}),
        ("lossy", "a.webp", grey(0, 255), {"quality": 70}),
        ("lossy", "a.jpg", rgba((255, 0, 0), under=(0, 0, 0)).convert("RGB"), {}),
        ("alpha", "a.png", rgba((255, 255, 255)), {}), ("alpha", "a.png", rgba((0, 0, 0)), {}),
        ("alpha", "a.png", rgba((255, 0, 0), under=(255, 255, 255)), {}),
        ("alpha", "a.png", rgba((0, 0, 0), under=(255, 255, 255)), {}),
        ("background", "a.png", grey(8, 255), {}), ("background", "a.png", grey(1, 2), {}),
        ("background", "a.png", grey(100, 200), {}), ("palette", "a.png", palette([(0, 0, 0), (0, 0, 0)]), {}),
    ],
)  # fmt: skip
def test_repaired_masks(tmp_path, kind, name, picture, options):
    mask, kinds = read(tmp_path / name, picture, **options)
    assert kinds == {kind}
    wrong = np.count_nonzero(mask != TRUTH)
    assert wrong <= (8 if kind == "lossy" else 0)


def test_picture_of_a_lossy_mask_stored_without_loss(tmp_path):
    grey(0, 255).save(tmp_path / "a.jpg", quality=70)
    mask, kinds = read(tmp_path / "a.png", Image.open(tmp_path / "a.jpg"))
    assert kinds == {"lossy"} and np.count_nonzero(mask != TRUTH) <= 4


@pytest.mark.parametrize(
    ("picture", "got"),
    [
        (grey(255, 0), "its whole border, which looks inverted"), (grey(128, 0), "looks inverted"),
        (grey(255, 8), "background has the value 255"), (grey(8, 8), "pixels all have the value 8"),
        (rgba((255, 0, 0), under=(255, 255, 255)).convert("RGB"), "without any black pixel"),
        (Image.effect_noise((96, 80), 60), "medium grey|without|background"),
    ],
)  # fmt: skip
def test_pictures_that_are_no_masks(tmp_path, picture, got):
    for name in ("a.png", "a.tiff"):
        with pytest.raises(ValueError, match=rf"{name}: wanted a mask, black except for the defect, got .*({got})"):
            read(tmp_path / name, picture)


def test_unusual_areas_are_noted(tmp_path):
    assert read(tmp_path / "full.png", grey(255, 255))[1] == {"full"}
    large = np.ones((80, 96), bool)
    large[:30, :20] = False
    large[40:70, 30:70] = False
    mask, kinds = read(tmp_path / "large.png", grey(0, 255, large))
    assert np.array_equal(mask, large) and kinds <= {"large"}


def test_notes_name_the_files_once_for_each_kind(tmp_path):
    notes = MaskNotes()
    for index in range(7):
        grey(8, 255).save(tmp_path / f"{index}.png")
        read_mask(tmp_path / f"{index}.png", notes=notes)
    with pytest.warns(DataWarning, match=rf"^7 masks, each of which {NOTES['background'][:20]}.*4\.png and 2 more$"):
        notes.warn()
    notices.forget_warnings()
    with pytest.warns(UserWarning, match=r"0\.png: has a background"):
        read_mask(tmp_path / "0.png")
    notices.forget_warnings()
