"""Samples of parts: the samples of all views of a part, joined to one with its label, masks, group and region."""

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from recontrast.data.dataset_sample import Sample
from recontrast.data.views import PAGES, Views, list_part_names


def join_part_samples(
    samples: Sequence[Sample], views: Views | None, missing: list[str] | None = None
) -> list[Sample]:  # fmt: skip
    """Join the samples of the views of each part to one sample.

    A part has a defect if one of its views has one. A view without a mask file does not show the defect if another view
    of the part has a mask. A group or a region of interest that is given for one view holds for the whole part;
    training uses a single region for all parts.

    Args:
        samples: Samples of all views; samples that are joined already are returned unchanged. The category of a part is
            that of its first view.
        views: Views of the parts; None: each file is a part.
        missing: List that receives a sentence for each part without one of its views, which is left out. None: such a
            part is an error.

    Returns:
        The first view of each part, with the others in `Sample.views`.

    Raises:
        ValueError: If a path has no name of a view, a view is missing, or views of one part are on two sides of a split
            or in two groups.
    """
    if views is None or views.source == PAGES or all(sample.views for sample in samples):
        return list(samples)
    parts: dict[str, dict[str, Sample]] = {}
    for sample in samples:
        before, name, after = views.divide(sample.path)
        parts.setdefault(os.path.abspath(before + views.names[0] + after), {})[name] = sample
    joined = []
    for part in parts.values():
        text = _describe_missing(part, views)
        if text is None:
            joined.append(_join(part, views))
        elif missing is None:
            raise ValueError(text)
        else:
            missing.append(text)
    return joined


def check_part_files(samples: Sequence[Sample], source: str) -> list[Sample]:
    """Check that the images and masks of parts are files.

    Args:
        samples: Samples of all views, or of parts that are joined already.
        source: Where the views of a part are found, see `recontrast.data.views.Views`.

    Returns:
        The samples. Where only some views of a part have mask files, the others get no mask: they do not show the
        defect.

    Raises:
        ValueError: If a path contains no view name, an image does not exist, or no mask of a part exists.
    """
    parts: dict[str, list[Sample]] = {}
    names = list_part_names([sample.path for sample in samples], source)
    for name, sample in zip(names, samples, strict=True):
        parts.setdefault(name, []).extend((sample, *sample.views))
    without, other = set[Path](), "" if source == PAGES else ", or one of another view"
    for views in parts.values():
        masks = {view.path: view.mask for view in views if view.mask is not None}
        missing = [path for path, mask in masks.items() if not mask.is_file()]
        if missing and len(missing) == len(masks):
            path = missing[0]
            raise ValueError(f"{path}: wanted its mask {masks[path]}{other}, got none")
        without.update(missing)
        for view in views:
            if not view.path.is_file():
                mask = "" if view.mask is None else f" for the mask {view.mask}"
                raise ValueError(f"{view.path}: wanted an image{mask}, got no such file")
    return [_drop_masks(sample, without) for sample in samples]


def _drop_masks(sample: Sample, without: Collection[Path]) -> Sample:
    """Return a sample, or one of a joined part, without the masks of the images of some paths."""
    views = tuple(_drop_masks(view, without) for view in sample.views)
    kept = [view.mask for view in (sample, *views) if view.path not in without and view.mask is not None]
    return replace(sample, mask=kept[0] if kept else None, views=views)  # a part has the first mask of its views


def _describe_missing(part: dict[str, Sample], views: Views) -> str | None:
    """Say which views a part lacks; None if it has all."""
    absent = [name for name in views.names if name not in part]
    if not absent:
        return None
    first = next(part[name] for name in views.names if name in part)
    got = Views(views.source, tuple(absent)).describe()
    return f"{first.path}: wanted the views {views.describe()} of each part, got no {got}"


def _join(part: dict[str, Sample], views: Views) -> Sample:
    """Return the sample of a part with all its views."""
    present = [part[name] for name in views.names]
    first = present[0]
    grouped = next((sample for sample in present if sample.group is not None), first)
    for other in present[1:]:
        if other.split != first.split:
            raise ValueError(
                f"{other.path}: wanted all views of a part in one split, got {other.split} here and {first.split} for "
                f"{first.path}"
            )
        if other.group is not None and other.group != grouped.group:
            raise ValueError(
                f"{other.path}: wanted all views of a part in one group, got {other.group!r} here and "
                f"{grouped.group!r} for {grouped.path}"
            )
    worst = max(present, key=lambda sample: sample.label)  # the first one with a defect, if any
    shown = [sample for sample in present if sample.mask is not None and sample.mask.is_file()]
    if shown:  # the views without a mask do not show the defect
        present = [sample if sample in shown else replace(sample, mask=None) for sample in present]
    masks = [sample.mask for sample in present if sample.mask is not None]
    return replace(
        first, mask=masks[0] if masks else None, label=worst.label, defect=worst.defect, group=grouped.group,
        roi=next((sample.roi for sample in present if sample.roi is not None), None), views=tuple(present[1:]),
    )  # fmt: skip
