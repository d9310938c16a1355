"""Gallery of the report: image, heat map and mask of each test image, with filters."""

from collections.abc import Sequence
from html import escape

from recontrast.app.report.findings import FALSE_ALARM, FOUND, MISSED, OPEN, PASSED, UNREAD, Section, Shot, UnreadImage
from recontrast.app.report.thumbnails import Pictures

# Shown next to the word, so that no meaning depends on the sign alone.
SIGNS = {MISSED: "✕", FALSE_ALARM: "!", FOUND: "✓", PASSED: "✓", OPEN: "?", UNREAD: "-"}


def render_gallery(
    sections: Sequence[Section], shots: Sequence[Shot], pictures: Sequence[Pictures], total: int, legend: str,
    unread: Sequence[UnreadImage] = (),
) -> str:  # fmt: skip
    """Return the HTML of the gallery section.

    Args:
        sections: Results by category; their thresholds are used.
        shots: Images to show, in order.
        pictures: Encoded pictures of each image.
        total: Number of evaluated images.
        legend: HTML of the colour legend.
        unread: Images without a score, which come first, each with a placeholder.
    """
    thresholds = {section.row.category: section.threshold for section in sections}
    cards = "".join(map(_render_placeholder, unread))
    cards += "".join(_render_card(s, p, thresholds[s.sample.category]) for s, p in zip(shots, pictures, strict=True))
    samples = [*(image.sample for image in unread), *(shot.sample for shot in shots)]
    outcomes = [*(UNREAD for _ in unread), *(shot.outcome for shot in shots)]
    subset = "" if len(shots) == total else f" The first {len(shots)} of {total} images are shown (see --images)."
    order = (
        "Images with the highest scores come first."
        if all(s.outcome == OPEN for s in shots)
        else "Errors come first, the largest on top. Correct decisions follow, the closest to the threshold first."
    )
    region = "Outlined in blue: the region of interest. Pixels outside it count for nothing."
    region = f" {region}" if any(picture.is_outlined for picture in pictures) else ""
    views = " The other views are below." if any(picture.others for picture in pictures) else ""
    return f"""<section id="gallery" aria-labelledby="gallery-title">
<h2 id="gallery-title">Images</h2>
<p>{order}{subset} Each entry shows the image, the heat map over the image, and the annotated mask.{views}{region}</p>
<form id="controls" aria-label="Filter images">
{_render_filter("category", "Category", [sample.category for sample in samples])}
{_render_filter("defect", "Defect type", [sample.defect for sample in samples])}
{_render_filter("outcome", "Outcome", outcomes)}
<p class="mix"><label for="mix">Heat map overlay</label>
<span class="ends"><span aria-hidden="true">image</span>
<input type="range" id="mix" min="0" max="100" step="5" value="50" aria-valuetext="image with heat map">
<span aria-hidden="true">heat map</span></span></p>
<p class="count" role="status"><output id="count">{len(samples)} of {len(samples)} images</output></p>
</form>
{legend}
<ol id="cards">{cards}</ol>
<p id="none" hidden>No images match these filters. <button type="button" id="reset">Show all images</button></p>
</section>"""


def _render_filter(key: str, label: str, values: Sequence[str]) -> str:
    options = sorted(set(values), key=lambda value: (list(SIGNS).index(value) if value in SIGNS else 0, value))
    items = "".join(
        f'<option value="{escape(value)}">{escape(value)} ({values.count(value)})</option>' for value in options
    )
    hidden = " hidden" if len(options) < 2 else ""
    return (
        f'<p{hidden}><label for="of-{key}">{label}</label>'
        f'<select id="of-{key}" data-key="{key}"><option value="">all</option>{items}</select></p>'
    )


