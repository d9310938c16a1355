"""Scores of samples that several images show, such as the five views of Real-IAD."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.metrics import inputs


def merge_views(scores: Any, labels: Any, samples: Sequence[Hashable]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Take the largest score and the largest label of the images of each sample.

    This is the sample level of Real-IAD (Wang et al., CVPR 2024, https://arxiv.org/abs/2403.12580), as its public
    evaluation computes it; `recontrast.metrics.image_metrics` of the result gives S-AUROC, S-AP and S-F1.

    Args:
        scores: Finite scores of N images, (N,).
        labels: Labels (N,), 1 anomalous, 0 good: bool, 0/1 or 0/255.
        samples: Sample that each image shows.

    Returns:
        Scores (S,), float32 or float64, and labels (S,), bool, of the samples in the order of their first images.

    Raises:
        ValueError: If the shapes differ, or the labels have other values.
    """
    values, positive = inputs.check_scores_and_labels(scores, labels)
    if values.shape != (len(samples),):
        raise ValueError(f"samples: wanted one for each of the scores {values.shape}, got {len(samples)}")
    order = {sample: number for number, sample in enumerate(dict.fromkeys(samples))}
    numbers = np.array([order[sample] for sample in samples], np.intp)
    merged, is_anomalous = np.full(len(order), -np.inf, values.dtype), np.zeros(len(order), bool)
    np.maximum.at(merged, numbers, values)
    np.logical_or.at(is_anomalous, numbers, positive)
    return merged, is_anomalous
