"""HTML page of a comparison, with inline style and pictures. All text from outside the package is escaped."""

from collections.abc import Sequence
from html import escape

from recontrast.app.compare.gallery import Card, render_gallery
from recontrast.app.compare.tables import Column, Summary
from recontrast.data.html_page import read_style, render_single_file, render_today


def render_page(summary: Summary, cards: Sequence[Card]) -> str:
    """Return the HTML of a comparison.

    Args:
        summary: Tables and recommendation.
        cards: Images of the gallery, in order.
    """
    title = f"{summary.category}: {len(summary.results)} methods compared"
    body = "".join((
        _render_header(summary, title),
        _render_table(summary, "accuracy", "Accuracy", summary.accuracy_columns()),
        _render_table(summary, "cost", "Time, memory and file size", summary.cost_columns()),
        _render_agreement(summary),
        render_gallery(cards, summary.pool, summary.noun),
        _render_notes(summary),
    ))  # fmt: skip
    return render_single_file(
        title, f"<main>\n{body}</main>", generator="Anomaly detection comparison",
        style=read_style("recontrast.app.report", "recontrast.app.compare"),
    )  # fmt: skip


def _render_header(summary: Summary, title: str) -> str:
    recommended = ""
    if summary.recommendation is not None:
        recommended = f'<p class="recommended"><b>Recommended:</b> {escape(summary.recommendation.sentence)}</p>'
    failed = "".join(
        f"<p>{escape(result.name)} has no results: {escape(result.error)}</p>"
        for result in summary.results
        if result.error is not None
    )
    return f"""<header>
<p class="kind">Comparison of methods</p>
<h1>{escape(title)}</h1>
<p class="dim">{escape(", ".join(f"{name} {value}" for name, value in summary.settings.items()))};
{render_today()}</p>
{recommended}{failed}
</header>
"""


def _render_table(summary: Summary, anchor: str, title: str, columns: Sequence[Column]) -> str:
    if not columns:
        return ""
    chosen = None if summary.recommendation is None else summary.recommendation.method
    heads = "".join(f'<th scope="col" class="n">{escape(column.title)}</th>' for column in columns)
    rows = ""
    for index, result in enumerate(summary.measured):
        cells = "".join(
            f'<td class="n" data-title="{escape(column.title)}">{escape(column.cells[index])}</td>'
            for column in columns
        )
        mark = ' class="best"' if result.name == chosen else ""
        rows += f'<tr{mark}><th scope="row">{escape(result.name)}</th>{cells}</tr>'
    meanings = "".join(f"<dt>{escape(column.title)}</dt><dd>{escape(column.meaning)}</dd>" for column in columns)
    return (
        f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{title}</h2>'
        f'<table class="methods-table"><thead><tr><th scope="col">Method</th>{heads}</tr></thead>'
        f'<tbody>{rows}</tbody></table><details><summary>Meaning of the columns</summary><dl class="facts">{meanings}'
        "</dl></details></section>\n"
    )


def _render_agreement(summary: Summary) -> str:
    """Return the HTML of the rank correlation of each pair, one line for each pair."""
    names = list(summary.agreement)
    pairs = [
        (name, other, value)
        for position, name in enumerate(names)
        for other in names[position + 1 :]
        if (value := summary.agreement[name].get(other)) is not None
    ]
    if not pairs:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)} and {escape(other)}</th><td class="n">{value:.2f}</td></tr>'
        for name, other, value in sorted(pairs, key=lambda pair: -pair[2])
    )
    return (
        '<section aria-labelledby="agreement"><h2 id="agreement">Agreement</h2>'
        f"<p>Rank correlation (Spearman) of the scores of {summary.pool} {summary.noun}s that no method was trained "
        "on: 1 for the same order, 0 for unrelated ones.</p>"
        f'<table class="matrix"><thead><tr><th scope="col">Methods</th><th scope="col" class="n">Correlation</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></section>\n"
    )


def _render_notes(summary: Summary) -> str:
    notes = "".join(f"<p>{escape(note)}.</p>" for note in summary.notes)
    return f'<section aria-labelledby="notes"><h2 id="notes">How it was measured</h2>{notes}</section>\n'
