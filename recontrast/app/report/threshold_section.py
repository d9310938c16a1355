"""What the report says of its threshold: what it promises, or that it promises nothing and how to get one that does."""

from html import escape

from recontrast.app.report import html_tables
from recontrast.app.report.findings import Findings
from recontrast.calibration.conformal import Calibration, false_alarm_interval


def decision(findings: Findings, run: str) -> str:
    """The section of the page; ``run`` as the user named it."""
    known = findings.calibration
    text = _chosen(findings, run) if known is None else _promised(findings, known)
    return f'<section aria-labelledby="threshold"><h2 id="threshold">The threshold</h2>{text}</section>\n'


def _chosen(findings: Findings, run: str) -> str:
    found = [(s.row.category, s.threshold) for s in findings.sections if s.threshold is not None]
    several = len(findings.sections) > 1
    values = ", ".join(f"{escape(name) + ' ' if several else ''}<b>{value:.4g}</b>" for name, value in found)
    used = (
        f"Every decision below uses the score from which on F1 is largest on these very images ({values}). It was "
        "chosen with their labels in view: recall and false alarms look better here than they will on new images, "
        "and nothing is promised."
        if found
        else "Nor can one be chosen on these images, which are not of both kinds: nothing is decided below."
    )
    return (
        f"<p><strong>There is no calibrated threshold.</strong> {used}</p>"
        "<p>A threshold with a promised rate of false alarms needs good images that were not trained on: "
        f"<code>recontrast calibrate {escape(run)} --good DIR --false-alarm-rate 0.01</code>, then this report "
        "again.</p>"
    )


def _promised(findings: Findings, known: Calibration) -> str:
    low, high = false_alarm_interval(known.count, known.rate)
    count, source = known.count, f" ({escape(str(known.source))})" if known.source else ""
    text = (
        f"<p>An image is called a defect where its score is above <b>{known.threshold:.4g}</b>. The threshold comes "
        f"from {count} good images that the detector was not trained on{source}: of new good images like those, at "
        f"most <b>{html_tables.percent(known.rate)}</b> are called defects, on average over such sets of "
        f"{count}; 90 % of such sets give from "
        f"{html_tables.percent(low)} to {html_tables.percent(high)}."
    )
    good = html_tables.together(findings, defects=False)
    if good is not None:
        text += (
            f" Of the {good.images} good test images here {good.called} {'was' if good.called == 1 else 'were'}: "
            f"{html_tables.percent(good.rate)}, 95 % interval {html_tables.interval(good)}."
        )
    text += "</p>" + "".join(f"<p><strong>Warning.</strong> {escape(said)}.</p>" for said in findings.warnings)
    text += (
        "<p>The p-value of an image is the share of good images, itself counted among them, that score at least as "
        f"high; the smallest one is 1/{count + 1}. A defect has a p-value of at most {known.rate:.3g}.</p>"
    )
    if known.pixel_threshold is not None:
        share = html_tables.percent(known.pixel_rate)
        promise = (
            f"of a good image at most {share}, on average"
            if known.pixel_guarantee
            else f"of the calibration images' pixels {share}, which is no guarantee for others"
        )
        text += f"<p>In a map, what is above {known.pixel_threshold:.4g} counts as defective: {promise}.</p>"
    return text
