"""The estimator on parts with several views: paths, pages, sequences and arrays give the same scores."""

import numpy as np
import pytest
from command_line import works
from part_views import PATTERN, write_set
from PIL import Image

import recontrast
from recontrast import checkpoint as checkpoints
from recontrast.data.given_parts import list_parts
from recontrast.recipes.recipe import Recipe

RECIPE = Recipe(architecture="patchcore", backbone="test_resnet", weights="random", size=64, batch=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("views")
    write_set(root / "files", False, train=24)
    write_set(root / "pages", True, train=24)
    return root


def list_files(folder):
    """Return the paths of the two views of each part."""
    paths = sorted(folder.iterdir())
    return list(zip(paths[::2], paths[1::2], strict=True))


def test_parts_are_held_out_and_scored_as_a_whole(data, tmp_path):
    parts, new = list_files(data / "files/train/good"), list_files(data / "files/test/square")
    detector = recontrast.ReContrastDetector(
        RECIPE.replace(views_from=PATTERN, view_map="mean"), false_alarm_rate=0.2, random_state=3, device="cpu"
    ).fit(parts)
    assert detector.recipe_.view_names == ("left", "right") and len(detector.held_out_) == 5
    assert detector.calibration_.count == 5 and len(detector.calibration_.appearance) == 5
    scores, maps = detector.score_samples(new), detector.anomaly_maps(new)
    assert scores.shape == detector.predict(new).shape == (3,) and maps.shape == (3, 64, 64)
    assert detector.predict(new).tolist() == [-1, -1, -1]  # each view of a defect counts half
    file = detector.save(tmp_path / "checkpoint.pt")
    saved = checkpoints.load(file)
    assert len(saved.images["each"]) == 19 * 16 and saved.images["count"] == 38  # parts, and images
    loaded = recontrast.load(file, "cpu")
    np.testing.assert_allclose(-scores, loaded.predict([path for part in new for path in part]).scores, rtol=1e-6)
    single = loaded.recipe.of_single_images
    loaded.recipe = single
    views = [p.anomaly_map for p in loaded.predict([path for part in new for path in part])]
    np.testing.assert_allclose(maps, np.stack(views).reshape(3, 2, 64, 64).mean(1), rtol=1e-5)
    again = recontrast.ReContrastDetector.from_checkpoint(file, device="cpu")
    arrays = np.stack([[np.asarray(Image.open(path).convert("RGB")) for path in part] for part in new])
    for same in (new, [part[1] for part in new], [[Image.open(path) for path in part] for part in new], arrays):
        np.testing.assert_allclose(again.score_samples(same), scores, rtol=1e-6)
    text = works("calibrate", file, "--good", data / "files/test/good", "--false-alarm-rate", 0.25, "--device", "cpu")
    assert "threshold" in text


def test_trained_parts_are_known(data, tmp_path):
    """Their fingerprints are those of parts, so that `calibrate` refuses them."""
    pages = sorted((data / "pages/train/good").iterdir())
    recipe = RECIPE.replace(views_from="pages")
    detector = recontrast.ReContrastDetector(recipe, false_alarm_rate=None, device="cpu").fit(pages[:6])
    file = detector.save(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="got 6 of 24 that were"):
        recontrast.calibrate(file, data / "pages/train/good", false_alarm_rate=0.1, device="cpu")
    stacks = [[np.asarray(page.convert("L")) for page in _read_pages(path)] for path in pages[:6]]
    again = recontrast.ReContrastDetector(recipe, false_alarm_rate=None, device="cpu").fit(np.array(stacks))
    assert again._state.images["digest"] == detector._state.images["digest"]
    assert again.recipe_.view_names == ("1", "2")


def _read_pages(path):
    with Image.open(path) as picture:
        for page in range(2):
            picture.seek(page)
            yield picture.copy()


def test_copies_and_groups_are_parts(data):
    parts = list_files(data / "files/train/good")[:8]
    detector = recontrast.ReContrastDetector(
        RECIPE.replace(views_from=PATTERN), false_alarm_rate=0.5, holdout=2, device="cpu"
    )
    with pytest.warns(match="cop"):
        detector.fit([*parts, parts[0]])
    assert {0, 8} & set(detector.held_out_.tolist()) in (set(), {0})  # counted once, and on one side
    labels = [1] * 7 + [-1]
    assert 7 not in detector.fit(parts, labels, groups=[0, 0, 1, 1, 2, 2, 3, 3]).held_out_


def test_what_is_no_part_is_refused(data):
    parts = list_files(data / "files/test/good")
    for given, names, message in (
        ([part[0] for part in parts], (), "wanted each part as a sequence of the paths of its views"),
        (
            [part[:1] for part in parts],
            ("left", "right"),
            "image 0: wanted a part with 2 views .*, got 1",
        ),
        ([], (), "wanted a sequence of parts"),
        ([Image.new("L", (4, 4))], ("left", "right"), "got Image at position 0"),
        (parts[0][0], (), "wanted a sequence of parts"),
    ):
        with pytest.raises(ValueError, match=message):
            list_parts(given, PATTERN, names)
    detector = recontrast.ReContrastDetector(RECIPE.replace(views_from="pages"), device="cpu")
    with pytest.raises(ValueError, match="image 1: wanted views of one size, got 8 x 8 and 9 x 8"):
        detector.fit([[np.zeros((8, 8), np.uint8)] * 2, [np.zeros((8, 8), np.uint8), np.zeros((9, 8), np.uint8)]])


def test_views_of_a_sequence_are_sorted_by_their_names(tmp_path):
    for number in range(2):
        for name in ("left", "right"):
            (tmp_path / f"{number}_{name}.png").touch()
    left, right = tmp_path / "0_left.png", tmp_path / "0_right.png"
    views, images = list_parts([[right, left], [str(tmp_path / "1_left.png"), tmp_path / "1_right.png"]], PATTERN)
    assert views.names == ("left", "right")
    assert images == [left, right, tmp_path / "1_left.png", tmp_path / "1_right.png"]
    with pytest.raises(ValueError, match="image 1: wanted each of the views left, right once, got left again"):
        list_parts([[left, right], [left, left]], PATTERN)
    other = [tmp_path / "b.png", tmp_path / "a.png"]
    assert list_parts([other], PATTERN, ("left", "right"))[1] == other
