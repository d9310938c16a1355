"""HTML page of the report, with inline style and script. All text from outside the package is escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from recontrast.app.report import html_tables, svg
from recontrast.app.report.findings import Findings, Section, Shot
from recontrast.app.report.gallery import render_gallery
from recontrast.app.report.map_summaries import LIMIT
from recontrast.app.report.shown_views import MOST_VIEWS
from recontrast.app.report.threshold_section import render_threshold
from recontrast.app.report.thumbnails import Pictures
from recontrast.checkpoint import Checkpoint
from recontrast.data import heatmaps as heat
from recontrast.data.html_page import read_style, render_single_file, render_today
from recontrast.recipes.recipe import Recipe


def render_page(
    findings: Findings, shots: Sequence[Shot], pictures: Sequence[Pictures], recipe: Recipe, checkpoint: Checkpoint,
    log: Sequence[Mapping[str, Any]], about: Mapping[str, str], run: str,
) -> str:  # fmt: skip
    """Return the HTML of the report.

    Args:
        findings: Content of the report.
        shots: Images of the gallery, in order.
        pictures: Encoded pictures of each image.
        recipe: Recipe of the run.
        checkpoint: Checkpoint of the run; gives the training images and steps.
        log: Log lines of the run with ``step`` and ``loss``; empty if there is no log.
        about: Versions and hardware.
        run: Path of the run as the user gave it.
    """
    names = [row.category for row in findings.result.rows]
    title = f"{names[0] if len(names) == 1 else f'{len(names)} categories'}: detection results"
    body = "".join((
        _render_header(findings, title, recipe, run),
        render_threshold(findings, run),
        html_tables.render_metrics(findings),
        html_tables.render_recalls(findings),
        _render_curves(findings),
        render_gallery(
            findings.sections, shots, pictures, len(findings.shots), _render_legend(findings), findings.unread
        ),
        _render_training(log, checkpoint),
        html_tables.render_details(recipe, checkpoint, about),
    ))  # fmt: skip
    page = f"""<a class="skip" href="#gallery">Skip to the images</a>
<svg width="0" height="0" aria-hidden="true" class="defs"><defs><pattern id="hatch" width="4" height="4"
patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><line class="hatch" y2="4"/></pattern></defs></svg>
<main>
{body}</main>"""
    script = files("recontrast.app.report").joinpath("page.js").read_text(encoding="utf-8")
    return render_single_file(
        title, page, generator="Anomaly detection report", style=read_style("recontrast.app.report"), script=script
    )


def _render_header(findings: Findings, title: str, recipe: Recipe, run: str) -> str:
    mean = findings.result.mean
    numbers = [
        (f"{recall.called} of {recall.images}", label)
        for label, recall in (
            ("defects found", html_tables.pool_recalls(findings, defects=True)),
            ("false alarms on good images", html_tables.pool_recalls(findings, defects=False)),
        )
        if recall is not None
    ]
    numbers += [
        (f"{100 * value:.1f} %", label)
        for value, label in ((mean.i_auroc, "I-AUROC"), (mean.aupro, "AUPRO, data set"))
        if value is not None
    ]
    input_size = f"{recipe.out[1]} &times; {recipe.out[0]} px" if recipe.tile is None else (
        f"original scale in tiles of {recipe.out[0]} px"
    )  # fmt: skip
    cells = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for value, label in numbers)
    return f"""<header>