def _render_placeholder(image: UnreadImage) -> str:
    """Return the card of an image without a score: its name and its error."""
    sample, name = image.sample, escape(image.sample.path.name)
    description = f"{sample.category}, {sample.defect if sample.label else 'good'}"
    photo, mask = _render_missing(name), '<span class="pic empty">no mask</span>'
    if sample.mask is not None and str(sample.mask) in image.error:  # the mask is what fails
        photo, mask = '<span class="pic empty missing">left out</span>', _render_missing(escape(sample.mask.name))
    heat = '<span class="pic empty">no heat map</span>'
    error = image.error.removeprefix(f"{sample.path}: ")
    return (
        f'<li class="card wrong" data-category="{escape(sample.category)}" data-defect="{escape(sample.defect)}" '
        f'data-outcome="{UNREAD}"><figure><span class="panes">{photo}{heat}{mask}</span>'
        f'<figcaption><strong class="outcome"><span aria-hidden="true">{SIGNS[UNREAD]}</span> {UNREAD}</strong>'
        f'<span class="file">{escape(description)}<br><span title="{escape(str(sample.path))}">{name}</span><br>'
        f"{escape(error)}</span></figcaption></figure></li>"
    )


def _render_missing(name: str) -> str:
    """Return the placeholder of a picture that cannot be read."""
    return f'<span class="pic empty missing">{name} cannot be read</span>'


def _render_card(shot: Shot, pictures: Pictures, threshold: float | None) -> str:
    sample = shot.sample
    name = escape(sample.path.name)
    description = f"{sample.category}, {sample.defect}" if sample.label else f"{sample.category}, good"
    if pictures.mask is not None:
        image = f'<img src="{pictures.mask}" alt="Mask of the defect" decoding="async">'
        mask = f'<span class="pic">{image}</span>'
    else:
        mask = f'<span class="pic empty">{"no mask" if sample.label else "no defect"}</span>'
    photo = _render_missing(name)
    if pictures.image is not None:
        image = (
            f'<img class="photo" src="{pictures.image}" alt="{_describe_image(name, pictures, 0)}" decoding="async">'
        )
        photo = f'<span class="pic">{image}{_render_view_name(pictures, 0)}</span>'
    details = [f"{shot.score / threshold:.2f} &times; threshold"] if threshold else []
    if shot.p_value is not None:
        details.append(f"p&nbsp;=&nbsp;{shot.p_value:.3g}")
    detail = f' <span class="dim">{", ".join(details)}</span>' if details else ""
    error = "" if pictures.error is None else f"<br>{escape(pictures.error)}"
    wrong = " wrong" if shot.outcome in (MISSED, FALSE_ALARM) else ""
    return (
        f'<li class="card{wrong}" data-category="{escape(sample.category)}" data-defect="{escape(sample.defect)}" '
        f'data-outcome="{shot.outcome}"><figure style="--ratio:{pictures.ratio:.4f}">'
        f'<span class="panes">{photo}'
        f'<span class="pic mixed"><img class="heat" src="{pictures.heat}" '
        f'alt="Heat map of {name}" decoding="async"></span>{mask}</span>{_render_other_views(name, pictures)}'
        f'<figcaption><strong class="outcome"><span aria-hidden="true">{SIGNS[shot.outcome]}</span> {shot.outcome}'
        f'</strong> <span class="score">{shot.score:#.4g}</span>{detail}'
        f'<span class="file">{escape(description)}<br><span title="{escape(str(sample.path))}">{name}</span>{error}'
        f"</span></figcaption></figure></li>"
    )


def _render_other_views(name: str, pictures: Pictures) -> str:
    """Return the HTML of the views of a part but for the first one, side by side; empty without any."""
    if not pictures.others:
        return ""
    items = "".join(
        f'<span class="pic"><img src="{uri}" alt="{_describe_image(name, pictures, number)}" decoding="async">'
        f"{_render_view_name(pictures, number)}</span>"
        for number, uri in enumerate(pictures.others, 1)
    )
    return f'<span class="panes views">{items}</span>'


def _describe_image(name: str, pictures: Pictures, number: int) -> str:
    """Describe an image, or a view of a part, in place of its picture."""
    return f"View {escape(pictures.names[number])} of {name}" if pictures.names else f"Image {name}"


def _render_view_name(pictures: Pictures, number: int) -> str:
    """Return the HTML of the name of a view on its picture; empty without views."""
    return f'<span class="view">{escape(pictures.names[number])}</span>' if pictures.names else ""
