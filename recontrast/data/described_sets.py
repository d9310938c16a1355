"""Data sets that are read by a description of where their files lie, without code of their own.

A description is a template for each kind of file. ``{category}``, ``{defect}``, ``{stem}`` and ``{name}`` stand for one
part of a path or of a name. Each set is prepared in MVTec AD layout; good images for validation become
``CATEGORY/validation/good``, to calibrate with.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from recontrast.data.dataset_sample import GOOD
from recontrast.data.downloads import Entry, Plan, binarise_mask, find_root
from recontrast.data.listing import find_images
from recontrast.data.published_counts import Counts


@dataclass(frozen=True)
class DescribedSet:
    """Where the files of a data set lie, and where it comes from.

    Attributes:
        title: Name, licence and citation, as the command prints them.
        categories: Names of the categories.
        marker: Glob pattern by which the root of the download is found.
        train: Template of the good training images.
        test: Template of the test images.
        mask: Template of the masks; several with the same category, defect and stem are masks of one image.
        validation: Template of good images that are neither trained on nor measured with; None if there are none.
        good: Name of the folder of good test images.
        total: Published numbers of images of all categories; None if they are not checked.
    """

    title: str
    categories: tuple[str, ...]
    marker: str
    train: str
    test: str
    mask: str
    validation: str | None = None
    good: str = GOOD
    total: Counts | None = None

    def read(self, source: Path) -> Plan:
        """Read a download, see `recontrast.data.downloads`.

        Args:
            source: Folder of the download, or a folder up to three levels above it.

        Returns:
            Folder of the download, and the files of the prepared data set.

        Raises:
            ValueError: If there is no such data set below ``source``, an image with a defect has no mask, or a mask has
                no image.
        """
        root = find_root(
            source, self.marker, f"{self.train} and {self.test}, as {self.title.partition(' (')[0]} unpacks"
        )
        files = {path.relative_to(root).as_posix(): path for path in find_images(root)}
        masks: dict[tuple[str, str, str], list[Path]] = {}
        for parts, path in _match(self.mask, files):
            if parts["defect"] != self.good:
                masks.setdefault((parts["category"], parts["defect"], parts["stem"]), []).append(path)
        entries = [
            Entry(f"{parts['category']}/{split}/{GOOD}/{path.name}", path)
            for split, template in (("train", self.train), ("validation", self.validation))
            if template is not None
            for parts, path in _match(template, files)
        ]
        for parts, path in _match(self.test, files):
            category, defect, stem = parts["category"], parts["defect"], os.path.splitext(path.name)[0]
            if defect == self.good:
                entries.append(Entry(f"{category}/test/{GOOD}/{path.name}", path))
                continue
            own = masks.pop((category, defect, stem), None)
            if own is None:
                raise ValueError(f"{path}: wanted its mask ({self.mask}), got none")
            entries.append(Entry(f"{category}/test/{defect}/{path.name}", path))
            convert = partial(join_masks, others=own[1:], image=path)
            entries.append(Entry(f"{category}/ground_truth/{defect}/{stem}_mask.png", own[0], convert))
        if masks:
            first = next(iter(masks.values()))[0]
            raise ValueError(f"{first}: wanted an image for this mask ({self.test}), got none")
        return root, entries


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


def _match(template: str, files: dict[str, Path]) -> list[tuple[dict[str, str], Path]]:
    """Return the parts and the path of each file whose relative path fits a template."""
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    expression = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern))
    matches = ((expression.fullmatch(name), path) for name, path in files.items())
    return [(match.groupdict(), path) for match, path in matches if match is not None]


_NC = "CC BY-NC-SA 4.0"
DESCRIBED_SETS = {
    "mvtec_loco": DescribedSet(
        title=f"MVTec LOCO AD ({_NC}; Bergmann et al., Beyond Dents and Scratches: Logical Constraints in Unsupervised "
        "Anomaly Detection and Localization, IJCV 130, 2022)",
        categories=("breakfast_box", "juice_bottle", "pushpins", "screw_bag", "splicing_connectors"),
        marker="*/test/logical_anomalies",
        train="{category}/train/good/{name}",
        validation="{category}/validation/good/{name}",
        test="{category}/test/{defect}/{name}",
        mask="{category}/ground_truth/{defect}/{stem}/{name}",
        total=Counts(1772, 1568, 575),
    ),
    "mvtec_ad_2": DescribedSet(
        title=f"MVTec AD 2 ({_NC}; Heckler-Kram et al., The MVTec AD 2 Dataset: Advanced Scenarios for Unsupervised "
        "Anomaly Detection, 2025)",
        categories=("can", "fabric", "fruit_jelly", "rice", "sheet_metal", "vial", "wallplugs", "walnuts"),
        marker="*/test_public",
        train="{category}/train/good/{name}",
        validation="{category}/validation/good/{name}",
        test="{category}/test_public/{defect}/{name}",
        mask="{category}/test_public/ground_truth/{defect}/{stem}_mask.png",
    ),
    "mvtec_3d": DescribedSet(
        title=f"MVTec 3D-AD ({_NC}; Bergmann et al., The MVTec 3D-AD Dataset for Unsupervised 3D Anomaly Detection and "
        "Localization, VISAPP 2022), its RGB images",
        categories=("bagel", "cable_gland", "carrot", "cookie", "dowel", "foam", "peach", "potato", "rope", "tire"),
        marker="*/train/good/rgb",
        train="{category}/train/good/rgb/{name}",
        validation="{category}/validation/good/rgb/{name}",
        test="{category}/test/{defect}/rgb/{name}",
        mask="{category}/test/{defect}/gt/{stem}.png",
        total=Counts(2656, 1197, 249),
    ),
    "btad": DescribedSet(
        title=f"BTAD, beanTech ({_NC}; Mishra et al., VT-ADL: A Vision Transformer Network for Image Anomaly Detection "
        "and Localization, ISIE 2021)",
        categories=("01", "02", "03"),
        marker="*/train/ok",
        train="{category}/train/ok/{name}",
        test="{category}/test/{defect}/{name}",
        mask="{category}/ground_truth/{defect}/{stem}.{suffix}",
        good="ok",
    ),
    "mpdd": DescribedSet(
        title="MPDD (for its licence see the download; Jezek et al., Deep learning-based defect detection of metal "
        "parts: evaluating current methods in complex conditions, ICUMT 2021)",
        categories=("bracket_black", "bracket_brown", "bracket_white", "connector", "metal_plate", "tubes"),
        marker="*/train/good",
        train="{category}/train/good/{name}",
        test="{category}/test/{defect}/{name}",
        mask="{category}/ground_truth/{defect}/{stem}_mask.png",
        total=Counts(888, 458, 176),
    ),
}
"""Data sets by the name that ``recontrast prepare`` takes."""
