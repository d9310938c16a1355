"""Detectors with a region of interest: scores, maps, metrics and decisions are those of the pixels inside alone."""

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from tiny import tiny_set

import recontrast
import recontrast.data.roi
import recontrast.inside
from recontrast import checkpoint as checkpoints
from recontrast import metrics
from recontrast.data.images import normalise, read_image, read_mask
from recontrast.data.roi import EACH, decode_mask
from recontrast.inference.infer import infer
from recontrast.inference.tiling import score_tiled_image
from recontrast.models.patchcore import PatchCore
from recontrast.recipes.recipe import Recipe
from recontrast.training.train import train

pytestmark = pytest.mark.filterwarnings("ignore:roi. the mask of")  # of another size than the images
FIELDS = {"backbone": "test_resnet", "weights": "random", "size": 64}


def draw_region(path, width=64, height=64):
    """Write a mask with an oblique border and a hole."""
    y, x = np.mgrid[:height, :width] / height
    mask = (x + 0.3 * y < 0.8) & ((x - 0.3) ** 2 + (y - 0.5) ** 2 > 0.01)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return mask


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("roi")
    tiny_set(root / "data", "nut", train=12, good=4, defects=4)
    tiny_set(root / "data", "bolt", train=12, good=4, defects=4, seed=5)
    draw_region(root / "nut.png")
    shapes = {
        "width": 128,
        "height": 128,
        "rectangles": [[10, 6, 90, 70]],
        "polygons": [[[20, 60], [120, 120], [8, 126]]],
    }
    (root / "bolt.json").write_text(str(shapes).replace("'", '"'))
    return root


@pytest.fixture(scope="module")
def detectors(data):
    """A bank for one category, and a network that is trained by steps for the other."""
    nut = recontrast.train(
        data / "data/nut", data / "nut", architecture="patchcore", holdout=0.4, roi=data / "nut.png", **FIELDS
    )
    bolt = recontrast.train(
        data / "data/bolt", data / "bolt", steps=3, batch=4, encoder_bn="eval", holdout=0.4, roi=data / "bolt.json",
        **FIELDS,
    )  # fmt: skip
    return {"nut": nut, "bolt": bolt}


def restate_maps(detector, pixels, inside):
    """Restate the maps in float64 from the network's distances: interpolation and blur of the points inside alone."""
    model = detector.model
    x = normalise(torch.from_numpy(pixels), model.mean, model.std)
    with torch.inference_mode():
        distances, _ = model.distances(x)

    def spread(values):
        values = F.interpolate(values[:, None], size=(64, 64), mode="bilinear", align_corners=model.align_corners)[:, 0]
        return np.stack([scipy.ndimage.gaussian_filter(v, 4) for v in values.numpy()])

    total = np.zeros((len(x), 64, 64))
    for d in distances:
        size = 64 // d.shape[1]
        cells = torch.from_numpy(inside.reshape(d.shape[1], size, d.shape[2], size).any(axis=(1, 3)).astype(float))
        total += spread(d.double() * cells) / np.maximum(spread(cells[None]), 1e-12)
    return np.where(inside, total, 0)


