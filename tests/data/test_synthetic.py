"""recontrast.data.synthetic: the data set of the demo."""

import numpy as np
import pytest
from PIL import Image

from recontrast.data import synthetic

PHOTO = synthetic.photographs()["brick"]


def list_files(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))


def read_pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return synthetic.make_demo(tmp_path_factory.mktemp("made"), train=3, test=4, size=64, seed=5)


def test_photographs():
    photos = synthetic.photographs()
    assert list(photos) == ["brick", "grass", "gravel"]
    for photo in photos.values():
        assert photo.shape == (512, 512) and photo.dtype == np.uint8 and photo.std() > 20


def test_photographs_without_scikit_image(monkeypatch):
    monkeypatch.setattr(synthetic, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"wanted the package scikit-image, got none .*: pip install scikit-image"):
        synthetic.photographs()


def test_layout(demo):
    files = list_files(demo)
    assert len(files) == 3 * (3 + 4 + 2 * 4)
    assert {name.split("/")[0] for name in files} == {"brick", "grass", "gravel"}
    for kind in synthetic.KINDS:
        (test,) = (demo / "grass" / "test" / kind).iterdir()
        mask = demo / "grass" / "ground_truth" / kind / f"{test.stem}_mask.png"
        assert read_pixels(test).shape == read_pixels(mask).shape == (64, 64)
        assert set(np.unique(read_pixels(mask))) == {0, 255}


def test_seed_determines_all_images(demo, tmp_path):
    for seed, is_same in ((5, True), (6, False)):
        other = synthetic.make_demo(tmp_path / str(seed), train=3, test=4, size=64, seed=seed)
        assert list_files(other) == list_files(demo)
        equal = [(demo / name).read_bytes() == (other / name).read_bytes() for name in list_files(demo)]
        assert all(equal) if is_same else not any(equal)


def test_train_and_test_share_no_pixel(monkeypatch, tmp_path):
    """In a photograph whose brightness rises from left to right, pixel values tell where an image was cut."""
    ramp = np.tile((np.arange(512) // 2).astype(np.uint8), (512, 1))
    monkeypatch.setattr(synthetic, "photographs", lambda: {"ramp": ramp})
    root = synthetic.make_demo(tmp_path / "ramp", train=20, test=20, size=128)
    train, test = (
        np.stack([read_pixels(path) for path in (root / "ramp" / split / "good").iterdir()]).astype(int)
        for split in ("train", "test")
    )
    assert train.max() <= test.min() + 1  # one level: bicubic resampling overshoots at borders


def test_existing_folder_is_reused_replaced_or_an_error(tmp_path):
    root = synthetic.make_demo(tmp_path / "data", train=2, test=4, size=32)
    before = (root / "brick" / "train" / "good" / "000.png").stat().st_mtime_ns
    synthetic.make_demo(root, train=2, test=4, size=32)
    assert (root / "brick" / "train" / "good" / "000.png").stat().st_mtime_ns == before
    synthetic.make_demo(root, train=1, test=4, size=32)
    assert len(list((root / "brick" / "train" / "good").iterdir())) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"mine is not empty"):
        synthetic.make_demo(tmp_path / "mine", train=1, test=4, size=32)
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize("kind", synthetic.KINDS)
@pytest.mark.parametrize("name", synthetic.NAMES)
def test_defect_changes_what_the_mask_covers(kind, name):
    photo = synthetic.photographs()[name][:128, 300:428]
    shares = []
    for seed in range(20):
        image, mask = synthetic.draw_defect(photo, kind, np.random.default_rng(seed))
        assert image.shape == mask.shape == photo.shape and image.dtype == np.uint8 and mask.dtype == bool
        change = np.abs(image.astype(int) - photo)
        assert change[mask].mean() >= synthetic.MIN_CONTRAST
        assert change[~mask].mean() < 0.5
        shares.append(mask.mean())
    assert 0.001 < min(shares) and max(shares) < 0.12
    assert len(set(shares)) > 10


def test_uniform_image(tmp_path):
    image, mask = synthetic.draw_defect(np.full((32, 40), 90, np.uint8), "misplaced", np.random.default_rng(0))
    assert (image == 90).all() and mask.any()


@pytest.mark.parametrize(
    "image, kind, message",
    [
        (PHOTO, "dent", "kind: wanted one of scratch, stain, hole, misplaced, got 'dent'"),
        (PHOTO[:31], "hole", r"at least 32 x 32, got uint8 \(31, 512\)"),
        (PHOTO.astype(float), "hole", "uint8 .* got float64"),
        (np.stack([PHOTO] * 3, -1), "hole", r"got uint8 \(512, 512, 3\)"),
    ],
)
def test_wrong_arguments_of_draw_defect(image, kind, message):
    with pytest.raises(ValueError, match=message):
        synthetic.draw_defect(image, kind, np.random.default_rng(0))


@pytest.mark.parametrize(
    "values, message", [({"size": 16}, "got 16"), ({"train": 0}, "got 0 and 4"), ({"test": 3}, "got 2 and 3")]
)
def test_wrong_arguments_of_make_demo(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        synthetic.make_demo(tmp_path / "data", **{"train": 2, "test": 4, "size": 32, **values})
    assert not (tmp_path / "data").exists()
