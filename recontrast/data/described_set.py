"""A data set that is read by a description of where its files lie, without code of its own.

A description is a template for each kind of file, relative to the folder of the download. In a template, ``{part}``
stands for one part of a path or of a name, ``{part:pattern}`` for one that fits a regular expression, ``[text]`` for
text that may be missing, and ``**/`` for any folders. Several templates are alternatives. An image and its masks belong
together if all parts are equal that both templates have, except for `LOOSE`.

Labels come from the folders (the part ``{defect}``), from whether an image has a mask, from whether its mask marks a
pixel, or from a table. Images without a published split are divided by `recontrast.data.unsplit.assign_splits`.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from recontrast.data.dataset_sample import GOOD, Sample
from recontrast.data.decode import decode
from recontrast.data.download_tables import Listing, Table, read_labels, read_listing
from recontrast.data.downloads import BAD, Entry, Plan, binarise_mask, find_root, list_content
from recontrast.data.images import MAX_PIXELS
from recontrast.data.listing import find_images
from recontrast.data.published_counts import Counts
from recontrast.data.unsplit import assign_splits

LOOSE = ("name", "suffix", "folder")  # parts that an image and its mask need not share
_TOKEN = re.compile(r"\*\*/|\{(\w+)(?::([^{}]+))?\}|[\[\]]")


@dataclass(frozen=True)
class _Image:
    """One image of a download.

    Attributes:
        path: File.
        split: "train", "validation", "test", or "" without a published split.
        category: Name of the category.
        name: Name in the prepared data set.
        defect: Kind of defect, or "good".
        key: Parts that its masks share.
        group: Name of what the image shows; None if it is a group of its own.
        mask: Its mask, if a listing names it.
    """

    path: Path
    split: str
    category: str
    name: str
    defect: str = GOOD
    key: tuple[str, ...] = ()
    group: str | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class DescribedSet:
    """Where the files of a data set lie, and where it comes from.

    Attributes:
        title: Name, licence and citation, as the command prints them.
        categories: Names of the categories.
        marker: Glob pattern by which the root of the download is found. Empty: the folder that is given is the root.
        train: Templates of the good training images. If labels come from masks, images with a defect are left out.
        test: Templates of the test images.
        mask: Templates of the masks; several of the same image are joined.
        validation: Templates of good images that are neither trained on nor measured with.
        unsplit: Templates of images without a published split.
        good: Name of the class of good images.
        labels: Where labels come from: "folder", "mask" (an image without a mask is good), "pixels" (an image whose
            mask is black is good), or a `Table`.
        listing: Files that name the images, in place of templates.
        unmasked: Categories whose images have no masks.
        left_out: Names of images that the download lacks a mask of, which are left out.
        aliases: Names of folders in the download -> category; other names are no categories. Empty: any name is one.
        defects: Names of folders with defects in the download -> kind of defect.
        keep: Template of further files -> where they go, relative to the root of the data set.
        total: Published numbers of images of all categories; None if they are not checked. Without a published split,
            only the sums over training and test are compared.
    """

    title: str
    categories: tuple[str, ...]
    marker: str = "*/train/good"
    train: tuple[str, ...] = ("{category}/train/good/{name}",)
    test: tuple[str, ...] = ()
    mask: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    unsplit: tuple[str, ...] = ()
    good: str = GOOD
    labels: Literal["folder", "mask", "pixels"] | Table = "folder"
    listing: Listing | None = None
    unmasked: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    defects: Mapping[str, str] = field(default_factory=dict)
    keep: Mapping[str, str] = field(default_factory=dict)
    total: Counts | None = None

    def read(self, source: Path) -> Plan:
        """Read a download, see `recontrast.data.downloads`. Only if labels come from pixels, masks are decoded.

        Args:
            source: Folder of the download, or a folder up to three levels above it.

        Returns:
            Folder of the download, and the files of the prepared data set.

        Raises:
            FileNotFoundError: If a table or listing, or a file named by one, is missing.
            ValueError: If there is no such data set below ``source``, an image with a defect has no mask, a mask has
                no image, or a table or listing is invalid.
        """
        wanted = f"{self._describe_layout()}, as {self.title.partition(' (')[0].partition(',')[0]} unpacks"
        root = find_root(source, self.marker, wanted) if self.marker else source
        if not root.is_dir():
            raise ValueError(f"{root}: wanted a folder with {wanted}, got {'a file' if root.exists() else 'none'}")
        masks: dict[tuple[str, ...], list[Path]] = {}
        if self.listing is not None:
            images = [
                _Image(path, split, category, path.name, defect, mask=mask)
                for path, split, category, defect, mask in read_listing(root, self.listing, self.categories)
            ]
        else:
            files = {path.relative_to(root).as_posix(): path for path in find_images(root)}
            images, masks = self._match_images(files)
        if not images:
            raise ValueError(f"{root}: wanted {wanted}, got {list_content(root)}")
        images = self._label(images, masks, root)
        if self.unsplit:
            images = _divide(images)
        entries = [entry for image in images for entry in self._list_entries(image, masks)]
        if masks:
            first = next(iter(masks.values()))[0]
            raise ValueError(f"{first}: wanted an image for this mask ({_show(self.test or self.unsplit)}), got none")
        return root, entries + self._list_kept(root)

    def _describe_layout(self) -> str:
        if self.listing is not None:
            return f"{self.listing.files[0]} and {self.listing.folders[0]}"
        kinds = (self.unsplit,) if self.unsplit else (self.train, self.test)
        table = [self.labels.file] if isinstance(self.labels, Table) else []
        return " and ".join([*table, *(_show(templates[:1]) for templates in kinds)])

    def _match_images(self, files: Mapping[str, Path]) -> tuple[list[_Image], dict[tuple[str, ...], list[Path]]]:
        """Return the images, and the masks by what they share with their image."""
        masks: dict[tuple[str, ...], list[Path]] = {}
        for parts, path in self._match(self.mask, files):
            if parts.get("defect") != self.good:
                key = tuple(parts[name] for name in sorted(parts) if name not in LOOSE)
                masks.setdefault(key, []).append(path)
        shared = {name for template in self.mask for name in _list_parts(template) if name not in LOOSE}
        kinds = {"": self.unsplit} if self.unsplit else {"train": self.train, "validation": self.validation}
        kinds |= {} if self.unsplit else {"test": self.test}
        images = []
        for split, templates in kinds.items():
            for parts, path in self._match(templates, files):
                if path.name in self.left_out:
                    continue
                category, group = parts.get("category", self.categories[0]), parts.get("group")
                defect = GOOD if split in ("train", "validation") else parts.get("defect", GOOD)
                images.append(_Image(
                    path, split, self.aliases.get(category, category),
                    path.name if group is None else f"{group}_{path.name}",
                    GOOD if defect == self.good else self.defects.get(defect, defect),
                    tuple(parts[name] for name in sorted(shared & parts.keys())), group,
                ))  # fmt: skip
        return images, masks

    def _match(self, templates: Sequence[str], files: Mapping[str, Path]) -> Iterator[tuple[dict[str, str], Path]]:
        """Yield the parts and the path of each file whose relative path fits one of the templates, once."""
        patterns = [re.compile(_compile_template(template, self.aliases)) for template in templates]
        for name, path in files.items():
            if match := next((match for pattern in patterns if (match := pattern.fullmatch(name))), None):
                yield {part: text for part, text in match.groupdict().items() if text is not None}, path

    def _label(self, images: list[_Image], masks: dict[tuple[str, ...], list[Path]], root: Path) -> list[_Image]:
        """Return the images with their kind of defect, without those with a defect that cannot be trained on."""
        if isinstance(self.labels, Table):
            labels = read_labels(root, self.labels, [image.path for image in images])
            return [
                replace(image, defect=GOOD if defect == self.good else defect, group=group)
                for image, (defect, group) in zip(images, labels, strict=True)
            ]
        if self.labels == "folder":
            return images
        labelled = []
        for image in images:
            own = masks.get(image.key, [])
            if self.labels == "pixels":
                if not own:
                    raise ValueError(f"{image.path}: wanted its mask ({_show(self.mask)}), got none")
                if not any(map(_marks_a_pixel, own)):
                    del masks[image.key]
                    own = []
            if image.split in ("train", "validation") and own:
                del masks[image.key]
            else:
                labelled.append(replace(image, defect=BAD if own else GOOD))
        return labelled

    def _list_entries(self, image: _Image, masks: dict[tuple[str, ...], list[Path]]) -> list[Entry]:
        """Return the files of one image; its masks are taken from ``masks``."""
        category, stem = image.category, os.path.splitext(image.name)[0]
        if image.split != "test" or image.defect == GOOD:
            return [Entry(f"{category}/{image.split}/{GOOD}/{image.name}", image.path)]
        entries = [Entry(f"{category}/test/{image.defect}/{image.name}", image.path)]
        own = masks.pop(image.key, None) if image.mask is None else [image.mask]
        if own is not None:
            convert = partial(join_masks, others=own[1:], image=image.path)
            entries.append(Entry(f"{category}/ground_truth/{image.defect}/{stem}_mask.png", own[0], convert))
        elif self.mask and category not in self.unmasked:
            raise ValueError(f"{image.path}: wanted its mask ({_show(self.mask)}), got none")
        return entries

    def _list_kept(self, root: Path) -> list[Entry]:
        """Return the files that are kept as they are."""
        entries = []
        for template, target in self.keep.items():
            pattern = re.compile(_compile_template(template, self.aliases))
            for path in sorted(root.glob(re.sub(r"\{\w+\}", "*", template))):
                if match := pattern.fullmatch(path.relative_to(root).as_posix()):
                    entries.append(Entry(target.format(**match.groupdict()), path))
        return entries


def join_masks(path: Path, others: Sequence[Path], image: Path) -> np.ndarray | None:
    """Join the masks of an image: what any of them marks becomes 255.

    Args:
        path: Path of the first mask.
        others: Paths of further masks.
        image: Path of the image, which must have the same size.

    Returns:
        (H, W) uint8; None if there is one mask, which contains 0 and 255 alone.

    Raises:
        OSError: If a file does not exist or cannot be opened.
        ValueError: If a file cannot be decoded, or the sizes differ.
    """
    if not others:
        return binarise_mask(path, image)
    joined = [binarise_mask(mask, image, always=True) for mask in (path, *others)]
    return np.maximum.reduce([mask for mask in joined if mask is not None])


def _marks_a_pixel(path: Path) -> bool:
    return bool(np.asarray(decode(path, MAX_PIXELS)).any())


def _show(templates: Sequence[str]) -> str:
    """Return templates for an error message, without the patterns of their parts."""
    return " or ".join(re.sub(r"\{(\w+):[^{}]+\}", r"{\1}", template) for template in templates)


def _list_parts(template: str) -> list[str]:
    """Return the names of the parts of a template."""
    return [match[1] for match in _TOKEN.finditer(template) if match[1]]


def _compile_template(template: str, aliases: Mapping[str, str]) -> str:
    """Return the regular expression of a template."""
    usual = {"suffix": "[^/.]+"}
    if aliases:
        usual["category"] = "|".join(map(re.escape, aliases))
    expression, end = "", 0
    for match in _TOKEN.finditer(template):
        expression += re.escape(template[end : match.start()])
        end = match.end()
        if match[1] is not None:
            expression += f"(?P<{match[1]}>{match[2] or usual.get(match[1], '[^/]+')})"
        else:
            expression += {"**/": "(?:[^/]+/)*", "[": "(?:", "]": ")?"}[match[0]]
    return expression + re.escape(template[end:])


def _divide(images: Sequence[_Image]) -> list[_Image]:
    """Divide images without a split; which ones are test images depends on their names and groups alone."""
    samples = [
        Sample(image.path, None, int(image.defect != GOOD), image.category, "train", image.defect, group=image.group)
        for image in images
    ]
    divided = assign_splits(samples, [image.name for image in images])
    return [replace(image, split=sample.split) for image, sample in zip(images, divided, strict=True)]
