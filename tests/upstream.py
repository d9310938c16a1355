"""Upstream's computations, rewritten from its formulas: the oracle of parity tests and a baseline of the benchmarks.

The sources are utils.py and recontrast_mvtec.py of ReContrast (https://github.com/guojiajeremy/ReContrast), and
utils.py of Dinomaly and of INP-Former; each function names its own. The order of operations, the dtypes and the quirks
are those of upstream, even where they are slow; the code is new. A model is any callable from images (N, 3, H, W) to a
list of 2L (teacher, student) pairs, L of one group and then L of the other.
"""

import collections
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from skimage import measure
from sklearn.metrics import auc, roc_auc_score

# ---- losses ----------------------------------------------------------------------------------------------------------


def point_distance(teacher, student):
    """Compute 1 - cosine over channels, (N, 1, H, W), without gradient."""
    with torch.no_grad():
        return 1 - torch.nn.CosineSimilarity()(teacher, student).unsqueeze(1)


def global_distance(teacher, student):
    """Compute the mean over images of 1 - cosine of the flattened maps."""
    return (1 - torch.nn.CosineSimilarity()(teacher.detach().flatten(1), student.flatten(1))).mean()


def modify_grad(gradient, easy, factor):
    """Multiply the gradient in place at the easy points: `modify_grad`, utils.py.

    The mask is expanded over the channels and used as a boolean index, which makes upstream slow.
    """
    gradient[easy.expand_as(gradient)] *= factor
    return gradient


def modify_grad_v2(gradient, weight):
    """Multiply the gradient in place by one weight per point: `modify_grad_v2`, utils.py of Dinomaly and INP-Former."""
    gradient *= weight.expand_as(gradient)
    return gradient


def global_cosine(a, b):
    """Sum the distances over levels, with detached targets: `global_cosine`, utils.py."""
    return sum(global_distance(teacher, student) for teacher, student in zip(a, b, strict=True))


def global_cosine_hm(a, b, alpha=1.0, factor=0.0):
    """Sum over levels; the gradient below mean + alpha * std (unbiased) is multiplied by factor: utils.py.

    It is upstream's `global_cosine_hm`. ``a`` are the targets and ``b`` the outputs of the decoder, lists of
    (N, C, H, W).
    """
    loss = 0
    for teacher, student in zip(a, b, strict=True):
        teacher = teacher.detach()
        distance = point_distance(teacher, student)
        threshold = distance.mean() + alpha * distance.reshape(-1).std()
        loss += global_distance(teacher, student)
        student.register_hook(partial(modify_grad, easy=distance < threshold, factor=factor))
    return loss


class ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by one weight per point."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient * weight, None


def global_cosine_hm_repaired(a, b, alpha=1.0, factor=0.0):
    """Compute `global_cosine_hm` with a product instead of indexing and hooks, so that it compiles to one graph."""
    loss = 0.0
    for teacher, student in zip(a, b, strict=True):
        distance = point_distance(teacher, student)
        weight = torch.where(distance < distance.mean() + alpha * distance.std(), factor, 1.0)
        loss = loss + global_distance(teacher, ScaleGradient.apply(student, weight))
    return loss


def global_cosine_hm_percent(a, b, p=0.9, factor=0.0):
    """Average over levels; all but the hardest 1 - p are weighted by factor: Dinomaly's `global_cosine_hm_percent`."""
    loss = 0
    for teacher, student in zip(a, b, strict=True):
        teacher = teacher.detach()
        distance = point_distance(teacher, student)
        threshold = torch.topk(distance.reshape(-1), k=int(distance.numel() * (1 - p))).values[-1]
        loss += global_distance(teacher, student)
        student.register_hook(partial(modify_grad, easy=distance < threshold, factor=factor))
    return loss / len(a)


def global_cosine_hm_adaptive(a, b, y=3):
    """Average over levels; the gradient is weighted by (d / mean d) ** y: INP-Former's `global_cosine_hm_adaptive`."""
    loss = 0
    for teacher, student in zip(a, b, strict=True):
        teacher = teacher.detach()
        distance = point_distance(teacher, student)
        loss += global_distance(teacher, student)
        student.register_hook(partial(modify_grad_v2, weight=(distance / distance.mean()) ** y))
    return loss / len(a)


# ---- anomaly maps ----------------------------------------------------------------------------------------------------


def upsample(teacher, student, out):
    """Compute the map of a pair, (N, 1, H, W): 1 - cosine, upsampled bilinearly with align_corners."""
    distance = (1 - F.cosine_similarity(teacher, student)).unsqueeze(1)
    return F.interpolate(distance, size=out, mode="bilinear", align_corners=True)


def to_size(out):
    return out if isinstance(out, tuple) else (out, out)


