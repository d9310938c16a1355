"""Few shots and long tails: training on a chosen number of good images of each class."""

from collections.abc import Mapping, Sequence

import numpy as np

from recontrast.data.datasets import Sample
from recontrast.data.groups import group_equal_samples


def select_shots(samples: Sequence[Sample], shots: int | Mapping[str, int] | None, seed: int) -> list[Sample]:
    """Draw a number of good training images of each class; all other samples stay.

    The draw depends on the seed and on the order of the paths alone, not on the order of ``samples``. For one seed, the
    images of fewer shots are among those of more. Copies of one file count as one image, and only one is drawn.

    Args:
        samples: Samples of one or several classes.
        shots: Number of images of each class, or numbers by class, of which those that are not named keep all. None
            keeps all images.
        seed: Seed of the draw.

    Returns:
        The samples without the images that were not drawn, in their order.

    Raises:
        ValueError: If a class has fewer different good images, or a class that is named does not exist.
    """
    if shots is None:
        return list(samples)
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.category, [])
        if _is_candidate(sample):
            groups[sample.category].append(sample)
    if isinstance(shots, Mapping) and (unknown := [name for name in shots if name not in groups]):
        raise ValueError(f"shots: wanted classes among {', '.join(groups)}, got {unknown[0]!r}")
    drawn: set[int] = set()
    for name, group in groups.items():
        count = shots.get(name) if isinstance(shots, Mapping) else shots
        different = _list_different(group)
        if count is None:
            drawn.update(map(id, group))
        elif count > len(different) and group:  # without good images, training raises the error
            kind = "good images" if len(different) == len(group) else "different good images"
            raise ValueError(f"shots: wanted at most the {len(different)} {kind} of {name}, got {count}")
        else:
            order = np.random.default_rng([seed, len(different)]).permutation(len(different))
            drawn.update(id(different[index]) for index in order[:count].tolist())
    return [sample for sample in samples if not _is_candidate(sample) or id(sample) in drawn]


def describe_shots(samples: Sequence[Sample], shots: int | Mapping[str, int] | None, seed: int) -> str | None:
    """Describe the images that were drawn, as one sentence.

    Args:
        samples: Samples that `select_shots` returned.
        shots: Number of images of each class, or numbers by class.
        seed: Seed of the draw.

    Returns:
        The sentence; None if ``shots`` is None.
    """
    if shots is None:
        return None
    counts: dict[str, int] = {}
    for sample in samples:
        if _is_candidate(sample):
            counts[sample.category] = counts.get(sample.category, 0) + 1
    if not isinstance(shots, Mapping) and len(counts) > 1:
        return f"few shots: {shots} good images of each of {len(counts)} classes, drawn with seed {seed}"
    parts = ", ".join(f"{count} good images of {name}" for name, count in counts.items())
    return f"few shots: {parts}, drawn with seed {seed}"


def count_long_tail(counts: Mapping[str, int], imbalance: float) -> dict[str, int]:
    """Compute numbers of images that fall exponentially from class to class.

    As in Cao et al., NeurIPS 2019 (https://arxiv.org/abs/1906.07413, section 4), and in the sets of Ho et al., CVPR
    2024 (long-tailed anomaly detection): class i of K keeps ``n * imbalance ** (-i / (K - 1))`` images.

    Args:
        counts: Number of good images of each class.
        imbalance: Number of images of the first class over that of the last one, at least 1. Classes are ordered by
            their number of images, then by name; n is that of the first.

    Returns:
        Number of images of each class, from 1 to what it has, in the order of ``counts``.

    Raises:
        ValueError: If there are fewer than two classes, or the imbalance is below 1.
    """
    if len(counts) < 2 or not imbalance >= 1:
        raise ValueError(
            f"long tail: wanted 2 classes and an imbalance of at least 1, got {len(counts)} and {imbalance:g}"
        )
    order = sorted(counts, key=lambda name: (-counts[name], name))
    largest = counts[order[0]]
    kept = {
        name: min(max(round(largest * imbalance ** (-place / (len(order) - 1))), 1), counts[name])
        for place, name in enumerate(order)
    }
    return {name: kept[name] for name in counts}


def _is_candidate(sample: Sample) -> bool:
    return sample.split == "train" and sample.label == 0


def _list_different(group: Sequence[Sample]) -> list[Sample]:
    """Return the images in the order of their paths, without copies of others."""
    ordered = sorted(group, key=lambda sample: sample.path.parts)
    owners = group_equal_samples(ordered)
    return [sample for index, sample in enumerate(ordered) if owners[index] == index]
