"""Files of ``recontrast audit``: a table of all images, a page with those that look least like the others, a list."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from recontrast.app.report.thumbnails import encode_uri
from recontrast.data import heatmaps
from recontrast.data.atomic import replace_files
from recontrast.data.csv_table import Rounded, format_table
from recontrast.data.dataset_sample import Sample
from recontrast.data.html_page import read_style, render_single_file, render_today
from recontrast.data.image_files import IMAGE_ERRORS
from recontrast.data.image_lists import write_list
from recontrast.data.images import read_image, reserve_memory
from recontrast.data.own_files import check_replaceable, is_own
from recontrast.data.window import to_levels
from recontrast.training.audit import STANDS_OUT, AuditedImage

FILES = ("audit.csv", "audit.html")
CLEAN = "clean.csv"
SIDE = 224  # longest side of a picture in pixels
CARDS = ".audited { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 2rem 1.5rem; }\n"


def choose_images(audited: Mapping[str, Sequence[AuditedImage]], share: float) -> list[Sample]:
    """Return the images to leave out: the given share of each category, those that look least like the others.

    Args:
        audited: Images of each category, the highest score first.
        share: Share of the images, between 0 and 1.

    Raises:
        ValueError: If the share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"--clean: wanted a share between 0 and 1, got {share:g}")
    chosen = []
    for images in audited.values():
        count = min(max(round(share * len(images)), 1), len(images) - 1)  # at least one, and one that stays
        chosen += [image.sample for image in images[:count]]
    return chosen


def write_audit(
    out: Path, audited: Mapping[str, Sequence[AuditedImage]], groups: Mapping[str, Sequence[Sample]],
    *, errors: Mapping[Path, str] | None = None, left_out: Sequence[Sample] | None = None, images: int = 60,
    overwrite: bool = False,
) -> list[Path]:  # fmt: skip
    """Write ``audit.csv`` and ``audit.html``, and ``clean.csv`` if images are left out; all of them or none.

    A ``clean.csv`` of an earlier audit is removed.

    Args:
        out: Folder, which is created.
        audited: Images of each category, the highest score first.
        groups: All samples by category, for the list.
        errors: Error message of each file that could not be read; the list does not have it.
        left_out: Training images that the list does not have. None writes no list.
        images: Largest number of images of each category on the page.
        overwrite: Whether files of others are replaced.

    Returns:
        Paths of the files.

    Raises:
        ValueError: If a file of others has one of the names.
        OSError: If a file cannot be written; existing files are then unchanged.
    """
    is_listed, errors = left_out is not None, errors or {}
    names = [*FILES, CLEAN] if is_listed else [*FILES]
    check_replaceable(out, names, overwrite=overwrite)
    gone = {sample.path for sample in left_out or ()}
    header = ("rank", "path", "category", "score", "z_score", "left_out", "error")
    rows: list[tuple[Any, ...]] = [
        (rank, str(image.sample.path), category, Rounded(image.score), Rounded(image.z_score),
         int(image.sample.path in gone), None)
        for category, group in audited.items()
        for rank, image in enumerate(group, 1)
    ]  # fmt: skip
    categories = {sample.path: name for name, group in groups.items() for sample in group}
    rows += [(None, str(path), categories.get(path), None, None, 1, text) for path, text in errors.items()]
    page = render_page(audited, gone, images)
    has_old_list = not is_listed and is_own(out / CLEAN)
    with replace_files(out, remove=[CLEAN] if has_old_list else []) as staging:
        (staging / FILES[0]).write_bytes(format_table([header, *rows]))
        (staging / FILES[1]).write_bytes(page.encode(errors="backslashreplace"))
        if is_listed:
            gone |= errors.keys()
            kept = {name: [sample for sample in group if sample.path not in gone] for name, group in groups.items()}
            write_list(staging / CLEAN, kept)
    return [out / name for name in names]


def render_page(audited: Mapping[str, Sequence[AuditedImage]], left_out: set[Path], count: int) -> str:
    """Return the HTML page, which needs nothing but itself.

    Args:
        audited: Images of each category, the highest score first.
        left_out: Images that the list does not have.
        count: Largest number of images of each category.
    """
    total = sum(map(len, audited.values()))
    title = f"{total} good images audited"
    sections = "".join(_render_category(*item, left_out, count) for item in audited.items())
    body = f"""<main>
<header>
<p class="kind">Audit of training images</p>
<h1>{escape(title)}</h1>
<p class="dim">The images that look least like the others come first: look at them, and decide which are defects.
Each image was compared with the others alone. The score is the largest distance of one of its points to the nearest
point of another image; the bright part of the heat map is where. An image stands out if its modified z-score is above
{STANDS_OUT}: so many robust standard deviations above the median. That is a place to look, not a decision.
{render_today()}</p>
</header>
{sections}</main>"""
    style = read_style("recontrast.app.report", "recontrast.app.compare") + CARDS
    return render_single_file(title, body, generator="Anomaly detection audit", style=style)


def _render_category(category: str, images: Sequence[AuditedImage], left_out: set[Path], count: int) -> str:
    name = escape(category.encode(errors="backslashreplace").decode())
    top = max(image.score for image in images)
    low = float(np.median([np.median(image.distances) for image in images]))
    cards = "".join(
        _render_card(rank, image, (low, top), image.sample.path in left_out)
        for rank, image in enumerate(images[:count], 1)
    )
    standing = sum(image.stands_out for image in images)
    verb = "stands" if standing == 1 else "stand"
    shown = f"The first {count} are shown." if count < len(images) else ""
    return (
        f'<section aria-label="{name}"><h2>{name}</h2><p>{len(images)} images, of which {standing} {verb} out. {shown}'
        f'</p><ol class="differing audited">{cards}</ol></section>\n'
    )


def _render_card(rank: int, image: AuditedImage, heat: tuple[float, float], is_left_out: bool) -> str:
    path = str(image.sample.path).encode(errors="backslashreplace").decode()
    note = ("stands out, " if image.stands_out else "") + ("left out of the list, " if is_left_out else "")
    text = f"{note}score {image.score:.4g}, modified z-score {image.z_score:.1f}"
    try:
        photo, overlay = _draw(image, heat)
    except IMAGE_ERRORS:  # it was deleted or damaged after it was read
        pictures = "<p>The image cannot be read any more.</p>"
    else:
        pictures = "".join(
            f'<figure><img src="{uri}" alt="{escape(Path(path).name)}: {kind}" loading="lazy"></figure>'
            for uri, kind in ((photo, "photograph"), (overlay, "heat map"))
        )
    return (
        f'<li><p><b>{rank}. {escape(text)}</b> <span class="file">{escape(path)}</span></p>'
        f'<div class="methods">{pictures}</div></li>'
    )


def _draw(image: AuditedImage, heat: tuple[float, float]) -> tuple[str, str]:
    """Return the photograph and its heat map as data URIs."""
    with reserve_memory(image.sample.path):
        picture = Image.fromarray(to_levels(read_image(image.sample.path, bits=image.bits, window=image.window)))
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    photo = np.asarray(picture)
    values = (image.distances - heat[0]) / max(heat[1] - heat[0], 1e-12)
    overlay = Image.fromarray(heatmaps.draw_overlay(photo, heatmaps.resize_map(values, photo.shape[:2])))
    return encode_uri(picture, "WEBP", quality=78, method=4), encode_uri(overlay, "WEBP", quality=78, method=4)
