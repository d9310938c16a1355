"""recontrast.data.near_copies: pictures that were saved again, and photographs that only look alike."""

import numpy as np
import pytest
from near_copies import AGAIN, draw, save_again

from recontrast.data.images import fit_picture
from recontrast.data.near_copies import (
    MOST_SKETCHES,
    describe_near_copies,
    describe_one_scene,
    describe_trained,
    encode_sketches,
    find_near_copies,
    match_known,
    merge_copies,
    read_sketches,
    shows_one_scene,
    sketch_image,
    sketch_views,
)


def sketch(pictures):
    return np.stack([sketch_image(fit_picture(picture, size=64)) for picture in pictures])


@pytest.mark.parametrize("again", AGAIN)
@pytest.mark.parametrize("scene", [0.0, 30.0])
def test_pictures_saved_again_are_found(again, scene):
    rng = np.random.default_rng(2)
    pictures = [draw(rng, scene=scene, noise=2) for _ in range(16)]
    assert find_near_copies(sketch(pictures)) == []
    copies = [AGAIN[again](pictures[3]), AGAIN[again](pictures[5])]
    assert find_near_copies(sketch(pictures + copies)) == [(3, 16), (5, 17)]


def test_every_picture_several_times():
    rng = np.random.default_rng(3)
    pictures = [draw(rng, noise=2) for _ in range(12)]
    versions = list(AGAIN.values())[:3]
    pairs = find_near_copies(sketch(pictures + [again(picture) for again in versions for picture in pictures]))
    groups = merge_copies(range(48), pairs)
    assert groups == [index % 12 for index in range(48)]


@pytest.mark.parametrize("count", [2, 3, 5, 9, 20])
@pytest.mark.parametrize("shift", [0, 2])
def test_photographs_of_parts_in_a_fixed_position_are_different(count, shift):
    rng = np.random.default_rng(4)
    sketches = sketch([draw(rng, scene=60.0, noise=2, shift=shift) for _ in range(count)])
    nearest = (sketches @ sketches.T - 2 * np.eye(count)).max(1)
    assert np.median(nearest) > 0.9 or shift  # their correlation alone would not tell them from near-copies
    assert find_near_copies(sketches) == [] and not shows_one_scene(sketches)


@pytest.mark.parametrize("count", [2, 3, 6, 12])
def test_kinds_of_parts_in_fixed_positions_are_different(count):
    """Each camera or kind of part shows a scene of its own, of which there are a few photographs."""
    rng = np.random.default_rng(5)
    pictures = []
    for _ in range(3):
        scene = np.asarray(draw(rng, noise=0), np.float64)
        own = [np.kron(rng.normal(0, 3, (32, 32, 1)), np.ones((4, 4, 1))) for _ in range(count)]
        pictures += [np.uint8((scene + texture).clip(0, 255)) for texture in own]
    sketches = np.stack([sketch_image(picture) for picture in pictures])
    assert 0.965 < sketches[0] @ sketches[1] < 0.998
    assert find_near_copies(sketches) == []


def test_one_picture_saved_many_times():
    picture = draw(np.random.default_rng(6), noise=2).resize((512, 512))
    sketches = sketch([save_again(picture, quality=quality) for quality in range(76, 95)])
    assert shows_one_scene(sketches)
    assert describe_one_scene(19, sketches).startswith("all 19 images show the same without any change")
    assert describe_one_scene(1, sketches[:1]) is None


def test_the_same_pixels_are_a_copy():
    rng = np.random.default_rng(7)
    sketches = sketch([draw(rng) for _ in range(9)])
    assert find_near_copies(np.concatenate([sketches, sketches[[4] * 9]])) == [(4, index) for index in range(9, 18)]


def test_flat_images_are_not_compared():
    flat = np.stack([sketch_image(np.full((32, 40, 3), level, np.uint8)) for level in range(9)])
    assert not flat.any() and find_near_copies(flat) == [] and not shows_one_scene(flat)


def test_parts_are_near_copies_only_if_all_views_are():
    """One view may show the same in two parts, and lights from opposite sides give views that cancel each other."""
    random = np.random.default_rng(0)
    empty = random.integers(0, 255, (64, 64, 3), dtype=np.uint8)
    parts = []
    for _ in range(40):
        relief = random.normal(0, 30, (64, 64, 1)).repeat(3, 2)
        parts.append([(128 + sign * relief).clip(0, 255).astype(np.uint8) for sign in (1, -1)])
    for position in (3, 8):
        parts[position][0] = empty
    again = [(0.95 * view.astype(float)).round().astype(np.uint8) for view in parts[20]]
    sketches = np.stack([sketch_views(list(map(sketch_image, views))) for views in [*parts, again]])
    np.testing.assert_allclose(np.linalg.norm(sketches, axis=1), 1, rtol=1e-5)
    assert find_near_copies(sketches) == [(20, 40)]
    assert find_near_copies(np.stack([sketch_image(views[0]) for views in parts])) == [(3, 8)]
    single = sketch_image(parts[0][0])
    assert sketch_views([single]) is single and not sketch_views([0 * single, 0 * single]).any()


def test_near_copies_of_a_known_set():
    rng = np.random.default_rng(8)
    pictures = [draw(rng) for _ in range(20)]
    known = read_sketches({"sketches": encode_sketches(list(sketch(pictures[:12])))})
    new = sketch([*pictures[12:], save_again(pictures[7]), pictures[2]])
    assert match_known(new, known) == [(8, 7), (9, 2)]
    assert match_known(new, known[:0]) == [] and match_known(new[:0], known) == []


def test_sketches_in_checkpoints():
    sketches = sketch([draw(np.random.default_rng(9)) for _ in range(3)])
    stored = read_sketches({"sketches": encode_sketches(list(sketches))})
    assert stored.dtype == np.float32 and np.abs(stored - sketches).max() < 1e-3
    for text in ("", "no base64!", "AAAA", encode_sketches([np.full(1024, np.nan, np.float32)]), 3):
        assert read_sketches({"sketches": text}).shape == (0, 1024)
    assert read_sketches({}).shape == (0, 1024)
    assert encode_sketches([sketches[0]] * (MOST_SKETCHES + 1)) == ""
    assert find_near_copies(np.zeros((MOST_SKETCHES + 1, 1024), np.float32)) == []


def test_groups_are_merged():
    assert merge_copies([0, 1, 2, 1, 4, 5], [(0, 3), (2, 5)]) == [0, 0, 2, 0, 4, 2]
    assert merge_copies([0, 1], []) == [0, 1]


def test_sentences():
    names = [f"{index}.png" for index in range(14)]
    assert describe_near_copies(names, [(3, 12), (5, 13)], "they count") == (
        "2 of 14 images seem to be another one of them, saved again or rescaled (for example 12.png and 3.png): they "
        "count"
    )
    assert describe_near_copies(names, [], "they count") is None and describe_trained([], 3) is None
    assert describe_trained(["a", "b", "c"], 9) == (
        "3 of 9 images seem to be training images, saved again or rescaled: a, b ..."
    )
