"""The gallery: image, heat map and mask of each shot, and the controls that choose among them."""

from collections.abc import Sequence
from html import escape

from recontrast.app.report.findings import FALSE_ALARM, FOUND, MISSED, OPEN, PASSED, Section, Shot
from recontrast.app.report.thumbnails import Pictures

SIGNS = {MISSED: "✕", FALSE_ALARM: "!", FOUND: "✓", PASSED: "✓", OPEN: "?"}  # beside the word, never instead of it


def gallery(
    sections: Sequence[Section], shots: Sequence[Shot], pictures: Sequence[Pictures], total: int, legend: str
) -> str:
    """The section of the page.

    Args:
        sections: for the thresholds.
        shots: those shown, in order.
        pictures: one of each.
        total: images that were evaluated.
        legend: of the heat colours.
    """
    thresholds = {section.row.category: section.threshold for section in sections}
    cards = "".join(_card(s, p, thresholds[s.sample.category]) for s, p in zip(shots, pictures, strict=True))
    left = "" if len(shots) == total else f" Of {total} images these {len(shots)} are shown (--images)."
    order = "the highest score first" if all(s.outcome == OPEN for s in shots) else (
        "the worst error first, then what was decided rightly, by the narrowest margin first"
    )  # fmt: skip
    return f"""<section id="gallery" aria-labelledby="gallery-title">
<h2 id="gallery-title">Images</h2>
<p>Sorted by error: {order}.{left} In each row: the image, the heat map, and the mask that a person drew.</p>
<form id="controls" aria-label="Choose images">
{_choice("category", "Category", [shot.sample.category for shot in shots])}
{_choice("defect", "Defect type", [shot.sample.defect for shot in shots])}
{_choice("outcome", "Outcome", [shot.outcome for shot in shots])}
<p class="mix"><label for="mix">Middle picture</label>
<span class="ends"><span aria-hidden="true">image</span>
<input type="range" id="mix" min="0" max="100" step="5" value="50" aria-valuetext="image with heat map">
<span aria-hidden="true">heat map</span></span></p>
<p class="count" role="status"><output id="count">{len(shots)} of {len(shots)} images</output></p>
</form>
{legend}
<ol id="cards">{cards}</ol>
<p id="none" hidden>No image is all of that. <button type="button" id="reset">Show all images</button></p>
</section>"""


def _choice(key: str, label: str, values: Sequence[str]) -> str:
    found = sorted(set(values), key=lambda value: (list(SIGNS).index(value) if value in SIGNS else 0, value))
    options = "".join(
        f'<option value="{escape(value)}">{escape(value)} ({values.count(value)})</option>' for value in found
    )
    hidden = " hidden" if len(found) < 2 else ""
    return (
        f'<p{hidden}><label for="of-{key}">{label}</label>'
        f'<select id="of-{key}" data-key="{key}"><option value="">all</option>{options}</select></p>'
    )


def _card(shot: Shot, pictures: Pictures, threshold: float | None) -> str:
    sample = shot.sample
    name = escape(sample.path.name)
    what = f"{sample.category}, {sample.defect}" if sample.label else f"{sample.category}, good"
    if pictures.mask is not None:
        drawn = f'<img src="{pictures.mask}" alt="Mask of the defect" decoding="async">'
        mask = f'<span class="pic">{drawn}</span>'
    else:
        mask = f'<span class="pic empty">{"no mask" if sample.label else "no defect"}</span>'
    times = "" if not threshold else f' <span class="dim">{shot.score / threshold:.2f} &times; threshold</span>'
    p_value = "" if shot.p_value is None else f' <span class="dim">p = {shot.p_value:.3g}</span>'
    wrong = " wrong" if shot.outcome in (MISSED, FALSE_ALARM) else ""
    return (
        f'<li class="card{wrong}" data-category="{escape(sample.category)}" data-defect="{escape(sample.defect)}" '
        f'data-outcome="{shot.outcome}"><figure style="--ratio:{pictures.ratio:.4f}">'
        f'<span class="panes"><span class="pic"><img class="photo" src="{pictures.image}" '
        f'alt="Image {name}" decoding="async"></span>'
        f'<span class="pic mixed"><img class="heat" src="{pictures.heat}" '
        f'alt="Heat map of {name}" decoding="async"></span>{mask}</span>'
        f'<figcaption><strong class="outcome"><span aria-hidden="true">{SIGNS[shot.outcome]}</span> {shot.outcome}'
        f'</strong> <span class="score">{shot.score:#.4g}</span>{times}{p_value}'
        f'<span class="file">{escape(what)}<br><span title="{escape(str(sample.path))}">{name}</span></span>'
        f"</figcaption></figure></li>"
    )
