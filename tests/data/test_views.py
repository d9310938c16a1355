"""Views of a part: pages of TIFF files, files by a pattern, their samples and paths."""

import struct
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recontrast.data.bit_depth import detect_bits
from recontrast.data.cache import ImageCache
from recontrast.data.dataset_sample import Sample
from recontrast.data.encoded_image import ImagePage
from recontrast.data.groups import group_equal_samples
from recontrast.data.image_files import ImageFiles, describe_image_error
from recontrast.data.images import image_size, read_image
from recontrast.data.part_samples import check_part_files, join_part_samples
from recontrast.data.tiff_tags import count_file_pages, count_pages, read_tags
from recontrast.data.views import Views, combine_views, divide_path, find_views, group_paths, is_pattern
from recontrast.inference.given_images import GivenImages
from recontrast.recipes.recipe import Recipe

LIGHTS = Views(r"_(left|right|top)\.", ("left", "right", "top"))


def write_pages(path, *pages, **options):
    first, *others = [Image.fromarray(page) for page in pages]
    first.save(path, save_all=True, append_images=others, **options)
    return path


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pages_are_read_one_by_one(tmp_path, dtype, compression):
    """8-bit pages by Pillow, those of 16 bits by our own reader."""
    top = np.iinfo(dtype).max
    pages = [np.random.default_rng(i).integers(0, top, (12, 9 + i), dtype=dtype) for i in range(3)]
    path = write_pages(tmp_path / "part.tif", *pages, compression=compression)
    assert count_file_pages(path) == 3
    for number, page in enumerate(pages):
        expected = np.rint(page / (top / 255)).astype(np.uint8)
        source = ImagePage(path, number)
        assert image_size(source) == page.shape
        np.testing.assert_array_equal(read_image(source), np.repeat(expected[..., None], 3, axis=2))
        if dtype == np.uint16:
            samples = read_image(source, window=(0, 65535))[:, :, 0]
            np.testing.assert_allclose(samples, page / np.float32(65535), atol=1e-6)
    with pytest.raises(ValueError, match=r"part.tif \(page 4\): wanted a complete image, .*page 4 of 3"):
        read_image(ImagePage(path, 3))


def test_colour_and_big_tiff_pages(tmp_path):
    pages = [np.random.default_rng(i).integers(0, 255, (7, 11, 3), dtype=np.uint8) for i in range(2)]
    path = write_pages(tmp_path / "part.tif", *pages, big_tiff=True)
    np.testing.assert_array_equal(read_image(ImagePage(path, 1)), pages[1])
    with path.open("rb") as file:
        assert count_pages(file) == 2


def test_a_chain_of_pages_that_returns_is_refused(tmp_path):
    path = write_pages(tmp_path / "part.tif", *np.zeros((2, 4, 4), np.uint8))
    content = bytearray(path.read_bytes())
    first = int.from_bytes(content[4:8], "little")
    count = int.from_bytes(content[first : first + 2], "little")
    second = int.from_bytes(content[first + 2 + 12 * count : first + 6 + 12 * count], "little")
    count = int.from_bytes(content[second : second + 2], "little")
    content[second + 2 + 12 * count : second + 6 + 12 * count] = first.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"part.tif: wanted a complete TIFF file, .*chain of pages without an end"):
        count_file_pages(path)
    assert read_tags(BytesIO(content)).pages == 2


def test_other_formats_have_one_page(tmp_path):
    Image.new("L", (3, 3)).save(tmp_path / "a.png")
    assert count_file_pages(tmp_path / "a.png") == 1
    with pytest.raises(ValueError, match=r"a.png: wanted a file of at least 2 pages for the views of a part, got 1"):
        find_views("pages", [tmp_path / "a.png"])


def test_number_of_pages_must_be_that_of_training(tmp_path):
    path = write_pages(tmp_path / "part.tif", *np.zeros((3, 4, 4), np.uint8))
    assert find_views("pages", [path]) == Views("pages", ("1", "2", "3"))
    with pytest.raises(ValueError, match=r"part.tif: wanted 4 pages as in training, got 3"):
        Views("pages", ("1", "2", "3", "4")).read(path)


