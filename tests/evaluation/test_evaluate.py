import csv
import io
import json
import re
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import upstream
from near_copies import draw, save_again
from small_run import RECIPE as SMALL
from tiny import tiny_set

from recontrast import metrics
from recontrast.data.cache import ImageCache
from recontrast.data.datasets import Sample
from recontrast.data.fingerprint import compute_fingerprint, read_fingerprints
from recontrast.data.images import normalise, read_image, read_mask
from recontrast.data.listing import DataWarning
from recontrast.data.near_copies import read_sketches
from recontrast.evaluation.evaluate import evaluate
from recontrast.evaluation.results import METRICS, Result, Row
from recontrast.inference.infer import infer, max_map_value
from recontrast.runtime.clock import Clock
from recontrast.training import train as training

RECIPE = SMALL.replace(size=64)
PIXEL = [name for name in METRICS if name.startswith(("p_", "aupro"))]
IMAGE = [name for name in METRICS if name.startswith("i_")]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return tiny_set(tmp_path_factory.mktemp("data"), train=4, good=5, defects=4)


@pytest.fixture(scope="module")
def model(samples):
    return training.train(RECIPE.replace(steps=20), samples, device="cpu").model


def held_out(samples):
    return [sample for sample in samples if sample.split == "test"]


def values(row, names=tuple(METRICS)):
    return {name: getattr(row, name) for name in names}


# ---- infer -----------------------------------------------------------------------


def test_infer_does_not_depend_on_the_batch(model, samples):
    images = ImageCache(held_out(samples), 64)
    whole = [torch.cat(parts) for parts in zip(*infer(model, images, RECIPE, batch=100), strict=True)]
    assert [tuple(part.shape) for part in whole] == [(9, 64, 64), (9,)]
    assert all(part.dtype == torch.float32 for part in whole)
    for batch in (1, 4, 9):
        parts = [torch.cat(parts) for parts in zip(*infer(model, images, RECIPE, batch=batch), strict=True)]
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_infer_accepts_arrays_and_no_images(model, samples):
    images = ImageCache(held_out(samples), 64)
    (maps, scores), (again, _) = next(infer(model, images, RECIPE)), next(infer(model, images[:], RECIPE))
    assert torch.equal(maps, again)
    assert torch.equal(scores, maps.amax((1, 2)))
    assert list(infer(model, images[:0], RECIPE)) == []


@pytest.mark.parametrize("score", ["mean", 0.01])
def test_infer_follows_the_score_rule_of_the_recipe(model, samples, score):
    maps, scores = next(infer(model, ImageCache(held_out(samples), 64), RECIPE.replace(score=score)))
    expected = maps.mean((1, 2)) if score == "mean" else maps.flatten(1).topk(40).values.mean(1)
    torch.testing.assert_close(scores, expected)


def test_infer_restores_the_training_mode(model, samples):
    images = ImageCache(held_out(samples), 64)
    model.train()
    running = infer(model, images, RECIPE, batch=4)
    next(running)
    assert not torch.is_inference_mode_enabled()
    assert not model.training
    running.close()
    assert model.training
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    list(infer(model, images, RECIPE))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_infer_bfloat16_gives_float32_maps(model, samples):
    images = ImageCache(held_out(samples), 64)
    exact, (maps, scores) = (next(infer(model, images, RECIPE.replace(precision=p))) for p in ("float32", "bfloat16"))
    assert maps.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(maps, exact[0], rtol=0.1, atol=0.05)


# ---- evaluate ----------------------------------------------------------------------


