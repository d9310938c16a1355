"""Tables of the page: metrics, recall by kind of defect, recipe, versions."""

import json
from collections.abc import Mapping
from html import escape

import recontrast
from recontrast.app.report.findings import Findings, Recall
from recontrast.checkpoint import Checkpoint
from recontrast.evaluation.results import METRICS, Row
from recontrast.recipes.paper import RECIPES
from recontrast.recipes.recipe import Recipe

LABELS = {**METRICS, "aupro": "AUPRO, data set", "aupro_per_image": "AUPRO, per image"}
MEANING = {
    "i_auroc": "images: how often a defective one scores higher than a good one",
    "i_ap": "images: average precision",
    "i_f1": "images: largest F1 over all thresholds",
    "i_accuracy": "images: decided rightly at the threshold of that F1",
    "p_auroc": "pixels: how often a defective one scores higher than a good one",
    "p_ap": "pixels: average precision",
    "p_f1": "pixels: largest F1 over all thresholds",
    "aupro": "mean overlap of all defect regions, up to 30 % false positive pixels; compares with other papers",
    "aupro_per_image": "each image alone, as in ReContrast's own code; does not compare with the one above",
}


def metrics(findings: Findings) -> str:
    """Of one category with what each says; of several by category, with their mean."""
    rows = [section.row for section in findings.sections]
    names = [name for name in METRICS if any(getattr(row, name) is not None for row in rows)]
    shown = [*rows, findings.result.mean] if len(rows) > 1 else rows
    table = _of_one(rows[0], names) if len(rows) == 1 else _of_several(shown, names)
    notes = "".join(f"<p>{escape(row.category)}: {escape(row.note)}.</p>" for row in shown if row.note)
    result = findings.result
    size = f"{result.size[1]} &times; {result.size[0]} px"
    size = size if result.tile is None else f"the size of the images, from tiles of {size}"
    how = (
        f'<p class="dim">Maps of {size}, {result.reduce} of the pairs, '
        f"blur {result.blur}, score {result.score}, mask rule {result.mask_rule}.</p>"
    )
    return (
        f'<section aria-labelledby="metrics"><h2 id="metrics">Metrics, in percent</h2>{table}{notes}{how}</section>\n'
    )


def _of_one(row: Row, names: list[str]) -> str:
    if not names:
        return ""
    lines = "".join(
        f'<tr><th scope="row">{LABELS[name]}</th><td class="n">{cell(row, name)}</td>'
        f'<td class="dim">{MEANING[name]}</td></tr>'
        for name in names
    )
    return (
        '<table class="meaning"><thead><tr><th scope="col">Metric</th><th scope="col" class="n">percent</th>'
        f'<th scope="col">What it says</th></tr></thead><tbody>{lines}</tbody></table>'
    )


def _of_several(rows: list[Row], names: list[str]) -> str:
    heads = "".join(f'<th scope="col" class="n">{LABELS[name]}</th>' for name in names)
    lines = ""
    for row in rows:
        cells = "".join(f'<td class="n">{cell(row, name)}</td>' for name in names)
        kind = ' class="mean"' if row is rows[-1] else ""
        lines += f'<tr{kind}><th scope="row">{escape(row.category)}</th><td class="n">{row.images}</td>{cells}</tr>'
    meaning = "".join(_fact(LABELS[name], MEANING[name]) for name in names)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Metrics by category"><table><thead><tr>'
        f'<th scope="col">Category</th><th scope="col" class="n">images</th>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
        f'<details><summary>What the metrics say</summary><dl class="facts">{meaning}</dl></details>'
    )


def recalls(findings: Findings) -> str:
    """Share of the images of each kind of defect that are found, and of the good ones that raise an alarm."""
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
                f'<td class="bars">{bar}</td><td class="n dim">{interval(recall)}</td></tr>'
            )
    if not lines:
        return ""
    return (
        '<section aria-labelledby="recall"><h2 id="recall">Recall, by type of defect</h2><table class="recalls">'
        '<thead><tr><th scope="col">Type</th><th scope="col" class="n">called a defect</th>'
        '<th scope="col" class="n">share</th><td class="bars"></td>'
        f'<th scope="col" class="n">95 % interval</th></tr></thead><tbody>{lines}</tbody></table></section>\n'
    )


def facts(recipe: Recipe, checkpoint: Checkpoint, about: Mapping[str, str]) -> str:
    """The run and its recipe, versions and hardware: folded."""
    base = RECIPES.get(recipe.name)
    usual = {} if base is None else base.to_dict()
    values = recipe.to_dict()
    run = {
        "trained on": checkpoint.category,
        "training images": str(checkpoint.images.get("count", "?")),
        "steps done": str(checkpoint.step),
    }
    for changed in (True, False):
        for key, value in values.items():
            if (usual.get(key, value) != value) is changed:
                run[f"{key} (changed)" if changed else key] = json.dumps(value)
    versions = {
        "trained with": f"recontrast {checkpoint.version}",
        "reported with": f"recontrast {recontrast.__version__}",
        **{key: value for key, value in about.items() if key != "recontrast"},
    }
    return "".join(
        f'<section class="folded"><details><summary><h2>{title}</h2></summary>'
        f'<dl class="facts">{"".join(_fact(*item) for item in found.items())}</dl></details></section>\n'
        for title, found in (("Run and recipe", run), ("Versions and hardware", versions))
    )


def together(findings: Findings, *, defects: bool) -> Recall | None:
    """Over all categories: of images with a defect, or of good ones; None where there is no decision or no image."""
    found = [r for section in findings.sections for r in section.recalls if bool(r.label) is defects]
    images = sum(recall.images for recall in found)
    return Recall("", int(defects), images, sum(recall.called for recall in found)) if images else None


def cell(row: Row, name: str) -> str:
    """A metric in percent."""
    value = getattr(row, name)
    return "-" if value is None else f"{100 * value:.2f}"


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.3g} %"


def interval(recall: Recall) -> str:
    """The confidence interval of a rate in percent."""
    low, high = recall.interval
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def _fact(name: str, value: str) -> str:
    return f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