def test_views_of_one_part_have_one_size(tmp_path):
    for name, size in (("left", (4, 4)), ("right", (4, 4)), ("top", (5, 4))):
        Image.new("L", size).save(tmp_path / f"a_{name}.png")
    with pytest.raises(ValueError, match=r"a_top.png: wanted a view of the size of .*a_left.png, 4 x 4, got 4 x 5"):
        LIGHTS.read(tmp_path / "a_left.png")
    (tmp_path / "a_top.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a_top.png: wanted the views left, right, top of each part, got no"):
        LIGHTS.read(tmp_path / "a_left.png")


def test_patterns():
    assert divide_path(r"_(a|b)", Path("x_a/y_b.png")) == ("x_a/y_", "b", ".png")  # the last match
    assert is_pattern(r"_(a|b)\.") and not is_pattern("(") and not is_pattern("a") and not is_pattern("(a)(b)")
    with pytest.raises(ValueError, match=r"x.png: wanted a path with the name of a view as '_\(a\)' finds it"):
        divide_path("_(a)", Path("x.png"))
    paths = [Path(f"{part}_{view}.png") for part in "ab" for view in ("v10", "v9")]
    assert find_views(r"_(v\d+)\.", paths).names == ("v9", "v10")  # natural order
    with pytest.raises(ValueError, match=r"views_from: wanted at least 2 views of each part .* got 1 \(v9\)"):
        find_views(r"_(v9)\.", [Path("a_v9.png")])


def test_patterns_match_absolute_paths(tmp_path, monkeypatch):
    folders = Views("/(left|right)/", ("left", "right"))
    (tmp_path / "right").mkdir()
    monkeypatch.chdir(tmp_path)
    assert divide_path(folders.source, Path("left/1.png")) == ("", "left", "/1.png")
    assert folders.locate(Path("left/1.png")) == [Path("left/1.png"), Path("right/1.png")]
    paths = [Path("left/1.png"), Path("right/1.png"), tmp_path / "right/1.png", Path("right/2.png")]
    assert group_paths(paths, folders) == [Path("left/1.png"), Path("left/2.png")]
    monkeypatch.chdir(tmp_path / "right")  # a folder above names the view
    assert folders.locate(Path("1.png")) == [tmp_path / "left/1.png", tmp_path / "right/1.png"]


def test_paths_of_parts():
    paths = [Path(f"x/{part}_{view}.png") for part in "ab" for view in ("top", "left")]
    assert group_paths(paths, LIGHTS) == [Path("x/a_left.png"), Path("x/b_left.png")]
    assert group_paths(paths, None) == group_paths(paths, Views("pages", ("1", "2"))) == paths
    with pytest.raises(ValueError, match=r"c_low.png: wanted one of the views a, b as in training, got 'low'"):
        group_paths([Path("c_low.png")], Views(r"_(\w+)\.", ("a", "b")))


def make_samples(label=0, split="train", part="a", **changes):
    return [
        replace(
            Sample(Path(f"{part}_{view}.png"), None, label, "nut", split, "scratch" if label else "good"), **changes
        )
        for view in LIGHTS.names
    ]


def test_samples_of_parts():
    samples = [*make_samples(), *make_samples(part="b", split="test")]
    samples[4] = replace(samples[4], label=1, defect="dent", mask=Path("m.png"))
    first, second = join_part_samples(samples, LIGHTS)
    assert (first.path, first.label, [view.path.name for view in first.views]) == (
        Path("a_left.png"), 0, ["a_right.png", "a_top.png"],
    )  # fmt: skip
    assert (second.label, second.defect, second.mask) == (1, "dent", Path("m.png"))
    assert join_part_samples([first, second], LIGHTS) == [first, second]  # joined already
    assert join_part_samples(samples, None) == samples
    with pytest.raises(ValueError, match=r"a_left.png: wanted the views left, right, top of each part, got no top"):
        join_part_samples(samples[:2], LIGHTS)
    with pytest.raises(
        ValueError, match=r"a_top.png: wanted all views of a part in one split, got test here and train"
    ):
        join_part_samples([*samples[:2], replace(samples[2], split="test")], LIGHTS)
    of_folders = [*samples[3:5], replace(samples[5], category="top")]  # one for each view
    (part,) = join_part_samples(of_folders, LIGHTS)
    assert part.category == "nut" and len(part.views) == 2