@pytest.mark.parametrize("category", ["nut", "bolt"])
def test_scores_and_metrics_equal_a_masked_restatement(category, data, detectors):
    detector = detectors[category]
    samples = [s for s in recontrast.find_samples(data / "data" / category) if s.split == "test"]
    pixels = np.stack([read_image(s.path, size=64) for s in samples])
    inside = decode_mask(detector.recipe.roi)
    if category == "bolt":
        inside = np.asarray(Image.fromarray(inside).resize((64, 64), Image.Resampling.NEAREST))
    maps = restate_maps(detector, pixels, inside)
    scores = np.array([m[inside].max() for m in maps])
    predictions = detector.predict([s.path for s in samples])
    ours = np.stack([p.anomaly_map for p in predictions])
    np.testing.assert_allclose(ours, maps, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(predictions.scores, scores, rtol=1e-4, atol=1e-5)
    assert not ours[:, ~inside].any()

    row = recontrast.evaluate(detector, data / "data" / category).rows[0]
    labels = np.array([s.label for s in samples])
    assert row.i_auroc == pytest.approx(roc_auc_score(labels, predictions.scores))
    masks = np.stack([
        np.zeros((64, 64), bool) if s.mask is None else read_mask(s.mask, size=64, image=s.path) for s in samples
    ])  # fmt: skip
    values, truth = ours[:, inside].ravel().astype(float), masks[:, inside].ravel()
    assert row.p_auroc == pytest.approx(roc_auc_score(truth, values))
    assert row.p_ap == pytest.approx(average_precision_score(truth, values))
    precision, recall, _ = precision_recall_curve(truth, values)
    assert row.p_f1 == pytest.approx((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max())
    assert row.aupro == pytest.approx(restate_aupro(ours, masks, inside, 0.3), abs=1e-9)


def restate_aupro(maps, masks, inside, limit):
    """Brute force: mean overlap of the regions inside at each threshold, over the false positive rate inside."""
    regions = []
    for n, mask in enumerate(masks):
        labels, count = scipy.ndimage.label(mask & inside, np.ones((3, 3)))
        regions += [maps[n][labels == number] for number in range(1, count + 1)]
    good = np.concatenate([m[inside & ~mask] for m, mask in zip(maps, masks, strict=True)])
    x, y = [0.0], [0.0]
    for threshold in np.unique(np.concatenate([good, *regions]))[::-1]:
        x.append((good >= threshold).mean())
        y.append(np.mean([(region >= threshold).mean() for region in regions]))
    x, y = np.array(x), np.array(y)
    stop = np.interp(limit, x, y)
    x, y = np.append(x[x < limit], limit), np.append(y[x < limit], stop)
    return np.trapezoid(y, x) / limit


@pytest.mark.parametrize("shape", [(3, 20, 24), (1, 40, 40)], ids=str)
def test_pixel_metrics_count_pixels_inside_alone(shape):
    rng = np.random.default_rng(3)
    maps = rng.random(shape).astype(np.float32).round(2)  # with equal values
    masks = scipy.ndimage.binary_dilation(rng.random(shape) < 0.01, np.ones((1, 3, 3)))
    for inside in (rng.random(shape) < 0.6, rng.random(shape[1:]) < 0.6):
        whole = np.broadcast_to(inside, shape)
        ours = metrics.pixel_metrics(maps, masks, [0.3, 1.0], inside=inside)
        values, truth = maps[whole].astype(float), masks[whole]
        assert ours.auroc == pytest.approx(roc_auc_score(truth, values))
        assert ours.ap == pytest.approx(average_precision_score(truth, values))
        regions = [scipy.ndimage.label(m & i, np.ones((3, 3)))[0] for m, i in zip(masks, whole, strict=True)]
        assert sum(r.max() for r in regions) > 3
        streaming = metrics.Streaming(1.0)
        for n in range(shape[0]):
            streaming.update(maps[n : n + 1], masks[n : n + 1], inside=whole[n : n + 1])
        streamed = streaming.compute()
        for name in ("auroc", "ap", "f1_max", "aupro"):
            estimate = getattr(streamed, name)
            assert abs(estimate.value - getattr(ours, name)) <= estimate.bound + 1e-12
        same = (streamed.aupro_per_image, ours.aupro_per_image)
        assert same[0] == pytest.approx(same[1], nan_ok=True)
    full = metrics.pixel_metrics(maps, masks, inside=np.ones(shape, bool))
    plain = metrics.pixel_metrics(maps, masks)
    assert (full.auroc, full.ap, full.f1_max, full.f1_threshold) == (
        plain.auroc,
        plain.ap,
        plain.f1_max,
        plain.f1_threshold,
    )
    assert full.aupro == pytest.approx(plain.aupro)
    assert full.aupro_per_image == pytest.approx(plain.aupro_per_image, nan_ok=True)
    with pytest.raises(ValueError, match=r"inside: wanted .*, got \(5,\)"):
        metrics.pixel_metrics(maps, masks, inside=np.ones(5, bool))


def test_defect_outside_changes_no_score_and_no_decision():
    """Beyond the receptive field of the points inside; what it reaches is stated in the guide."""
    torch.manual_seed(0)
    recipe = Recipe(architecture="patchcore", backbone="test_resnet", weights="random", size=(64, 256), levels=(1, 2))
    region = np.zeros((64, 256), bool)
    region[10:50, 5:60] = True
    recipe = recipe.replace(roi=recontrast.data.roi.encode_mask(region))
    model = PatchCore("test_resnet", weights="random", levels=(1, 2)).eval()
    rng = np.random.default_rng(0)
    good = rng.integers(90, 130, (8, 64, 256, 3)).astype(np.uint8)
    inside = torch.from_numpy(region)[None]
    model.observe(normalise(torch.from_numpy(good[:4]), model.mean, model.std), inside.expand(4, -1, -1))
    count = recontrast.inside.pool_inside(inside, model.map_sizes((64, 256))[0]).sum().item()
    assert len(model.build_bank(1.0)) == 4 * count  # points inside alone
    defective = good[4:].copy()
    defective[:, 20:40, 200:240] = 255
    (maps, scores), (other_maps, other_scores) = (
        [torch.cat(parts) for parts in zip(*infer(model, images, recipe), strict=True)]
        for images in (good[4:], defective)
    )
    assert torch.equal(maps, other_maps)
    assert torch.equal(scores, other_scores)
    assert scores.min() > 0
    defective[:, 20:30, 20:30] = 255
    changed = torch.cat([scores for _, scores in infer(model, defective, recipe)])
    assert (changed > scores).all()


def test_another_region_has_no_decisions(data, detectors):
    path = data / "nut/checkpoint.pt"
    assert detectors["nut"].calibration is not None
    other = np.ones((64, 64), bool)
    detector = recontrast.load(path, roi=other)
    assert detector.calibration is None
    assert "calibration is for another region of interest, " in detector.calibration_note
    assert "not 100 % of the image (64 x 64 px): no decisions are made" in detector.calibration_note
    assert detector.predict(data / "data/nut/test/good")[0].decision is None
    same = recontrast.load(path, roi=data / "nut.png")
    assert same.calibration == detectors["nut"].calibration
    whole = recontrast.load(path)
    assert whole.predict(data / "data/nut/test/good")[0].decision == "good"


@pytest.mark.parametrize("architecture", ["recontrast", "uniad", "dinomaly", "inp_former"])
def test_every_architecture_trains_in_a_region(architecture):
    """In one process, with other losses than those of the whole images."""
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    fields = FIELDS | {"roi": recontrast.data.roi.encode_mask(mask), "architecture": architecture}
    fields |= {"steps": 2, "batch": 4, "log_every": 1, "encoder_bn": "eval"}
    if architecture != "recontrast":
        fields |= {"backbone": "test_vit", "layers": ((1, 2), (3, 4))}
    recipe = Recipe(**fields)
    own, whole = (train(one, images, device="cpu").losses for one in (recipe, recipe.replace(roi=None)))
    assert np.isfinite([own, whole]).all() and own != whole


def test_calibration_counts_pixels_inside(data, detectors):
    """Its pixel threshold flags the promised share of the pixels inside, and not of the whole map."""
    detector = detectors["nut"]
    calibration = detector.calibration
    inside = decode_mask(detector.recipe.roi)
    held_out = calibration.count
    assert held_out == 5
    images = [s.path for s in recontrast.find_samples(data / "data/nut") if s.split == "train"]
    maps = np.stack([p.anomaly_map for p in detector.predict(images)])
    calibrated = [m[inside] for m in maps if any(np.isclose(m.max(), score) for score in calibration.scores)]
    flagged = np.mean(np.concatenate(calibrated) > calibration.pixel_threshold)
    assert 0.002 < flagged <= 0.0101


def test_image_of_another_shape_is_refused(data, detectors, tmp_path):
    Image.new("RGB", (64, 80)).save(tmp_path / "tall.png")
    Image.new("RGB", (128, 128)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"roi: wanted a mask of the size of .*tall.png, 64 x 80 px, or of its aspect"):
        detectors["nut"].predict(tmp_path / "tall.png")
    kept = detectors["nut"].predict([tmp_path / "tall.png", tmp_path / "large.png"], errors="keep")
    assert "tall.png" in kept[0].error
    assert kept[1].error is None


def test_masks_of_images(data, tmp_path):
    """A folder with a mask for each image; the same mask for all gives what one mask gives."""
    samples = recontrast.find_samples(data / "data/nut")
    mask = Image.open(data / "nut.png")
    for sample in samples:
        target = tmp_path / "masks" / sample.path.relative_to(data / "data/nut")
        target.parent.mkdir(parents=True, exist_ok=True)
        mask.save(target)
    options = {"architecture": "patchcore", "holdout": 0.4, **FIELDS}
    detector = recontrast.train(data / "data/nut", tmp_path / "each", roi=tmp_path / "masks", **options)
    assert detector.recipe.roi == EACH
    expected = recontrast.load(data / "nut")
    tests = [s.path for s in samples if s.split == "test"]
    ours, theirs = detector.predict(tests), expected.predict(tests)
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-6)
    assert [p.decision for p in ours] == [p.decision for p in theirs]
    rows = [recontrast.evaluate(d, data / "data/nut").rows[0] for d in (detector, expected)]
    assert rows[0].aupro == pytest.approx(rows[1].aupro)
    assert rows[0].p_auroc == pytest.approx(rows[1].p_auroc)
    with pytest.raises(
        ValueError, match=r"roi: wanted a mask for each image, as the detector was trained with, got none"
    ):
        recontrast.load(tmp_path / "each").predict(tests)
    (tmp_path / "masks/test/good/000.png").unlink()
    with pytest.raises(ValueError, match=r"masks: wanted a mask for each image, got none named 000 for .*000.png"):
        recontrast.load(tmp_path / "each", roi=tmp_path / "masks").predict(tests)


def test_tiles_outside_are_not_computed(monkeypatch):
    recipe = Recipe(architecture="patchcore", backbone="test_resnet", weights="random", tile=64, levels=(1,))
    torch.manual_seed(0)
    model = PatchCore("test_resnet", weights="random", levels=(1,)).eval()
    rng = np.random.default_rng(0)
    model.observe(
        normalise(torch.from_numpy(rng.integers(0, 255, (2, 64, 64, 3)).astype(np.uint8)), model.mean, model.std)
    )
    model.build_bank(0.5)
    pixels = rng.integers(0, 255, (200, 260, 3)).astype(np.uint8)
    region = np.zeros((200, 260), bool)
    region[20:60, 30:100] = True
    region[190:, 250:] = True
    seen = []
    distances = model.distances
    monkeypatch.setattr(model, "distances", lambda x, *args, **kw: seen.append(len(x)) or distances(x, *args, **kw))
    anomaly, score = score_tiled_image(model, pixels, recipe, overlap=0, inside=region)
    starts = [[*range(0, length - 64, 64), length - 64] for length in region.shape]
    wanted = sum(region[y : y + 64, x : x + 64].any() for y in starts[0] for x in starts[1])
    assert sum(seen) == wanted < len(starts[0]) * len(starts[1])
    assert not anomaly[~region].any()
    assert score == anomaly[region].max()
    encoded = recipe.replace(roi=recontrast.data.roi.encode_mask(region))
    assert score_tiled_image(model, pixels, encoded, overlap=0)[1] == score
    with pytest.raises(ValueError, match=r"roi: wanted a mask of the size of the image, 260 x 120 px"):
        score_tiled_image(model, pixels[:120], encoded, overlap=0)


def test_region_is_part_of_the_checkpoint(data, detectors):
    stored = checkpoints.load(data / "bolt/checkpoint.pt")
    assert np.array_equal(decode_mask(stored.recipe.roi), recontrast.data.roi.read_roi(data / "bolt.json"))
    plain = Recipe(**FIELDS)
    assert "roi" not in plain.to_dict()  # as in files of earlier versions
    weights = stored.model
    other = stored.recipe.replace(roi=None)
    assert checkpoints.digest(weights, stored.recipe) != checkpoints.digest(weights, other)
    with pytest.raises(ValueError, match=r"score: wanted 'max', 'mean' or a share with roi, got 'model'"):
        Recipe(architecture="patchcore", score="model", roi=stored.recipe.roi)
    with pytest.raises(
        ValueError, match=r"roi: wanted none, 'each' or a mask as recontrast.data.roi.encode_mask writes it"
    ):
        Recipe(roi="mask.png")