<p class="kind">Anomaly detection report</p>
<h1>{escape(title)}</h1>
<p class="dim">{escape(run)}, {mean.images} test images,
{input_size}, {escape(recipe.backbone)}{_describe_few(recipe)};
{render_today()}</p>{_describe_views(recipe)}
<dl class="numbers">{cells}</dl>
</header>
"""


def _describe_views(recipe: Recipe) -> str:
    """Return a paragraph that says what counts as an image if parts have several views; else nothing."""
    views = recipe.image_views
    if views is None:
        return ""
    how = "largest value" if recipe.view_map == "max" else "mean"
    shown = "all views"
    if len(views) > MOST_VIEWS:
        shown = f"the {MOST_VIEWS} views whose own maps have the highest values, the highest first"
    text = (
        f"An image in this report is a part with {len(views)} views ({views.describe()}). Its map is the {how} of the "
        f"maps of its views. The pictures show {shown}, and the heat map lies over the first of them."
    )
    return f'\n<p class="dim">{escape(text)}</p>'


def _describe_few(recipe: Recipe) -> str:
    """Return how few images the detector was trained on, to follow a text; empty if it was trained on all."""
    if recipe.shots is None:
        return ""
    shots = recipe.shots.items() if isinstance(recipe.shots, Mapping) else [("each class", recipe.shots)]
    named = ", ".join(f"{count} of {name}" for name, count in shots)
    augmented = "" if recipe.augment == "none" else f", augmented ({recipe.augment})"
    return escape(f", trained on few good images: {named}{augmented}")


def _render_curves(findings: Findings) -> str:
    blocks = ""
    for section in findings.sections:
        head = f"<h3>{escape(section.row.category)}</h3>" if len(findings.sections) > 1 else ""
        blocks += f'{head}<div class="figures">{_render_figures(section)}</div>'
    return f'<section aria-labelledby="curves"><h2 id="curves">Scores and curves</h2>{blocks}</section>\n'


def _render_figures(section: Section) -> str:
    row = section.row
    good, bad = (np.array([s.score for s in section.shots if s.sample.label == label]) for label in (0, 1))
    caption = "good images above the axis, hatched; defective images below"
    if section.threshold is not None:
        caption += f"; dashed line: threshold {section.threshold:.4g}"
    figures = _render_figure(svg.draw_histogram(good, bad, section.threshold, row.category), "Scores", caption)
    if section.roc is not None:
        area, point = html_tables.format_metric(row, "i_auroc"), section.point
        drawing = svg.draw_curve(
            section.roc, "false positive rate, %", "recall, %",
            f"{row.category}: ROC curve, area {area} percent", point,
        )  # fmt: skip
        figures += _render_figure(
            drawing, "ROC", f"images, area {area} %" + ("" if point is None else "; circle: threshold")
        )
    if section.pro is not None:
        area = html_tables.format_metric(row, "aupro")
        drawing = svg.draw_curve(
            section.pro, "false positive pixels, %", "overlap of regions, %",
            f"{row.category}: per-region-overlap curve, area {area} percent",
        )  # fmt: skip
        figures += _render_figure(
            drawing, "PRO", f"defect regions, area {area} % up to {100 * LIMIT:.0f} % false positive pixels"
        )
    return figures


def _render_legend(findings: Findings) -> str:
    """Return the colour legend. Map values of a colour differ by category, the colour of the threshold does not."""
    stops = ", ".join(f"rgb({','.join(map(str, colour))})" for colour in heat.COLOUR_STOPS)
    ends = ["median", "highest value"]
    if all(section.centred for section in findings.sections):
        ends = ["median", "threshold", "2 &times; threshold &minus; median"]
    labels = "".join(f"<span>{end}</span>" for end in ends)
    return (
        f'<p class="legend"><span class="hide">Colours of the heat map from dark to light: </span>'
        f'<span class="ramp" style="background:linear-gradient(90deg, {stops})"></span>{labels}</p>'
    )


def _render_training(log: Sequence[Mapping[str, Any]], checkpoint: Checkpoint) -> str:
    points = [(line["step"], line["loss"]) for line in log if isinstance(line.get("loss"), float)]
    if len(points) > 1:
        unit = "tiles of good images" if checkpoint.recipe.tile else "good images"
        count = checkpoint.images.get("count", "?")
        text = f"{count} {unit}; the loss can rise while mining shifts to harder points"
        drawing = svg.draw_losses([step for step, _ in points], [loss for _, loss in points])
        content = f'<div class="figures">{_render_figure(drawing, "Loss", text)}</div>'
    else:
        content = "<p>No loss curve: there is no log.jsonl with at least two losses next to the checkpoint.</p>"
    folders = [line["data"] for line in log if isinstance(line.get("data"), str)]
    if folders:
        content += f"<details><summary>Training images by folder</summary><pre>{escape(folders[0])}</pre></details>"
    return f'<section aria-labelledby="training"><h2 id="training">Training</h2>{content}</section>\n'


def _render_figure(drawing: str, title: str, text: str) -> str:
    return f"<figure>{drawing}<figcaption><b>{escape(title)}</b> {escape(text)}</figcaption></figure>"