def test_metrics_equal_those_of_the_maps(model, samples):
    tests = held_out(samples)
    maps, scores = next(infer(model, ImageCache(tests, 64), RECIPE))
    masks = np.stack([read_mask(s.mask, size=64) if s.mask else np.zeros((64, 64), bool) for s in tests])
    labels = [s.label for s in tests]
    pixel, image = metrics.pixel_metrics(maps, masks), metrics.image_metrics(scores, labels)
    result = evaluate(model, samples, RECIPE)
    (row,) = result.rows
    assert (row.category, row.images, row.defects, row.note) == ("nut", 9, 4, "")
    assert values(row, IMAGE) == {
        "i_auroc": image.auroc,
        "i_ap": image.ap,
        "i_f1": image.f1_max,
        "i_accuracy": image.accuracy,
    }
    assert values(row, PIXEL) == {
        "p_auroc": pixel.auroc,
        "p_ap": pixel.ap,
        "p_f1": pixel.f1_max,
        "aupro": pixel.aupro,
        "aupro_per_image": pixel.aupro_per_image,
    }
    assert (row.i_threshold, row.p_threshold) == (image.f1_threshold, pixel.f1_threshold)
    assert set(row.seconds) == {"loading", "forward", "maps", "metrics"}
    assert all(value >= 0 for value in row.seconds.values())
    assert row.seconds["forward"] > 0
    assert row.p_auroc > 0.6  # the squares are bright


def test_equals_the_reference(model, samples):
    """The reference has batches of 1, interpolation and SciPy; here there are large batches and two matrix products."""
    tests = held_out(samples)
    images = normalise(ImageCache(tests, 64)[:], model.mean, model.std)
    masks = [read_mask(s.mask, size=64) if s.mask else np.zeros((64, 64), bool) for s in tests]
    masks = torch.from_numpy(np.stack(masks))[:, None]
    p_auroc, i_auroc, aupro = upstream.evaluate(model.eval(), images, masks, [s.label for s in tests])
    (row,) = evaluate(model, samples, RECIPE).rows
    assert row.p_auroc == pytest.approx(p_auroc, abs=1e-4)
    assert row.i_auroc == pytest.approx(i_auroc, abs=1e-6)
    assert row.aupro_per_image == pytest.approx(aupro, abs=2e-3)  # a threshold is a 200th of the map's range


def test_pixels_of_good_images_count_as_good(model, samples):
    """The mask of a good image is all zeros, so its pixels change the pixel metrics."""
    without = [s for s in samples if not (s.split == "test" and s.label == 0)]
    row, fewer = (evaluate(model, group, RECIPE).rows[0] for group in (samples, without))
    assert fewer.note == "no image metrics: there are no good images"
    assert values(fewer, IMAGE) == dict.fromkeys(IMAGE)
    assert fewer.p_auroc is not None
    assert fewer.p_auroc != row.p_auroc


def test_no_pixel_metrics_without_masks(model, samples):
    maskless = [replace(sample, mask=None) for sample in samples]
    row, full = (evaluate(model, group, RECIPE).rows[0] for group in (maskless, samples))
    assert values(row, IMAGE) == values(full, IMAGE)
    assert values(row, PIXEL) == dict.fromkeys(PIXEL)
    assert row.note == "no pixel metrics: 4 of 4 defective images have no mask"
    partly_masked = [replace(s, mask=None) if s.label and s.path.stem == "000" else s for s in samples]
    assert evaluate(model, partly_masked, RECIPE).rows[0].note.endswith(": 1 of 4 defective images have no mask")


def test_no_metrics_without_defective_images(model, samples):
    good = [sample for sample in samples if not sample.label]
    (row,) = evaluate(model, good, RECIPE).rows
    assert values(row) == dict.fromkeys(METRICS)
    assert row.note == "no image metrics: there are no defective images"


def test_no_pixel_metrics_if_all_mask_pixels_are_equal(model, samples, tmp_path):
    from PIL import Image

    Image.new("L", (64, 64)).save(tmp_path / "black.png")
    black = [replace(s, mask=tmp_path / "black.png") if s.mask else s for s in samples]
    with pytest.warns(DataWarning, match=r"^mask marks no pixel of an image with a defect: .*black\.png"):
        (row,) = evaluate(model, black, RECIPE).rows
    assert row.note == "no pixel metrics: all mask pixels have the same value"
    assert row.i_auroc is not None


