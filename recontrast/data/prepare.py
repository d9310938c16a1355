"""Original downloads of the paper's data sets -> MVTec AD layout, whole or not at all, with counts checked.

Files are linked where that is possible: a hard link, else a relative symbolic link, else a copy. Only what must be
changed is written anew: masks of VisA, images of APTOS 2019.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from recontrast.data import downloads
from recontrast.data.atomic import create_folder
from recontrast.data.datasets import GOOD
from recontrast.data.downloads import Entry
from recontrast.data.heatmaps import save_png
from recontrast.data.listing import PathLike

MARKER_FILE = "prepared.json"  # beside the categories: what was made of which download
TRANSFER_METHODS = ("hard links", "symbolic links", "copies", "pictures written")


@dataclass(frozen=True)
class Counts:
    """Images of one category; None where it is not known."""

    train: int
    test: int
    good: int | None = None  # of the test

    def differences(self, published: "Counts") -> list[str]:
        """One text for each number that is not the published one."""
        wanted = asdict(published)
        names = {"train": "train", "test": "test", "good": "good of test"}
        return [
            f"{got} {names[key]}, published {wanted[key]}"
            for key, got in asdict(self).items()
            if wanted[key] is not None and got != wanted[key]
        ]


def _published(table: str) -> dict[str, Counts]:
    """Lines of category, training, good and defective test images."""
    rows = [line.split() for line in table.strip().splitlines()]
    return {name: Counts(int(train), int(good) + int(bad), int(good)) for name, train, good, bad in rows}


PUBLISHED_COUNTS = {
    "mvtec": _published(  # Bergmann et al., CVPR 2019, Table 1
        """
        bottle      209  20  63
        cable       224  58  92
        capsule     219  23 109
        carpet      280  28  89
        grid        264  21  57
        hazelnut    391  40  70
        leather     245  32  92
        metal_nut   220  22  93
        pill        267  26 141
        screw       320  41 119
        tile        230  33  84
        toothbrush   60  12  30
        transistor  213  60  40
        wood        247  19  60
        zipper      240  32 119
        """
    ),
    "visa": _published(  # Zou et al., ECCV 2022; one-class split: nine tenths of the normal images are for training
        """
        candle      900 100 100
        capsules    542  60 100
        cashew      450  50 100
        chewinggum  453  50 100
        fryum       450  50 100
        macaroni1   900 100 100
        macaroni2   900 100 100
        pcb1        904 100 100
        pcb2        901 100 100
        pcb3        905 101 100
        pcb4        904 101 100
        pipe_fryum  450  50 100
        """
    ),
    # The counts that the reference trains and tests on; of ISIC's 193 test images it does not say how many are normal.
    "aptos": {"aptos": Counts(1000, 2662, 805)},
    "oct2017": {"oct2017": Counts(26315, 1000, 250)},
    "isic2018": {"isic2018": Counts(6705, 193)},
}
READERS: dict[str, Callable[[Path], downloads.Plan]] = {
    "mvtec": downloads.read_mvtec,
    "visa": downloads.read_visa,
    "aptos": downloads.read_aptos,
    "oct2017": downloads.read_oct2017,
    "isic2018": downloads.read_isic2018,
}


@dataclass(frozen=True)
class PreparedDataset:
    """What was found, and what was made of it."""

    name: str
    source: Path  # where the download was found, at or below the folder that was named
    out: Path | None  # root of the new data set; None if it was only checked
    counts: dict[str, Counts]  # by category
    published: dict[str, Counts]
    warnings: list[str]  # a sentence for each category whose counts are not the published ones, one for those missing
    files: dict[str, int]  # how many came in each of `TRANSFER_METHODS`


def prepare(
    name: str,
    source: PathLike,
    out: PathLike | None = None,
    *,
    link: bool = True,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PreparedDataset:
    """Bring an original download into MVTec AD layout.

    Args:
        name: one of `READERS`.
        source: folder to which the download was unpacked, or one up to three levels above it.
        out: root of the new data set, a folder that is not there or is empty. It appears when all is done. None checks
            only: files and counts, but no pixel.
        link: False copies every file.
        workers: threads. None takes one per CPU that this process may use.
        on_progress: called with (files done, files in all).

    Returns:
        Counts beside the published ones, and how the files came.

    Raises:
        ValueError: there is nothing usable at ``source``, or a part of it is missing or not as it should be.
        FileNotFoundError: a table names files that are not there.
    """
    if name not in READERS:
        raise ValueError(f"prepare: wanted one of {', '.join(READERS)}, got {name!r}")
    root, entries = READERS[name](Path(source))
    counts = count_images(entries, root)
    warnings = compare_counts(counts, PUBLISHED_COUNTS[name])
    files: dict[str, int] = {}
    if out is not None:
        with create_folder(out) as folder:
            files = _fill(folder, os.path.realpath(out), entries, link, workers, on_progress)
            about = {"data": name, "source": os.path.abspath(root), "files": files}
            about |= {"images": {category: asdict(found) for category, found in counts.items()}}
            (folder / MARKER_FILE).write_text(json.dumps(about, indent=1) + "\n")
    return PreparedDataset(
        name, root, None if out is None else Path(out), counts, PUBLISHED_COUNTS[name], warnings, files
    )


def count_images(entries: Sequence[Entry], root: Path) -> dict[str, Counts]:
    """Images by category, in the order in which the categories come; refuses two files of one name."""
    sources: dict[str, Path] = {}
    places: dict[str, list[str]] = {}
    for entry in entries:
        if entry.target in sources:
            other = sources[entry.target]
            raise ValueError(f"{entry.source}: wanted one file for {entry.target}, got {other} for it too")
        sources[entry.target] = entry.source
        category, split, kind = entry.target.split("/")[:3]
        places.setdefault(category, []).append(f"{split}/{kind}")
    found: dict[str, Counts] = {}
    for category, kinds in places.items():
        train, test = (sum(kind.startswith(split) for kind in kinds) for split in ("train/", "test/"))
        if not train:
            raise ValueError(f"{root}: wanted good training images of {category}, got none beside {test} test images")
        found[category] = Counts(train, test, kinds.count(f"test/{GOOD}"))
    return found


def sum_counts(counts: dict[str, Counts]) -> Counts:
    """The sum over all categories."""
    good = [one.good for one in counts.values() if one.good is not None]
    test = sum(one.test for one in counts.values())
    return Counts(sum(one.train for one in counts.values()), test, sum(good) if len(good) == len(counts) else None)


def compare_counts(found: dict[str, Counts], published: dict[str, Counts]) -> list[str]:
    """A sentence for each category that differs from what was published, and one for all that are missing."""
    warnings = []
    for category, counts in found.items():
        if category not in published:
            warnings.append(f"{category}: {counts.train} train, {counts.test} test, not among the published categories")
        elif differences := counts.differences(published[category]):
            warnings.append(f"{category}: {'; '.join(differences)}")
    if missing := [category for category in published if category not in found]:
        warnings.append(f"{len(missing)} of {len(published)} published categories are missing: {', '.join(missing)}")
    return warnings


def _fill(
    folder: Path,
    final: str,
    entries: Sequence[Entry],
    link: bool,
    workers: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, int]:
    """Put every file where it belongs below ``folder``, which will be ``final``; how many came in which way."""
    ways = dict.fromkeys(TRANSFER_METHODS, 0)

    def put(entry: Entry) -> str:
        target = folder / entry.target
        target.parent.mkdir(parents=True, exist_ok=True)
        picture = None if entry.make is None else entry.make(entry.source)
        if picture is None:
            seen_from = os.path.join(final, os.path.dirname(entry.target))
            return _link(entry.source, target, seen_from) if link else _copy(entry.source, target)
        save_png(target, picture)
        return "pictures written"

    pool = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)))
    try:
        for done, way in enumerate(pool.map(put, entries), 1):
            ways[way] += 1
            if on_progress is not None:
                on_progress(done, len(entries))
    finally:  # no thread writes any more when an error, or Ctrl-C, goes on from here
        pool.shutdown(wait=True, cancel_futures=True)
    return {way: number for way, number in ways.items() if number}


def _link(source: Path, target: Path, seen_from: str) -> str:
    """A hard link, else a symbolic link relative to ``seen_from``, else a copy: which of them it became."""
    real = os.path.realpath(source)
    try:
        os.link(real, target)
        return "hard links"
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one that has no links, or not our file
        try:
            target.symlink_to(os.path.relpath(real, seen_from))
            return "symbolic links"
        except OSError:
            return _copy(source, target)


def _copy(source: Path, target: Path) -> str:
    shutil.copy2(source, target)
    return "copies"
