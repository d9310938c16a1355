"""Slow restatements of the operators, losses and metrics, in float64 and from their definitions."""

import numpy as np
import torch

EPS = 1e-8


# ---- operators ---------------------------------------------------------------


def cosine_sums(x, y):
    """The three sums (3, N, P) of features (N, C, P), and the sums of the absolute values of their terms."""
    products = np.stack([x * y, x * x, y * y])
    return products.sum(2), np.abs(products).sum(2)


def norm(square):
    return np.where(square == np.inf, np.nan, np.sqrt(np.where(square < EPS**2, EPS**2, square)))


def distance(sums):
    return 1 - sums[0] / (norm(sums[1]) * norm(sums[2]))


def threshold(d, rule, parameter):
    """Threshold of the distances of a pair; for "power" their mean."""
    d = d.ravel()
    if rule == "power":
        return np.mean(np.where(d < 0, 0, d)) if d.size else np.nan
    if rule == "hardest":
        return np.sort(d)[::-1][max(int(d.size * parameter), 1) - 1] if d.size else -np.inf  # NaN sorts last
    return np.mean(d) + parameter * np.std(d, ddof=1) if d.size > 1 else -np.inf


def weights(d, limit, rule, parameter, factor):
    if rule != "power":
        return np.where(d < limit, factor, 1.0)
    return (np.where(d < 0, 0, d) / limit) ** parameter if limit > 0 else np.ones_like(d)


def mined_loss(sums, rule, parameter, factor, grad):
    """Loss, threshold and gradient by the sums of one pair (3, N, P)."""
    whole = sums.sum(2)
    inverse = 1 / (norm(whole[1]) * norm(whole[2]))
    loss = np.mean(1 - whole[0] * inverse) if whole.shape[1] else np.nan
    slopes = [-inverse] + [np.where(s < EPS**2, 0, whole[0] * inverse / (2 * s)) for s in whole[1:]]
    d = distance(sums)
    limit = threshold(d, rule, parameter)
    weight = weights(d, limit, rule, parameter, factor)
    return loss, limit, grad * weight * np.stack(slopes)[:, :, None] / max(whole.shape[1], 1), d


def anomaly_map(distances, rows, cols, scale):
    """Maps (N, H, W), and the sums of the absolute values of their terms."""
    maps = sum(np.einsum("yi,nij,xj->nyx", r, d, c) for d, r, c in zip(distances, rows, cols, strict=True))
    terms = sum(
        np.einsum("yi,nij,xj->nyx", *map(np.abs, (r, d, c))) for d, r, c in zip(distances, rows, cols, strict=True)
    )
    return maps * scale, terms * abs(scale)


def global_loss(teachers, students, weight_of):
    """Loss and gradients of lists of float64 features, each position of the gradient multiplied by its weight."""
    loss, leaves = 0, [s.clone().requires_grad_() for s in students]
    for t, s in zip(teachers, leaves, strict=True):
        norms = t.norm(dim=1).clamp_min(EPS) * s.detach().norm(dim=1).clamp_min(EPS)
        weight = weight_of(1 - (t * s.detach()).sum(1) / norms)
        weighted = s.detach() + weight[:, None] * (s - s.detach())
        a, b = t.flatten(1), weighted.flatten(1)
        loss = loss + (1 - (a * b).sum(1) / (a.norm(dim=1).clamp_min(EPS) * b.norm(dim=1).clamp_min(EPS))).mean()
    return loss.detach(), torch.autograd.grad(loss, leaves)


def score(anomaly, how):
    if not np.isfinite(anomaly).all():
        return np.nan
    if how == "max":
        return anomaly.max()
    if how == "mean":
        return anomaly.mean()
    return np.sort(anomaly.ravel())[::-1][: max(int(np.floor(anomaly.size * how)), 1)].mean()


# ---- metrics -----------------------------------------------------------------


def auroc(scores, labels):
    differences = scores[labels][:, None] - scores[~labels]
    return np.mean((differences > 0) + 0.5 * (differences == 0))


def sweep(scores, labels):
    """Threshold, true positives and false positives, for each distinct score from the highest down."""
    for t in np.unique(scores)[::-1]:
        called = scores >= t
        yield t, np.count_nonzero(called & labels), np.count_nonzero(called & ~labels)


def ap(scores, labels):
    total, before, positives = 0.0, 0, np.count_nonzero(labels)
    for _, tp, fp in sweep(scores, labels):
        total += (tp - before) / positives * tp / (tp + fp)
        before = tp
    return total


def f1(scores, labels, at):
    called = scores >= at
    return 2 * np.count_nonzero(called & labels) / (np.count_nonzero(called) + np.count_nonzero(labels))


def f1_max(scores, labels):
    return max(f1(scores, labels, t) for t in np.unique(scores))


def regions(masks):
    """Label 8-connected regions, image by image, by flooding from the first pixel of each."""
    labels, count = np.zeros(masks.shape, np.int32), 0
    for n, y, x in np.argwhere(masks):
        if labels[n, y, x]:
            continue
        count += 1
        stack = [(y, x)]
        while stack:
            i, j = stack.pop()
            inside = 0 <= i < masks.shape[1] and 0 <= j < masks.shape[2]
            if inside and masks[n, i, j] and not labels[n, i, j]:
                labels[n, i, j] = count
                stack += [(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    return labels, count


def aupro(maps, masks, limit):
    """Area below the mean overlap of regions as a function of the false positive rate, up to ``limit``."""
    labels, count = regions(masks)
    good, sizes = np.count_nonzero(~masks), np.bincount(labels.ravel(), minlength=count + 1)[1:]
    x, y = [0.0], [0.0]
    for t in np.unique(maps)[::-1]:
        called = maps >= t
        x.append(np.count_nonzero(called & ~masks) / good)
        y.append(np.mean(np.bincount(labels[called & masks], minlength=count + 1)[1:] / sizes))
    area = 0.0
    for i in range(1, len(x)):
        if x[i - 1] >= limit or x[i] == x[i - 1]:
            continue
        end = min(x[i], limit)
        height = y[i - 1] + (y[i] - y[i - 1]) * (end - x[i - 1]) / (x[i] - x[i - 1])
        area += (end - x[i - 1]) * (y[i - 1] + height) / 2
    return area / limit
