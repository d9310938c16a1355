"""The page: HTML around the findings, its style and script inside it; what was not written here is escaped."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from recontrast.app.report import html_tables, svg
from recontrast.app.report.findings import Findings, Section, Shot
from recontrast.app.report.gallery import gallery
from recontrast.app.report.map_summaries import LIMIT
from recontrast.app.report.threshold_section import decision
from recontrast.app.report.thumbnails import Pictures
from recontrast.checkpoint import Checkpoint
from recontrast.data import heatmaps as heat
from recontrast.recipes.recipe import Recipe

# Nothing is loaded from anywhere: the browser itself refuses what is not in the file.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(
    findings: Findings, shots: Sequence[Shot], pictures: Sequence[Pictures], recipe: Recipe, checkpoint: Checkpoint,
    log: Sequence[Mapping[str, Any]], about: Mapping[str, str], where: str,
) -> str:  # fmt: skip
    """The whole file.

    Args:
        findings: what was measured.
        shots: of the gallery, in order.
        pictures: one of each.
        recipe: of the run.
        checkpoint: for what it was trained on, and for how long.
        log: lines of the run's log, each with ``step`` and ``loss``; may be empty.
        about: versions and hardware.
        where: the run, as the user named it.
    """
    names = [section.row.category for section in findings.sections]
    title = f"{names[0] if len(names) == 1 else f'{len(names)} categories'}: what the detector finds"
    folder = files("recontrast.app.report")
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    body = "".join((
        _head(findings, title, recipe, where),
        decision(findings, where),
        html_tables.metrics(findings),
        html_tables.recalls(findings),
        _curves(findings),
        gallery(findings.sections, shots, pictures, len(findings.shots), _legend(findings)),
        _training(log, checkpoint),
        html_tables.facts(recipe, checkpoint, about),
    ))  # fmt: skip
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#gallery">Skip to the images</a>
<svg width="0" height="0" aria-hidden="true" class="defs"><defs><pattern id="hatch" width="4" height="4"
patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><line class="hatch" y2="4"/></pattern></defs></svg>
<main>
{body}</main>
<script>{script}</script>
</body>
</html>
"""


def _head(findings: Findings, title: str, recipe: Recipe, where: str) -> str:
    mean, date = findings.result.mean, datetime.now().astimezone()
    numbers = [
        (f"{of.called} of {of.images}", label)
        for label, of in (
            ("defects found", html_tables.together(findings, defects=True)),
            ("good images with a false alarm", html_tables.together(findings, defects=False)),
        )
        if of is not None
    ]
    numbers += [
        (f"{100 * value:.1f} %", label)
        for value, label in ((mean.i_auroc, "I-AUROC"), (mean.aupro, "AUPRO, data set"))
        if value is not None
    ]
    seen = f"{recipe.out[1]} &times; {recipe.out[0]} px" if recipe.tile is None else (
        f"at their own scale in tiles of {recipe.out[0]} px"
    )  # fmt: skip
    cells = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for value, label in numbers)
    return f"""<header>
<p class="kind">Anomaly detection report</p>
<h1>{escape(title)}</h1>
<p class="dim">{escape(where)}, {mean.images} test images,
{seen}, {escape(recipe.backbone)};
<time datetime="{date.isoformat(timespec="seconds")}">{date.day} {date:%B %Y}</time></p>
<dl class="numbers">{cells}</dl>
</header>
"""


def _curves(findings: Findings) -> str:
    blocks = ""
    for section in findings.sections:
        head = f"<h3>{escape(section.row.category)}</h3>" if len(findings.sections) > 1 else ""
        blocks += f'{head}<div class="figures">{_figures(section)}</div>'
    return f'<section aria-labelledby="curves"><h2 id="curves">Scores and curves</h2>{blocks}</section>\n'


def _figures(section: Section) -> str:
    row = section.row
    good, bad = (np.array([s.score for s in section.shots if s.sample.label == label]) for label in (0, 1))
    said = "good images above the line, hatched; defects below it"
    if section.threshold is not None:
        said += f"; broken line: the threshold, {section.threshold:.4g}"
    shown = _figure(svg.histogram(good, bad, section.threshold, row.category), "Scores", said)
    if section.roc is not None:
        area, point = html_tables.cell(row, "i_auroc"), section.point
        drawn = svg.curve(
            section.roc, "good images called defects, %", "defects found, %",
            f"{row.category}: ROC curve, area {area} percent", point,
        )  # fmt: skip
        shown += _figure(
            drawn, "ROC", f"of images, area {area} %" + ("" if point is None else "; circle: the threshold")
        )
    if section.pro is not None:
        area = html_tables.cell(row, "aupro")
        drawn = svg.curve(
            section.pro, "false positive pixels, %", "overlap of regions, %",
            f"{row.category}: per-region-overlap curve, area {area} percent",
        )  # fmt: skip
        shown += _figure(drawn, "PRO", f"of all defect regions, area {area} % up to {100 * LIMIT:.0f} %")
    return shown


def _legend(findings: Findings) -> str:
    """The scale of the heat maps: a colour's value differs by category, its place against the threshold does not."""
    stops = ", ".join(f"rgb({','.join(map(str, colour))})" for colour in heat.COLOUR_STOPS)
    ends = ["median", "highest value"]
    if all(section.centred for section in findings.sections):
        ends = ["median", "threshold", "as far above it"]
    labels = "".join(f"<span>{end}</span>" for end in ends)
    return (
        f'<p class="legend"><span class="hide">Heat colours from dark to light: </span>'
        f'<span class="ramp" style="background:linear-gradient(90deg, {stops})"></span>{labels}</p>'
    )


def _training(log: Sequence[Mapping[str, Any]], checkpoint: Checkpoint) -> str:
    known = [(line["step"], line["loss"]) for line in log if isinstance(line.get("loss"), float)]
    if len(known) > 1:
        text = (
            f"over {checkpoint.images.get('count', '?')} good images; it rises where the mining turns to harder points"
        )
        drawn = _figure(svg.losses([step for step, _ in known], [loss for _, loss in known]), "Loss", text)
        shown = f'<div class="figures">{drawn}</div>'
    else:
        shown = "<p>There is no log.jsonl of two lines or more beside the checkpoint.</p>"
    return f'<section aria-labelledby="training"><h2 id="training">Training</h2>{shown}</section>\n'


def _figure(drawing: str, title: str, text: str) -> str:
    return f"<figure>{drawing}<figcaption><b>{escape(title)}</b> {escape(text)}</figcaption></figure>"
