"""The table of a comparison with the paper."""

from recontrast.experiments.comparison import Comparison, Line


def test_metrics_that_an_entry_lacks_stay_empty():
    lines = [
        Line("ours", "mean", "i_auroc", 1, 0.9, None, 0.8),
        Line("ours", "mean", "aupro_per_image", 1, 0.7, None, None),
        Line("patchcore", "mean", "i_auroc", 1, 0.6, None, 0.5),
        Line("patchcore", "mean", "aupro", 1, 0.4, None, None),
    ]
    header, rows = Comparison("mvtec", "title", lines, []).cells()
    assert header[2::3] == ["I-AUROC", "AUPRO per image", "AUPRO"] and all(len(row) == len(header) for row in rows)
    assert rows[0][2::3] == ["90.00", "70.00", "-"] and rows[1][2::3] == ["60.00", "-", "40.00"]