def test_mask_rule_changes_pixel_metrics(model, tmp_path):
    """The rule decides about grey mask pixels, which resizing creates."""
    tests = tiny_set(tmp_path, train=1)
    rows = [evaluate(model, tests, RECIPE.replace(size=32, mask_rule=rule)).rows[0] for rule in ("any", "half")]
    assert rows[0].p_ap != rows[1].p_ap


def test_several_categories_and_their_mean(model, samples, tmp_path):
    bolts = [replace(s, mask=None) for s in tiny_set(tmp_path, "bolt", train=1, good=2, defects=3, seed=5)]
    progress = []
    result = evaluate(
        model, {"nut": samples, "bolt": bolts}, RECIPE, batch=4, on_progress=lambda *a: progress.append(a)
    )
    assert [row.category for row in result.rows] == ["nut", "bolt"]
    assert values(result.rows[0]) == pytest.approx(
        values(evaluate(model, [*bolts, *samples], RECIPE).rows[1]), rel=1e-4
    )
    # The third batch of 4 spans both categories.
    assert progress == [("nut", 4, 9), ("nut", 8, 9), ("nut", 9, 9), ("bolt", 3, 5), ("bolt", 5, 5)]
    mean = result.mean
    assert (mean.images, mean.defects) == (14, 7)
    assert mean.i_auroc == pytest.approx((result.rows[0].i_auroc + result.rows[1].i_auroc) / 2)
    assert mean.p_auroc == result.rows[0].p_auroc
    assert mean.note.startswith("not over all categories: P-AUROC, ")
    assert mean.seconds["forward"] == pytest.approx(sum(row.seconds["forward"] for row in result.rows))


def test_cache_does_not_change_metrics(model, samples, tmp_path):
    rows = [evaluate(model, samples, RECIPE, cache_dir=d, workers=2).rows[0] for d in (None, tmp_path, tmp_path)]
    assert values(rows[0]) == values(rows[1]) == values(rows[2])
    assert len(list(tmp_path.iterdir())) == 1


def test_invalid_arguments_are_refused(model, samples, tmp_path):
    with pytest.raises(ValueError, match="wanted test images, got none among 4 samples"):
        evaluate(model, [s for s in samples if s.split == "train"], RECIPE)
    with pytest.raises(ValueError, match="batch: wanted at least 1, got 0"):
        evaluate(model, samples, RECIPE, batch=0)
    with pytest.raises(ValueError, match=r"multiples of it .*, got 100x100"):
        evaluate(model, samples, RECIPE.replace(size=100))
    broken = tmp_path / "broken.png"
    broken.write_bytes(held_out(samples)[0].path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"broken\.png"):
        evaluate(model, [*samples, replace(held_out(samples)[0], path=broken)], RECIPE)
    masked = next(s for s in samples if s.mask)
    with pytest.raises(ValueError, match=r"broken\.png"):
        evaluate(model, [*samples, replace(masked, mask=broken)], RECIPE)


def test_scores_of_each_image(model, samples, tmp_path):
    result = evaluate(model, samples, RECIPE)
    tests = held_out(samples)
    assert [(s.path, s.label, s.defect) for s in result.scored] == [(str(s.path), s.label, s.defect) for s in tests]
    _, scores = next(infer(model, ImageCache(tests, 64), RECIPE))
    assert [s.score for s in result.scored] == scores.tolist()
    result.write(tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "scores.csv").read_text())))
    assert [row["path"] for row in rows] == [str(s.path) for s in tests]
    assert [float(row["score"]) for row in rows] == pytest.approx(scores.tolist(), rel=1e-7)


