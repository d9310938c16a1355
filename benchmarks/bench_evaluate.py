"""Pixel metrics compared with the reference, scikit-learn, torchmetrics with anomalib's AUPRO, and ADEval.

Only the metrics are timed; the maps are synthetic. The name of each implementation lists what it computes. Ours gives
AUROC, AP, F1-max, AUPRO and per-image AUPRO together, the others fewer. ``-k 10-`` selects 10 images instead of 100,
since the reference takes about half a second per image. Memory is measured in a child process that runs this file.
"""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

IMAGES, SIZE = (10, 100), 256
CATEGORIES, EACH, BATCH = 15, 115, 16  # 1,725 images, the size of MVTec AD's test set
HIGH = 2.0  # largest value of a map that is a mean of cosine distances


def cases(images):
    """Return smooth float32 maps with slightly raised defects, and masks: a quarter of the images good, 3 % defects."""
    rng = np.random.default_rng(0)
    noise = rng.random((2, images, SIZE, SIZE), dtype=np.float32)
    blobs = gaussian_filter(noise[0], (0, 8, 8))
    masks = blobs > np.quantile(blobs, 0.96)
    masks[::4] = False
    maps = gaussian_filter(noise[1], (0, 4, 4)) + 0.03 * gaussian_filter(masks.astype(np.float32), (0, 4, 4))
    return (20 * (maps - maps.min()) ** 2 + 0.02).astype(np.float32), masks


def reference(maps, masks):
    """Compute the metrics as `evaluation` in upstream's utils.py: lists of pixels, and AUPRO image by image."""
    import upstream
    from sklearn.metrics import roc_auc_score

    truth, scores, aupro = [], [], []
    for amap, mask in zip(maps, masks.astype(int), strict=True):
        if mask.any():
            aupro.append(upstream.compute_pro(mask, amap))
        truth.extend(mask.ravel())
        scores.extend(amap.ravel())
    return {"auroc": roc_auc_score(truth, scores), "aupro_per_image": np.mean(aupro)}


def scikit_learn(maps, masks):
    """Compute AUROC and AP with scikit-learn."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    truth, scores = masks.ravel(), maps.ravel()
    return {"auroc": roc_auc_score(truth, scores), "ap": average_precision_score(truth, scores)}


def torchmetrics_and_anomalib(maps, masks):
    """Compute the exact AUROC of torchmetrics and AUPRO in anomalib's form."""
    from torchmetrics.functional.classification import binary_auroc

    scores, truth = torch.from_numpy(maps), torch.from_numpy(masks)
    auroc = binary_auroc(scores.flatten(), truth.flatten().int(), validate_args=False)
    return {"auroc": float(auroc), "aupro": anomalib_aupro(scores, truth)}


def anomalib_aupro(scores, truth, limit=0.3):
    """Compute AUPRO as anomalib's `AUPRO` (2.3), restated: one sort of all pixels, positives weighted by 1 / area."""
    import cv2

    labels, regions = [], 0
    for mask in truth.numpy().astype(np.uint8):
        label = torch.from_numpy(cv2.connectedComponents(mask)[1])
        label[label > 0] += regions
        regions += len(label.unique()) - 1
        labels.append(label)
    label = torch.stack(labels).flatten().long()
    weight = 1 / torch.bincount(label).double()
    weight[0] = 0
    order = scores.flatten().argsort(descending=True)
    ranked, label = scores.flatten()[order], label[order]
    last = torch.cat([ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool)])
    x, y = ((label == 0).cumsum(0)[last] / (label == 0).sum()).double(), weight[label].cumsum(0)[last] / regions
    x, y = torch.cat([torch.zeros(1), x]), torch.cat([torch.zeros(1), y])
    k = int((x <= limit).sum())
    at = y[k - 1] + (y[k] - y[k - 1]) * (limit - x[k - 1]) / (x[k] - x[k - 1])
    x, y = torch.cat([x[:k], torch.tensor([limit])]), torch.cat([y[:k], at[None]])
    return float(torch.trapezoid(y, x) / limit)


def adeval(maps, masks):
    """Compute AUROC, AUPR and AUPRO with ADEval in 1000 strips."""
    import adeval

    if not hasattr(np, "trapz"):  # ADEval 1.1.0 calls np.trapz, which NumPy 2.4 removed
        np.trapz = np.trapezoid
    accumulator = adeval.EvalAccumulator(0.0, HIGH, float(maps.min()), float(maps.max()))
    accumulator.add_anomap_batch(maps, masks.astype(np.uint8))
    for add in (accumulator.add_image, accumulator.add_sample):
        add([0.0, 1.0], [0, 1])  # its summary needs image scores
    with np.errstate(invalid="ignore"):
        summary = accumulator.summary()
    return {"auroc": summary["p_auroc"], "aupro": summary["p_aupro"]}


def exact(maps, masks):
    """Compute AUROC, AP, F1-max, AUPRO and AUPRO per image."""
    from recontrast import metrics

    return vars(metrics.pixel_metrics(maps, masks))


