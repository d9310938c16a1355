"""Images that count as one: copies of a file, and those of one group, such as photographs of the same part."""

from collections.abc import Collection, Sequence

from recontrast.data.copies import group_equal_files
from recontrast.data.dataset_sample import Sample
from recontrast.data.near_copies import merge_copies


def group_samples(samples: Sequence[Sample]) -> list[int]:
    """Group images that must not be divided between training, calibration and test.

    Args:
        samples: Images of one or several categories.

    Returns:
        For each image the position of the first one of its group: files with the same content
        (`recontrast.data.copies.group_equal_files`), and images of one category with the same `Sample.group`.
    """
    owners = group_equal_samples(samples)
    return merge_copies(owners, pair_groups(list(map(name_group, samples))))


def group_equal_samples(samples: Sequence[Sample]) -> list[int]:
    """Group images whose files have the same content; parts if this holds for all their views.

    Args:
        samples: Images.

    Returns:
        For each image the position of the first equal one, see `recontrast.data.copies.group_equal_files`.
    """
    files = [[sample.path, *(view.path for view in sample.views)] for sample in samples]
    first = iter(group_equal_files([path for part in files for path in part]))
    owners: dict[tuple[int, ...], int] = {}
    return [owners.setdefault(tuple(next(first) for _ in part), index) for index, part in enumerate(files)]


def name_group(sample: Sample) -> tuple[str, str] | None:
    """Return the category and the group of an image; None if it is a group of its own."""
    return None if sample.group is None else (sample.category, sample.group)


def pair_groups(names: Sequence[object]) -> list[tuple[int, int]]:
    """Return the pairs of positions that link the images of each group.

    Args:
        names: Name of the group of each image; None if it is a group of its own.

    Returns:
        Pairs of the first position of the group and a later one, in the order of the later ones.
    """
    first: dict[object, int] = {}
    pairs = []
    for index, name in enumerate(names):
        if name is not None and (owner := first.setdefault(name, index)) != index:
            pairs.append((owner, index))
    return pairs


def number_groups(names: Sequence[object]) -> list[int]:
    """Return for each image the position of the first one of the same group.

    Args:
        names: Name of the group of each image, see `name_group`; None if it is a group of its own.
    """
    return merge_copies(range(len(names)), pair_groups(names))


def number_samples(samples: Sequence[Sample]) -> list[int]:
    """Return for each image the position of the first one of its group; copies of files are not looked for."""
    return number_groups([name_group(sample) for sample in samples])


def count_groups(samples: Sequence[Sample]) -> int:
    """Return the number of groups; copies of files are not looked for."""
    return len(set(number_samples(samples)))


def list_groups(samples: Sequence[Sample]) -> list[str]:
    """Return the names of the groups of images, each once, without their categories."""
    return list(dict.fromkeys(sample.group for sample in samples if sample.group is not None))


def check_groups_are_new(option: str, samples: Sequence[Sample], trained: Collection[str]) -> None:
    """Raise ValueError if images are of groups that a detector was trained on.

    Args:
        option: Option or argument that gave the images, for the error message.
        samples: Images.
        trained: Names of the groups that were trained on, see `list_groups`; stored in checkpoints as "groups".
    """
    known = set(trained)
    if used := [sample for sample in samples if sample.group in known]:
        raise ValueError(
            f"{option}: wanted groups that were not trained on, got {len(used)} of {len(samples)} images of groups "
            f"that were (first: {used[0].path}, group {used[0].group}): groups of the same name are of the same part"
        )