def test_messages_name_a_few_of_many_views():
    views = Views(r"_(\d+)\.", tuple(map(str, range(30))))
    with pytest.raises(ValueError, match=r"wanted one of the views 0, 1, 2, 3, 4, 5, 6, 7 and 22 others as in"):
        group_paths([Path("/a/x_77.png")], views)
    samples = [Sample(Path(f"/a/x_{view}.png"), None, 0, "a", "train", "good") for view in range(5)]
    with pytest.raises(ValueError, match=r", got no 5, 6, 7, 8, 9, 10, 11, 12 and 17 others$"):
        join_part_samples(samples, views)
    with pytest.raises(ValueError, match=r"wanted paths of parts with the views 0, .*, 7 and 22 others, got ndarray$"):
        GivenImages(np.zeros((4, 4, 3), np.uint8), views=views)
    assert LIGHTS.describe() == "left, right, top"


def test_an_error_names_a_view_once():
    error = ValueError("/a/1_top.png: wanted an image, got another")
    assert describe_image_error("/a/1_left.png", error, LIGHTS) == str(error)
    assert describe_image_error("/a/1_left.png", error) == f"/a/1_left.png: {error}"


def test_files_of_parts_are_checked(tmp_path):
    """A mask may be missing if another view has one; an image may not."""
    samples = [
        Sample(tmp_path / f"{part}_{view}.png", tmp_path / f"{part}_{view}_mask.png", 1, "nut", "test", "hole")
        for part in "ab" for view in LIGHTS.names
    ]  # fmt: skip
    for sample in samples:
        sample.path.touch()
    for name in ("a_right_mask.png", "b_left_mask.png", "b_top_mask.png"):
        (tmp_path / name).touch()
    checked = check_part_files(samples, LIGHTS.source)
    assert [None if s.mask is None else s.mask.name[:-9] for s in checked] == [
        None, "a_right", None, "b_left", None, "b_top",
    ]  # fmt: skip
    joined = join_part_samples(checked, LIGHTS)
    assert check_part_files(joined, LIGHTS.source) == joined
    given = [replace(samples[start], views=tuple(samples[start + 1 : start + 3])) for start in (0, 3)]
    assert check_part_files(given, LIGHTS.source) == joined  # parts that a caller has joined
    (tmp_path / "a_right_mask.png").unlink()
    with pytest.raises(ValueError, match=r"a_left.png: wanted its mask .*a_left_mask.png, or one of another view"):
        check_part_files(samples, LIGHTS.source)
    with pytest.raises(ValueError, match=r"a_left.png: wanted its mask .*a_left_mask.png, got none$"):
        check_part_files(samples, "pages")  # which have one mask
    samples[4].path.unlink()
    with pytest.raises(ValueError, match=r"b_right.png: wanted an image, got no such file$"):
        check_part_files([replace(sample, mask=None) for sample in samples], LIGHTS.source)


def test_a_view_without_a_mask_does_not_show_the_defect(tmp_path):
    for name in ("right", "top"):
        Image.new("L", (4, 4), 255).save(tmp_path / f"{name}.png")
    views = [replace(s, mask=tmp_path / f"{s.path.stem[2:]}.png") for s in make_samples(1, "test")]
    (part,) = join_part_samples(views, LIGHTS)
    assert part.mask == tmp_path / "right.png"
    assert [view.mask for view in part.views] == [tmp_path / "right.png", tmp_path / "top.png"]
    for name in ("right", "top"):
        (tmp_path / f"{name}.png").unlink()
    (part,) = join_part_samples(views, LIGHTS)  # no view has a mask: the evaluation leaves the part out
    assert part.mask == tmp_path / "left.png"


def test_views_of_a_part_have_one_group():
    left, right, top = make_samples()
    (part,) = join_part_samples([left, replace(right, group="7"), top], LIGHTS)  # stated for one view alone
    assert part.group == "7"
    (part,) = join_part_samples([replace(left, group="7"), replace(right, group="7"), top], LIGHTS)
    assert part.group == "7"
    with pytest.raises(ValueError, match=r"a_top.png: wanted all views of a part in one group, got '8' here and '7' f"):
        join_part_samples([left, replace(right, group="7"), replace(top, group="8")], LIGHTS)


def write_parts(folder, parts=3, size=8):
    rng = np.random.default_rng(0)
    for part in range(parts):
        for view in LIGHTS.names:
            Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(folder / f"{part}_{view}.png")
    return [folder / f"{part}_left.png" for part in range(parts)]