def streaming(maps, masks):
    """Compute the same metrics in batches, with bounds."""
    from recontrast import metrics

    accumulator = metrics.Streaming(HIGH)
    for first in range(0, len(maps), BATCH):
        accumulator.update(maps[first : first + BATCH], masks[first : first + BATCH])
    return vars(accumulator.compute())


RIVALS = {
    "reference: AUROC, AUPRO per image": reference,
    "scikit-learn: AUROC, AP": scikit_learn,
    "torchmetrics AUROC, anomalib AUPRO": torchmetrics_and_anomalib,
    "ADEval: AUROC, AUPR, AUPRO binned": adeval,
    "ours, exact: all": exact,
    "ours, streaming: all": streaming,
}
# Absolute tolerances; torchmetrics sums in float32.
WITHIN = {
    adeval: 5e-3,
    scikit_learn: 1e-9,
    torchmetrics_and_anomalib: 1e-4,
    reference: 1e-9,
}


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("images", IMAGES)
def test_pixel_metrics(benchmark, rival, images):
    """Time the pixel metrics and compare their values with ours."""
    benchmark.group = f"pixel metrics of {images} maps, {SIZE} px, cpu"
    maps, masks = cases(images)
    way, expected = RIVALS[rival], exact(maps, masks)
    rounds = {reference: 1, scikit_learn: 2, torchmetrics_and_anomalib: 3, adeval: 5}.get(way, 15)
    values = benchmark.pedantic(way, (maps, masks), rounds=rounds, warmup_rounds=int(rounds > 2), iterations=1)
    for name, value in values.items():
        if way is streaming and isinstance(value, tuple):
            assert abs(value[0] - expected[name]) <= value[1] + 1e-12, name
        elif way is not streaming:
            assert value == pytest.approx(expected[name], abs=WITHIN.get(way, 0)), name


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("images", IMAGES)
def test_memory(benchmark, rival, images):
    """Measure the memory beyond maps and masks; the time is that of the whole child process."""
    benchmark.group = f"memory of a process: pixel metrics of {images} maps, {SIZE} px, cpu"
    memory = benchmark.pedantic(child, (rival, images), rounds=1, iterations=1)
    benchmark.extra_info.update({"peak MB": memory["peak"], "MB beyond input": memory["beyond"]})


def categories(way, count, maps, masks):
    """Return the metrics of ``count`` images in 15 categories, one category after the other."""
    from recontrast import metrics

    rows, left, accumulator = [], count, metrics.Streaming(HIGH) if way == "streaming" else None
    for category in range(CATEGORIES):
        images = min(EACH, left)
        left -= images
        part_maps, part_masks = maps[category : category + images], masks[category : category + images]
        if accumulator is None:
            rows += [exact(part_maps, part_masks)] if images else []
        elif images:
            accumulator.reset()
            for first in range(0, images, BATCH):
                accumulator.update(part_maps[first : first + BATCH], part_masks[first : first + BATCH])
            rows.append(vars(accumulator.compute()))
    return rows


@pytest.mark.parametrize("way", ["exact", "streaming"])
def test_categories(benchmark, way):
    """Time the metrics of 1,725 maps in 15 categories, and compare the memory with that of 100 maps."""
    benchmark.group = f"pixel metrics of {CATEGORIES * EACH} maps in {CATEGORIES} categories, {SIZE} px, cpu"
    maps, masks = cases(EACH + CATEGORIES)
    rows = benchmark.pedantic(categories, (way, CATEGORIES * EACH, maps, masks), rounds=3, iterations=1)
    many, few = child(way, CATEGORIES * EACH), child(way, 100)
    benchmark.extra_info.update({"peak MB": many["peak"], "peak MB of 100 maps": few["peak"]})
    if way == "streaming":
        expected = categories("exact", CATEGORIES * EACH, maps, masks)
        names = ("auroc", "ap", "f1_max", "aupro")
        bounds = {name: max(row[name].bound for row in rows) for name in names}
        benchmark.extra_info.update({f"largest bound of {name}": f"{bound:.1e}" for name, bound in bounds.items()})
        for ours, theirs in zip(rows, expected, strict=True):
            for name in names:
                assert abs(ours[name].value - theirs[name]) <= ours[name].bound + 1e-12, name


def child(way, images):
    """Run one implementation in a child process and return its peak memory in MB, total and beyond maps and masks."""
    command = [sys.executable, __file__, way, str(images)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def resident(name):
    """Return a memory figure of this process from /proc, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def main(way, images):
    """Run the child process: import and warm up on small maps, then measure."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    small = tuple(np.ascontiguousarray(x[:3, :64, :64]) for x in cases(8))
    small[1][0, 9:20, 9:20] = True
    RIVALS.get(way, exact)(*small)
    many = way in ("exact", "streaming")
    maps, masks = cases(EACH + CATEGORIES if many else images)
    ctypes.CDLL(None).malloc_trim(0)  # return memory left from making the maps
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident("VmRSS")
    if many:
        categories(way, images, maps, masks)
    else:
        RIVALS[way](maps, masks)
    peak = resident("VmHWM")
    print(json.dumps({"peak": round(peak), "beyond": round(peak - before)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