def anomaly_map_sum(pairs, out):
    """Add up the maps of all pairs and blur with SciPy, sigma 4: `cal_anomaly_map` and `evaluation`, utils.py.

    The sum starts from NumPy zeros and is therefore float64. Images are processed one by one, as upstream's batch size
    is 1.

    Returns:
        (N, H, W) float64 array.
    """
    maps = []
    for n in range(len(pairs[0][0])):
        total = np.zeros(to_size(out))
        for teacher, student in pairs:
            total += upsample(teacher[n : n + 1], student[n : n + 1], to_size(out))[0, 0].detach().cpu().numpy()
        maps.append(gaussian_filter(total, sigma=4))
    return np.stack(maps)


def gaussian_kernel(size=5, sigma=4):
    """Compute a Gaussian (1, 1, size, size) that sums to 1: `get_gaussian_kernel`, utils.py of the unified scripts."""
    x = torch.arange(size).float() - (size - 1) / 2
    kernel = torch.exp(-(x[:, None] ** 2 + x[None, :] ** 2) / (2 * sigma**2)) / (2 * math.pi * sigma**2)
    return (kernel / kernel.sum()).view(1, 1, size, size)


def anomaly_map_unified(pairs, out):
    """Average the maps of all pairs and blur 5x5, sigma 4, zeros outside: `cal_anomaly_maps`, `evaluation_batch`.

    Returns:
        (N, H, W) tensor.
    """
    mean = torch.cat([upsample(teacher, student, to_size(out)) for teacher, student in pairs], 1).mean(1, keepdim=True)
    return F.conv2d(mean, gaussian_kernel().to(mean), padding=2)[:, 0]


def image_score(anomaly_map, max_ratio=0):
    """Compute the maximum, or the mean of the int(H * W * max_ratio) largest values: `evaluation`, utils.py."""
    if max_ratio <= 0:
        return anomaly_map.max()
    return np.sort(anomaly_map.ravel())[-int(anomaly_map.size * max_ratio) :].mean()


# ---- evaluation ------------------------------------------------------------------------------------------------------


def compute_pro(mask, amap, num_th=200):
    """Compute the AUPRO of one image, as `evaluation` calls it: `compute_pro`, utils.py.

    The thresholds are np.arange(min, max, range / 200). At each threshold, all regions are labelled again and their
    overlaps averaged. Rows with a false positive rate below 0.3 are used, with the rate divided by its maximum, and
    the area is that of scikit-learn's auc.

    Args:
        mask: Mask (H, W) of integers 0 and 1.
        amap: Anomaly map (H, W).
        num_th: Number of thresholds.
    """
    low, high = amap.min(), amap.max()
    rows = []
    for threshold in np.arange(low, high, (high - low) / num_th):
        binary = amap > threshold
        overlaps = []
        for region in measure.regionprops(measure.label(mask)):
            detected = binary[region.coords[:, 0], region.coords[:, 1]].sum()
            overlaps.append(detected / region.area)
        inverse = 1 - mask
        fpr = np.logical_and(inverse, binary).sum() / inverse.sum()
        rows.append((np.mean(overlaps), fpr))
    pro, fpr = np.array(rows).T
    pro, fpr = pro[fpr < 0.3], fpr[fpr < 0.3]
    return auc(fpr / fpr.max(), pro)


def evaluate(model, images, masks, labels, *, max_ratio=0, calc_pro=True, map_of=anomaly_map_sum):
    """Evaluate with batch size 1 and Python lists of pixels: `evaluation`, utils.py.

    With `anomaly_map_unified` it equals `evaluation_batch`, whose larger batches do not change the values.

    The caller sets eval mode. For the image AUROC, an image is anomalous if its mask has a positive pixel. Upstream
    rounds the results to four decimals; this function does not.

    Args:
        model: Callable from images (1, 3, H, W) to a list of (teacher, student).
        images: Images (N, 3, H, W).
        masks: Masks (N, 1, H, W). Values above 0 are anomalous.
        labels: Labels (N,). The per-image AUPRO is computed for images with a label other than 0.
        max_ratio: Share of the largest values to average for the image score. 0 uses the maximum.
        calc_pro: Whether to compute AUPRO, which is by far the slowest part.
        map_of: `anomaly_map_sum` or `anomaly_map_unified`.

    Returns:
        Pixel AUROC, image AUROC, mean per-image AUPRO (NaN without ``calc_pro``).
    """
    gt_list_px, pr_list_px, gt_list_sp, pr_list_sp, aupro_list = [], [], [], [], []
    with torch.no_grad():
        for image, mask, label in zip(images, masks, labels, strict=True):
            amap = np.asarray(map_of(model(image[None]), tuple(image.shape[-2:]))[0])
            gt = mask.bool().cpu().numpy().astype(int)[0]
            if calc_pro and label != 0:
                aupro_list.append(compute_pro(gt, amap))
            gt_list_px.extend(gt.ravel())
            pr_list_px.extend(amap.ravel())
            gt_list_sp.append(gt.max())
            pr_list_sp.append(image_score(amap, max_ratio))
    aupro = float(np.mean(aupro_list)) if aupro_list else math.nan
    return float(roc_auc_score(gt_list_px, pr_list_px)), float(roc_auc_score(gt_list_sp, pr_list_sp)), aupro


