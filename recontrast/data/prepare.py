"""Convert original downloads to MVTec AD layout, and check the number of images.

The new data set appears when it is complete, or not at all. Files are linked if possible: a hard link, otherwise a
relative symbolic link, otherwise a copy. Only masks with other values than 0 and 255 and images of APTOS 2019 are
converted.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from recontrast.data import downloads
from recontrast.data.atomic import check_new_or_empty, create_folder
from recontrast.data.datasets import GOOD
from recontrast.data.described_sets import DESCRIBED_SETS
from recontrast.data.downloads import Entry
from recontrast.data.heatmaps import save_png
from recontrast.data.listing import PathLike
from recontrast.data.published_counts import PUBLISHED_COUNTS, Counts
from recontrast.data.system import count_cpus

MARKER_FILE = "prepared.json"  # file beside the categories that describes the download
TRANSFER_METHODS = ("hard links", "symbolic links", "copies", "pictures written")


READERS: dict[str, Callable[[Path], downloads.Plan]] = {
    "mvtec": downloads.read_mvtec,
    "visa": downloads.read_visa,
    "aptos": downloads.read_aptos,
    "oct2017": downloads.read_oct2017,
    "isic2018": downloads.read_isic2018,
    **{name: described.read for name, described in DESCRIBED_SETS.items()},
}


@dataclass(frozen=True)
class PreparedDataset:
    """Result of `prepare`.

    Attributes:
        name: Name of the data set.
        source: Folder of the download, which can be below the folder given.
        out: Root of the new data set; None if the download was only checked.
        counts: Number of images by category.
        published: Published number of images by category.
        warnings: One sentence for each category that differs from the published counts, and one for missing categories.
        files: Number of files by transfer method (`TRANSFER_METHODS`).
        title: Name, licence and citation; empty for the paper's data sets.
        total: Published number of images of all categories; None if they are published by category, or not checked.
        own_split: Whether training and test images were divided here, because no split is published.
    """

    name: str
    source: Path
    out: Path | None
    counts: dict[str, Counts]
    published: dict[str, Counts]
    warnings: list[str]
    files: dict[str, int]
    title: str = ""
    total: Counts | None = None
    own_split: bool = False


def prepare(
    name: str,
    source: PathLike,
    out: PathLike | None = None,
    *,
    link: bool = True,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PreparedDataset:
    """Convert an original download to MVTec AD layout.

    Args:
        name: Name of the data set, one of `READERS`.
        source: Folder to which the download was unpacked, or a folder up to three levels above it.
        out: Root of the new data set, a folder that does not exist or is empty; it appears when it is complete. None
            only checks files and counts, and reads no pixels.
        link: Whether to link files; False copies them.
        workers: Number of threads. None uses one per available CPU.
        on_progress: Called with (files done, all files).

    Returns:
        The counts beside the published ones, and how files were transferred.

    Raises:
        FileNotFoundError: If a table or a file named by a table is missing.
        ValueError: If ``name`` is unknown, the download is incomplete or invalid, or ``out`` is not empty.
        OSError: If a file cannot be read or written.
    """
    if name not in READERS:
        raise ValueError(f"prepare: wanted one of {', '.join(READERS)}, got {name!r}")
    if out is not None:
        check_new_or_empty(Path(out))  # before the download is read; again when the folder is filled
    root, entries = READERS[name](Path(source))
    counts = count_images(entries, root)
    described, published = DESCRIBED_SETS.get(name), PUBLISHED_COUNTS.get(name, {})
    if described is None:
        warnings = compare_counts(counts, published)
    else:
        warnings = compare_total(counts, described.categories, described.total, is_split=not described.unsplit)
    files: dict[str, int] = {}
    if out is not None:
        with create_folder(out) as folder:
            files = _fill(folder, os.path.realpath(out), entries, link, workers, on_progress)
            description = {"data": name, "source": os.path.abspath(root), "files": files}
            description |= {"images": {category: asdict(number) for category, number in counts.items()}}
            (folder / MARKER_FILE).write_text(json.dumps(description, indent=1) + "\n")
    return PreparedDataset(
        name=name,
        source=root,
        out=None if out is None else Path(out),
        counts=counts,
        published=published,
        warnings=warnings,
        files=files,
        title="" if described is None else described.title,
        total=None if described is None else described.total,
        own_split=described is not None and bool(described.unsplit),
    )


def count_images(entries: Sequence[Entry], root: Path) -> dict[str, Counts]:
    """Count the images of each category.

    Args:
        entries: Files of the data set.
        root: Folder of the download, for error messages.

    Returns:
        Number of images by category, in the order of the entries.

    Raises:
        ValueError: If two entries have the same target, or a category has no training images.
    """
    sources: dict[str, Path] = {}
    folders: dict[str, list[str]] = {}
    for entry in entries:
        if entry.target in sources:
            other = sources[entry.target]
            raise ValueError(f"{entry.source}: wanted one file for {entry.target}, got {other} for the same target")
        sources[entry.target] = entry.source
        category, *rest = entry.target.split("/")
        if len(rest) > 1:  # not the configuration of a category
            folders.setdefault(category, []).append("/".join(rest[:2]))
    counts: dict[str, Counts] = {}
    for category, kinds in folders.items():
        train, test = (sum(kind.startswith(split) for kind in kinds) for split in ("train/", "test/"))
        if not train:
            raise ValueError(f"{root}: wanted good training images of {category}, got only {test} test images")
        counts[category] = Counts(train, test, kinds.count(f"test/{GOOD}"))
    return counts


def sum_counts(counts: dict[str, Counts]) -> Counts:
    """Add up the counts of all categories.

    Args:
        counts: Number of images by category.

    Returns:
        The sums; the number of good test images is None if it is unknown for a category.
    """
    good = [number.good for number in counts.values() if number.good is not None]
    return Counts(
        train=sum(number.train for number in counts.values()),
        test=sum(number.test for number in counts.values()),
        good=sum(good) if len(good) == len(counts) else None,
    )


def compare_counts(counts: dict[str, Counts], published: dict[str, Counts]) -> list[str]:
    """Compare the number of images with the published numbers.

    Args:
        counts: Number of images by category.
        published: Published number of images by category.

    Returns:
        One sentence for each category that differs, and one for all missing categories.
    """
    warnings = []
    for category, number in counts.items():
        if category not in published:
            warnings.append(f"{category}: {number.train} train, {number.test} test, not among the published categories")
        elif differences := number.describe_differences(published[category]):
            warnings.append(f"{category}: {'; '.join(differences)}")
    if missing := [category for category in published if category not in counts]:
        warnings.append(f"{len(missing)} of {len(published)} published categories are missing: {', '.join(missing)}")
    return warnings


def compare_total(
    counts: dict[str, Counts], categories: Sequence[str], total: Counts | None, *, is_split: bool = True
) -> list[str]:
    """Compare the categories, and the number of all images, with the published ones.

    Args:
        counts: Number of images by category.
        categories: Published categories.
        total: Published number of images of all of them; None if it is not checked.
        is_split: Whether the split is published. Otherwise only the sums over training and test are compared.

    Returns:
        One sentence for other categories, one for missing ones, and one if all are there and the number differs.
    """
    warnings = []
    if others := [category for category in counts if category not in categories]:
        warnings.append(f"not among the published categories: {', '.join(others)}")
    if missing := [category for category in categories if category not in counts]:
        warnings.append(f"{len(missing)} of {len(categories)} published categories are missing: {', '.join(missing)}")
    if total is not None and not warnings:
        got = sum_counts(counts)
        differences = got.describe_differences(total) if is_split else got.describe_differences_of_all(total)
        warnings += [f"all categories: {'; '.join(differences)}"] if differences else []
    return warnings


def _fill(
    folder: Path,
    final: str,
    entries: Sequence[Entry],
    link: bool,
    workers: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, int]:
    """Create all files below ``folder``, which will be renamed to ``final``; return the number by transfer method."""
    counts = dict.fromkeys(TRANSFER_METHODS, 0)

    def transfer(entry: Entry) -> str:
        target = folder / entry.target
        target.parent.mkdir(parents=True, exist_ok=True)
        pixels = None if entry.convert is None else entry.convert(entry.source)
        if pixels is None:
            final_folder = os.path.join(final, os.path.dirname(entry.target))
            return _link(entry.source, target, final_folder) if link else _copy(entry.source, target)
        save_png(target, pixels)
        return "pictures written"

    pool = ThreadPoolExecutor(workers or count_cpus())
    try:
        for done, method in enumerate(pool.map(transfer, entries), 1):
            counts[method] += 1
            if on_progress is not None:
                on_progress(done, len(entries))
    finally:  # wait for the threads, so that none writes after an error or Ctrl-C
        pool.shutdown(wait=True, cancel_futures=True)
    return {method: number for method, number in counts.items() if number}


def _link(source: Path, target: Path, final_folder: str) -> str:
    """Create a hard link, otherwise a symbolic link relative to ``final_folder``, otherwise a copy; return which."""
    real = os.path.realpath(source)
    try:
        os.link(real, target)
        return "hard links"
    except FileNotFoundError:
        raise
    except OSError:  # another file system, no support for links, or a file of another user
        try:
            target.symlink_to(os.path.relpath(real, final_folder))
            return "symbolic links"
        except OSError:
            return _copy(source, target)


def _copy(source: Path, target: Path) -> str:
    """Copy a file with its times; return the name of the method."""
    shutil.copy2(source, target)
    return "copies"