def test_streamed_metrics_are_within_their_bounds(model, samples, tmp_path):
    bolts = tiny_set(tmp_path, "bolt", train=1, good=2, defects=3, seed=5)
    for reduce in ("sum", "mean"):
        recipe = RECIPE.replace(reduce=reduce)
        exact, streamed = (evaluate(model, [*samples, *bolts], recipe, batch=4, streaming=s) for s in (False, True))
        for exact_row, streamed_row in zip(exact.rows, streamed.rows, strict=True):
            assert exact_row.bounds == {} and set(streamed_row.bounds) == {"p_auroc", "p_ap", "p_f1", "aupro"}
            for name, bound in streamed_row.bounds.items():
                assert abs(getattr(exact_row, name) - getattr(streamed_row, name)) <= bound + 1e-12
                assert bound < 1e-2
            assert values(exact_row, IMAGE) == values(streamed_row, IMAGE)
            assert exact_row.aupro_per_image == pytest.approx(streamed_row.aupro_per_image, abs=1e-12)
    assert "P-AUROC: from histograms, within " in streamed.to_markdown()


def test_streaming_without_masks(model, samples):
    maskless = [replace(sample, mask=None) for sample in samples]
    assert evaluate(model, maskless, RECIPE, streaming=True).rows[0].note.startswith("no pixel metrics")