# ---- training --------------------------------------------------------------------------------------------------------


def alpha_at(it, total_iters, warm_up=0.1):
    """Ramp from -3 to 1 over the first tenth of all iterations, then 1: `train`, recontrast_mvtec.py.

    The stable scripts use the first fifth.
    """
    return min(-3 + (1 - -3) * it / (total_iters * warm_up), 1)


def pairs_loss(pairs, alpha, factor=0.0, loss=global_cosine_hm):
    """Average the losses of both groups of pairs: `train`, recontrast_mvtec.py."""
    teachers, students = zip(*pairs, strict=True)
    half = len(pairs) // 2
    first = loss(teachers[:half], students[:half], alpha=alpha, factor=factor)
    return first / 2 + loss(teachers[half:], students[half:], alpha=alpha, factor=factor) / 2


def train(model, batches, steps, decoder_parameters, encoder_parameters, *, loss=global_cosine_hm):
    """Train in float32: `train`, recontrast_mvtec.py.

    The caller sets the training mode of the category (encoder BatchNorm).

    Args:
        model: Callable from images (N, 3, H, W) to a list of (teacher, student).
        batches: Iterable of at least ``steps`` batches of images (N, 3, H, W), in the order of training.
        steps: Number of steps, which also sets the alpha ramp.
        decoder_parameters: Parameters of decoder and bottleneck, with learning rate 2e-3.
        encoder_parameters: Parameters of the trained encoder, with learning rate 1e-5.
        loss: `global_cosine_hm` or `global_cosine_hm_repaired`.

    Returns:
        Loss of each step, read from the device at each step, as upstream does.
    """
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-5}
    optimizer = torch.optim.AdamW(list(decoder_parameters), lr=2e-3, **settings)
    optimizer2 = torch.optim.AdamW(list(encoder_parameters), lr=1e-5, **settings)
    losses = []
    for it, images in zip(range(steps), batches, strict=False):
        value = pairs_loss(model(images), alpha_at(it, steps), loss=loss)
        optimizer.zero_grad()
        optimizer2.zero_grad()
        value.backward()
        optimizer.step()
        optimizer2.step()
        losses.append(value.item())
    if len(losses) < steps:
        raise ValueError(f"batches: wanted {steps} of them, got {len(losses)}")
    return losses


def train_stable(model, batches, steps, decoder_parameters, encoder_parameters, *, wipe_every=500, rest=100):
    """Train as `train` of recontrast_mvtec_stable.py, with the arguments and the result of `train`.

    Every ``wipe_every`` iterations the state of the decoder's optimiser is emptied. The encoder is only updated while a
    counter equals ``rest``. The counter starts at ``rest``, is set to zero when the state is emptied, and increases at
    the end of each iteration, including that one. recontrast_visa_stable.py never sets it to zero (``rest=0``).
    """
    settings = {"betas": (0.9, 0.999), "eps": 1e-10, "weight_decay": 1e-5, "amsgrad": False}
    optimizer = torch.optim.AdamW(list(decoder_parameters), lr=2e-3, **settings)
    optimizer2 = torch.optim.AdamW(list(encoder_parameters), lr=1e-5, **settings)
    losses, counter = [], rest
    for it, images in zip(range(steps), batches, strict=False):
        value = pairs_loss(model(images), alpha_at(it, steps, 0.2))
        optimizer.zero_grad()
        optimizer2.zero_grad()
        value.backward()
        optimizer.step()
        if counter >= rest:
            optimizer2.step()
        losses.append(value.item())
        if (it + 1) % wipe_every == 0:
            optimizer.state = collections.defaultdict(dict)
            counter = 0
        if counter < rest:
            counter += 1
    return losses


def train_unified(model, batches, steps, decoder_parameters, encoder_parameters):
    """Train as `train` of recontrast_mvtec_multiclass.py, with the arguments and the result of `train`.

    A single optimiser uses amsgrad, and its learning rates are divided by five after 80 % of the iterations.
    """
    groups = [{"params": list(decoder_parameters)}, {"params": list(encoder_parameters), "lr": 1e-5}]
    settings = {"betas": (0.9, 0.999), "eps": 1e-10, "weight_decay": 1e-5, "amsgrad": True}
    optimizer = torch.optim.AdamW(groups, lr=2e-3, **settings)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[int(steps * 0.8)], gamma=0.2)
    losses = []
    for it, images in zip(range(steps), batches, strict=False):
        value = pairs_loss(model(images), alpha_at(it, steps))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
        scheduler.step()
    return losses