def test_all_readers_return_the_views_in_sequence(tmp_path):
    paths = write_parts(tmp_path)
    expected = np.concatenate([LIGHTS.read(path, size=8) for path in paths])
    assert expected.shape == (9, 8, 8, 3)
    np.testing.assert_array_equal(expected[4], read_image(tmp_path / "1_right.png"))
    cache = ImageCache(paths, 8, views=LIGHTS)
    assert cache.offsets == [0, 3, 6, 9]
    np.testing.assert_array_equal(cache[:], expected)
    stored = ImageCache(paths, 8, directory=tmp_path / "cache", views=LIGHTS)
    np.testing.assert_array_equal(stored[:], expected)
    assert stored.path != ImageCache(paths, 8, directory=tmp_path / "cache").path
    files = ImageFiles(paths)
    resized = files.resized(8, views=LIGHTS)
    assert len(resized) == 9
    np.testing.assert_array_equal(resized[np.arange(3, 9)], expected[3:])
    (tmp_path / "1_top.png").unlink()
    assert not resized[np.arange(9)][3:6].any()  # the part is black
    assert list(files.errors) == [1] and "1_top.png" in files.errors[1]


def test_a_changed_view_changes_the_cache(tmp_path):
    paths = write_parts(tmp_path, parts=1)
    before = ImageCache(paths, 8, directory=tmp_path / "cache", views=LIGHTS)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "0_top.png")
    after = ImageCache(paths, 8, directory=tmp_path / "cache", views=LIGHTS)
    assert before.path != after.path and (after[[2]] == 9).all()


def test_parts_are_copies_only_if_all_views_are(tmp_path):
    paths = write_parts(tmp_path)
    (tmp_path / "1_left.png").write_bytes((tmp_path / "0_left.png").read_bytes())
    for view in LIGHTS.names:
        (tmp_path / f"2_{view}.png").write_bytes((tmp_path / f"0_{view}.png").read_bytes())
    samples = [Sample(Path(str(path).replace("left", view)), None, 0, "nut", "train", "good")
               for path in paths for view in LIGHTS.names]  # fmt: skip
    assert group_equal_samples(join_part_samples(samples, LIGHTS)) == [0, 1, 0]


def test_bits_of_pages(tmp_path):
    path = write_pages(tmp_path / "part.tif", *np.full((2, 4, 4), 4000, np.uint16))
    assert detect_bits([ImagePage(path, 1)]) == 12


def test_combination():
    values = torch.tensor([[1.0, 5.0], [3.0, 2.0], [torch.nan, 0.0], [1.0, 1.0]])
    assert combine_views(values, 2, "max")[0].tolist() == [3.0, 5.0]
    assert combine_views(values, 2, "mean")[0].tolist() == [2.0, 3.5]
    assert combine_views(values, 2, "max")[1, 0].isnan()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"views_from": "("}, "views_from: wanted none, 'pages' or a regular expression"),
        ({"views_from": "pages", "roi": "each"}, "roi: wanted one mask for all images with views_from"),
        ({"view_names": ("a", "b")}, "view_names: wanted none without views_from"),
        ({"views_from": "pages", "view_names": ("1", "1")}, "view_names: wanted no views, or at least two different"),
        ({"view_map": "sum"}, "view_map: wanted one of 'max', 'mean', got 'sum'"),
    ],
)
def test_recipes_are_checked(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Recipe(**changes)
    assert "views_from" not in Recipe().to_dict()  # digests of other detectors do not change


@pytest.mark.parametrize("big", [False, True], ids=["TIFF", "BigTIFF"])
def test_a_directory_at_the_end_of_the_file_counts(big):
    """Three directories of one tag each, one after the other; the last one ends with the file."""
    count, entry, word, size, first = ("<Q", "<HHQQ", "<Q", 36, 16) if big else ("<H", "<HHLL", "<L", 18, 8)
    content = b"II+\0\x08\0\0\0" + struct.pack("<Q", first) if big else b"II*\0" + struct.pack("<L", first)
    for page in range(1, 4):
        content += struct.pack(count, 1) + struct.pack(entry, 256, 4, 1, 7)
        content += struct.pack(word, first + page * size if page < 3 else 0)
    assert len(content) == first + 3 * size
    assert count_pages(BytesIO(content)) == 3
    assert read_tags(BytesIO(content), 2).width == 7 and read_tags(BytesIO(content), 1).pages == 2
    content = content[: first + 2 * size]  # the last one is missing
    with pytest.raises((ValueError, struct.error)):
        count_pages(BytesIO(content))