def test_maps_above_the_memory_limit_are_kept_in_a_file(model, samples, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shapes = []
    memmap = np.memmap
    monkeypatch.setattr(np, "memmap", lambda *a, **k: shapes.append(k["shape"]) or memmap(*a, **k))
    in_memory, in_file = (evaluate(model, samples, RECIPE, memory=m).rows[0] for m in (10**9, 9 * 64 * 64 * 4 - 1))
    assert shapes == [(9, 64, 64)]
    assert values(in_memory) == values(in_file)
    assert not list(tmp_path.iterdir())


def test_on_maps_gets_every_map(model, samples):
    tests, batches = held_out(samples), []
    evaluate(model, samples, RECIPE, batch=4, on_maps=lambda *piece: batches.append(piece))
    assert [sample for batch_samples, _ in batches for sample in batch_samples] == tests
    all_maps, _ = next(infer(model, ImageCache(tests, 64), RECIPE))
    np.testing.assert_allclose(np.concatenate([maps for _, maps in batches]), all_maps.numpy(), rtol=1e-4, atol=1e-6)


def test_largest_value_of_a_map(model):
    assert max_map_value(model, RECIPE) == 12 and max_map_value(model, RECIPE.replace(reduce="mean")) == 2
    assert max_map_value(model, RECIPE.replace(views="trained")) == 6


def test_clock_sums_seconds_by_name():
    clock = Clock(torch.device("cpu"))
    clock.marks = [("start", 0.0), ("a", 1.0), ("b", 3.0), ("a", 7.0)]
    assert clock.seconds() == {"a": 5.0, "b": 2.0}


# ---- tables ------------------------------------------------------------------------


ROWS = [
    Row("a", 10, 4, i_auroc=1.0, i_ap=0.5, p_auroc=0.9, aupro=0.25, seconds={"forward": 1.5, "maps": 0.5}),
    Row("b", 20, 6, i_auroc=0.5, i_ap=0.5, seconds={"forward": 0.5}, note="no pixel metrics"),
]
RESULT = Result(ROWS, "mvtec", (64, 32), "max", "reflect", "sum", "any")


def test_markdown():
    lines = RESULT.to_markdown().splitlines()
    assert lines[0] == "| category | images | I-AUROC | I-AP | P-AUROC | AUPRO | seconds |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| a | 10 | 100.00 | 50.00 | 90.00 | 25.00 | 2.0 |"
    assert lines[3] == "| b | 20 | 50.00 | 50.00 | - | - | 0.5 |"
    assert lines[4] == "| mean | 30 | 75.00 | 50.00 | 90.00 | 25.00 | 2.5 |"
    assert "Maps of 64 x 32 px" in lines[6]
    assert "mask rule any" in lines[6]
    assert lines[7:] == ["b: no pixel metrics.", "mean: not over all categories: P-AUROC, AUPRO."]


def test_csv():
    rows = list(csv.DictReader(io.StringIO(RESULT.to_csv())))
    assert [row["category"] for row in rows] == ["a", "b", "mean"]
    assert [row["p_auroc"] for row in rows] == ["0.9", "", "0.9"]
    assert [row["seconds_maps"] for row in rows] == ["0.5", "", "0.5"]


def test_written_files(tmp_path):
    paths = RESULT.write(tmp_path / "new")
    names = ["results.csv", "results.json", "results.md", "scores.csv"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    written = json.loads(paths[0].read_text())
    assert written == json.loads(json.dumps(RESULT.to_dict()))
    assert written["mean"]["i_auroc"] == 0.75
    assert written["rows"][1]["aupro"] is None
    assert written["mask_rule"] == "any"
    with pytest.raises(OSError, match=r"^cannot write .*results\.json: (Not a directory|File exists)$"):
        RESULT.write(paths[0])


def test_test_images_that_were_trained_on_are_named(model, samples, tmp_path):
    tests = [sample for sample in samples if sample.split == "test"]
    trained = {compute_fingerprint(read_image(tests[index].path, size=RECIPE.size)) for index in (0, 2)}
    names = re.escape(f"{tests[0].path}, {tests[2].path}")
    for folder in (None, tmp_path):
        with pytest.warns(DataWarning, match=rf"^2 of {len(tests)} test images were trained on, .*: {names}$"):
            checked = evaluate(model, samples, RECIPE, trained=trained, cache_dir=folder)
    assert [image.score for image in checked.scored] == [
        image.score for image in evaluate(model, samples, RECIPE).scored
    ]


def test_test_images_that_were_trained_on_are_named_with_tiles(tmp_path):
    """A copy in another format, and a picture that was saved again, in a detector of tiles."""
    rng = np.random.default_rng(5)
    pictures = [draw(rng) for _ in range(16)]
    samples = []
    for index, picture in enumerate(pictures):
        split = "train" if index < 12 else "test"
        picture.save(tmp_path / f"{index:02}.png")
        samples.append(Sample(tmp_path / f"{index:02}.png", None, int(index > 13), "nut", split, "good"))
    pictures[3].save(tmp_path / "copy.bmp")
    save_again(pictures[7]).save(tmp_path / "again.png")
    samples += [Sample(tmp_path / name, None, 0, "nut", "test", "good") for name in ("copy.bmp", "again.png")]
    recipe = RECIPE.replace(size=64, tile=64, steps=1, batch=4, backbone="test_resnet", weights="random")
    trained = training.train(recipe, samples, device="cpu")
    known = {"trained": read_fingerprints(trained.state.images), "sketches": read_sketches(trained.state.images)}
    with pytest.warns(DataWarning) as caught:
        checked = evaluate(trained.model, samples, trained.recipe, **known)
    texts = [str(warning.message) for warning in caught]
    assert any(re.match(r"1 of 6 test images were trained on, .*copy\.bmp$", text) for text in texts), texts
    assert any("test: 1 of 6" in text and "again.png" in text for text in texts), texts
    plain = evaluate(trained.model, samples, trained.recipe)
    assert [image.score for image in checked.scored] == [image.score for image in plain.scored]


def test_category_without_test_images_stays_in_the_table(model, samples, tmp_path):
    untested = [s for s in tiny_set(tmp_path, "bolt", train=2, good=0, defects=0) if s.split == "train"]
    result = evaluate(model, [*untested, *samples], RECIPE)
    assert [(row.category, row.images) for row in result.rows] == [("bolt", 0), ("nut", 9)]
    assert result.rows[0].i_auroc is None and result.rows[0].note == "no metrics: there are no test images"
    assert result.rows[1].i_auroc == evaluate(model, samples, RECIPE).rows[0].i_auroc
    assert result.mean.i_auroc == result.rows[1].i_auroc
    assert "| bolt |" in str(result)
