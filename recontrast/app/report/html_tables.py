"""Tables of the report: metrics, recall by defect type, recipe and versions."""

import json
from collections.abc import Mapping
from html import escape

import recontrast
from recontrast.app.report.findings import Findings, Recall
from recontrast.checkpoint import Checkpoint
from recontrast.data.roi import describe_roi
from recontrast.evaluation.results import METRICS, Row, format_metrics, list_extra
from recontrast.recipes.paper import RECIPES
from recontrast.recipes.recipe import Recipe

LABELS = {**METRICS, "aupro": "AUPRO, data set", "aupro_per_image": "AUPRO, per image"}
MEANING = {
    "i_auroc": "images: probability that a defective image scores higher than a good one",
    "i_ap": "images: average precision",
    "i_f1": "images: highest F1 over all thresholds",
    "i_accuracy": "images: accuracy at the threshold with the highest F1",
    "p_auroc": "pixels: probability that a defective pixel scores higher than a good one",
    "p_ap": "pixels: average precision",
    "p_f1": "pixels: highest F1 over all thresholds",
    "aupro": "regions: mean overlap up to 30 % false positive pixels; comparable with other papers",
    "aupro_per_image": "regions: the same per image, as in the authors' code; not comparable with the row above",
}
EXTRA_MEANING = "measure of the benchmark that the data set belongs to"


def render_metrics(findings: Findings) -> str:
    """Return the HTML of the metrics: with explanations for one category, by category and mean for several."""
    rows = findings.result.rows
    names = [name for name in METRICS if any(getattr(row, name) is not None for row in rows)]
    table_rows = [*rows, findings.result.mean] if len(rows) > 1 else rows
    table = _render_one_category(rows[0], names) if len(rows) == 1 else _render_categories(table_rows, names)
    notes = "".join(f"<p>{escape(row.category)}: {escape(row.note)}.</p>" for row in table_rows if row.note)
    result = findings.result
    size = f"{result.size[1]} &times; {result.size[0]} px"
    size = size if result.tile is None else f"image size, computed in tiles of {size}"
    settings = (
        f'<p class="dim">Anomaly maps: {size}; reduction over the feature pairs: {result.reduce}; '
        f"blur: {result.blur}; image score: {result.score}; mask rule: {result.mask_rule}.</p>"
    )
    title = '<h2 id="metrics">Metrics, in percent</h2>'
    return f'<section aria-labelledby="metrics">{title}{table}{notes}{settings}</section>\n'


def _render_one_category(row: Row, names: list[str]) -> str:
    if not names:
        return ""
    lines = "".join(
        f'<tr><th scope="row">{LABELS[name]}</th><td class="n">{format_metric(row, name)}</td>'
        f'<td class="dim">{MEANING[name]}</td></tr>'
        for name in names
    )
    lines += "".join(
        f'<tr><th scope="row">{escape(heading)}</th><td class="n">{cell}</td><td class="dim">{EXTRA_MEANING}</td></tr>'
        for heading, cell in zip(row.extra, format_metrics(row, [], list(row.extra)), strict=True)
    )
    return (
        '<table class="meaning"><thead><tr><th scope="col">Metric</th><th scope="col" class="n">Percent</th>'
        f'<th scope="col">Meaning</th></tr></thead><tbody>{lines}</tbody></table>'
    )


def _render_categories(rows: list[Row], names: list[str]) -> str:
    extra = list_extra(rows)
    heads = "".join(f'<th scope="col" class="n">{escape(h)}</th>' for h in [*(LABELS[name] for name in names), *extra])
    lines = ""
    for row in rows:
        values = [*(format_metric(row, name) for name in names), *format_metrics(row, [], extra)]
        cells = "".join(f'<td class="n">{value}</td>' for value in values)
        kind = ' class="mean"' if row is rows[-1] else ""
        lines += f'<tr{kind}><th scope="row">{escape(row.category)}</th><td class="n">{row.images}</td>{cells}</tr>'
    meaning = "".join(_render_entry(LABELS[name], MEANING[name]) for name in names)
    meaning += "".join(_render_entry(heading, EXTRA_MEANING) for heading in extra)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Metrics by category"><table><thead><tr>'
        f'<th scope="col">Category</th><th scope="col" class="n">Images</th>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
        f'<details><summary>Meaning of the metrics</summary><dl class="facts">{meaning}</dl></details>'
    )


