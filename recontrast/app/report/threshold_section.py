"""Section of the report on the threshold: its guarantee, or how to calibrate one."""

from html import escape

from recontrast.app.report import html_tables
from recontrast.app.report.findings import Findings
from recontrast.calibration.conformal import Calibration, false_alarm_interval


def render_threshold(findings: Findings, run: str) -> str:
    """Return the HTML of the threshold section; ``run`` is the path as the user gave it."""
    calibration = findings.calibration
    text = (
        _describe_f1_threshold(findings, run) if calibration is None else _describe_calibration(findings, calibration)
    )
    return f'<section aria-labelledby="threshold"><h2 id="threshold">Threshold</h2>{text}</section>\n'


def _describe_f1_threshold(findings: Findings, run: str) -> str:
    thresholds = [(s.row.category, s.threshold) for s in findings.sections if s.threshold is not None]
    several = len(findings.sections) > 1
    values = ", ".join(f"{escape(name) + ' ' if several else ''}<b>{value:.4g}</b>" for name, value in thresholds)
    text = (
        f"The decisions below use the threshold that maximizes F1 on these test images ({values}). It was chosen with "
        "their labels, so recall and false alarms look better here than they will on new images. It gives no "
        "guarantee."
        if thresholds
        else "No threshold can be chosen on these images either, because they are all good or all defective. The "
        "report makes no decisions."
    )
    return (
        f"<p><strong>There is no calibrated threshold.</strong> {text}</p>"
        "<p>To get a threshold with a guaranteed false alarm rate, calibrate on good images that were not used for "
        f"training and write the report again: <code>recontrast calibrate {escape(run)} --good DIR "
        "--false-alarm-rate 0.01</code></p>"
    )


def _describe_calibration(findings: Findings, calibration: Calibration) -> str:
    low, high = false_alarm_interval(calibration.count, calibration.rate)
    count, source = calibration.count, f" ({escape(str(calibration.source))})" if calibration.source else ""
    units, origin = "images", f"{count} good images"
    if calibration.image_count is not None:
        units, origin = "groups", f"{count} groups of good images ({calibration.image_count} images)"
    text = (
        f"<p>An image is called a defect if its score is above <b>{calibration.threshold:.4g}</b>. The threshold was "
        f"calibrated on {origin} that were not used for training{source}. At most "
        f"<b>{html_tables.format_percent(calibration.rate)}</b> of new good images of the same kind are called "
        f"defects, on average over calibration sets of {count} {units}. For 90 % of such sets the false alarm rate is "
        f"between {html_tables.format_percent(low)} and {html_tables.format_percent(high)}."
    )
    good = html_tables.pool_recalls(findings, defects=False)
    if good is not None:
        text += (
            f" In this test, {good.called} of {good.images} good images {'was' if good.called == 1 else 'were'} called "
            f"defects: {html_tables.format_percent(good.rate)}, 95 % interval {html_tables.format_interval(good)}."
        )
    text += "</p>" + "".join(f"<p><strong>Warning.</strong> {escape(warning)}.</p>" for warning in findings.warnings)
    text += (
        f"<p>The p-value of an image is the share of scores that are at least as high, among the calibration {units} "
        f"and the image itself. The smallest possible p-value is 1/{count + 1}. An image is called a defect if its "
        f"p-value is at most {calibration.rate:.3g}.</p>"
    )
    if calibration.pixel_threshold is not None:
        share = html_tables.format_percent(calibration.pixel_rate)
        guarantee = (
            f"On average at most {share} of the pixels of a good image are called defective"
            if calibration.pixel_guarantee
            else f"This holds for {share} of the pixels of the calibration images, with no guarantee for new images"
        )
        limit = f"{calibration.pixel_threshold:.4g}"
        text += f"<p>A pixel is called defective if its map value is above {limit}. {guarantee}.</p>"
    return text