def render_recalls(findings: Findings) -> str:
    """Return the HTML of the recall of each defect type and the false alarm rate of good images."""
    several, lines = len(findings.sections) > 1, ""
    for section in findings.sections:
        for recall in section.recalls:
            low, high = recall.interval
            name = escape(f"{section.row.category}, {recall.defect}" if several else recall.defect)
            kind = "defect" if recall.label else "alarm"
            bar = (
                '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
                '<rect class="rail" width="100" height="10"/>'
                f'<rect class="{kind}" width="{100 * recall.rate:.1f}" height="10"/>'
                f'<rect class="spread" x="{100 * low:.1f}" y="4" width="{100 * (high - low):.1f}" height="2"/></svg>'
            )
            lines += (
                f'<tr><th scope="row">{name}{"" if recall.label else " (false alarms)"}</th>'
                f'<td class="n">{recall.called} of {recall.images}</td><td class="n">{100 * recall.rate:.0f} %</td>'
                f'<td class="bars">{bar}</td><td class="n dim">{format_interval(recall)}</td></tr>'
            )
    if not lines:
        return ""
    return (
        '<section aria-labelledby="recall"><h2 id="recall">Recall by defect type</h2><table class="recalls">'
        '<thead><tr><th scope="col">Type</th><th scope="col" class="n">Called defects</th>'
        '<th scope="col" class="n">Share</th><td class="bars"></td>'
        f'<th scope="col" class="n">95 % interval</th></tr></thead><tbody>{lines}</tbody></table></section>\n'
    )


def render_details(recipe: Recipe, checkpoint: Checkpoint, about: Mapping[str, str]) -> str:
    """Return the HTML of the collapsed sections: run and recipe, versions and hardware."""
    base = RECIPES.get(recipe.name)
    defaults = {} if base is None else base.to_dict()
    values = recipe.to_dict()
    if recipe.roi is not None:
        values["roi"] = describe_roi(recipe.roi)
    run = {
        "trained on": checkpoint.category,
        "training tiles" if recipe.tile else "training images": str(checkpoint.images.get("count", "?")),
        "training steps": str(checkpoint.step),
    }
    for is_changed in (True, False):
        for key, value in values.items():
            if (defaults.get(key, value) != value) is is_changed:
                run[f"{key} (changed)" if is_changed else key] = json.dumps(value)
    versions = {
        "trained with": f"recontrast {checkpoint.version}",
        "reported with": f"recontrast {recontrast.__version__}",
        **{key: value for key, value in about.items() if key != "recontrast"},
    }
    return "".join(
        f'<section class="folded"><details><summary><h2>{title}</h2></summary>'
        f'<dl class="facts">{"".join(_render_entry(*item) for item in entries.items())}</dl></details></section>\n'
        for title, entries in (("Run and recipe", run), ("Versions and hardware", versions))
    )


def pool_recalls(findings: Findings, *, defects: bool) -> Recall | None:
    """Return the recall over the defective or the good images of all categories; None without decisions or images."""
    selected = [r for section in findings.sections for r in section.recalls if bool(r.label) is defects]
    images = sum(recall.images for recall in selected)
    return Recall("", int(defects), images, sum(recall.called for recall in selected)) if images else None


def format_metric(row: Row, name: str) -> str:
    """Return a metric in percent, or "-" if it is undefined."""
    value = getattr(row, name)
    return "-" if value is None else f"{100 * value:.2f}"


def format_percent(share: float) -> str:
    """Return a share in percent."""
    return f"{100 * share:.3g} %"


def format_interval(recall: Recall) -> str:
    """Return the confidence interval of a rate in percent."""
    low, high = recall.interval
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def _render_entry(name: str, value: str) -> str:
    return f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
