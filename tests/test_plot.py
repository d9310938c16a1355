"""Tests of `benchmarks/plot.py`: table and plot of benchmark results."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "plot.py"
RECORD = {
    "about": {"device": "a <GPU>", "torch": "2.11.0", "date": "2026-01-02"},
    "rows": [
        {"group": "loss", "name": "reference", "ms": 30.0, "GB/s": 100.0},
        {"group": "loss", "name": "ours", "ms": 2.0, "GB/s": 1500.0, "peak MB": 12.5},
        {"group": "loss", "name": "repaired", "failed": "out of memory"},
        {"group": "evaluation", "name": "reference, batch 1", "ms": 50.0, "images/s": 20.0},
        {"group": "evaluation", "name": "ours, batch 64", "ms": 800.0, "images/s": 80.0},
    ],
}


def test_table_and_plot(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(RECORD))
    process = subprocess.run([sys.executable, SCRIPT, path], capture_output=True, text=True, check=True)
    lines = process.stdout.splitlines()
    assert lines[0] == "device a <GPU>, torch 2.11.0, date 2026-01-02"
    assert lines[4:6] == [
        "| loss | ours | 2 ms | 1.00 | 1500 |  | 12.5 |",
        "|  | reference | 30 ms | 15.00 | 100 |  |  |",
    ]
    assert "| reference, batch 1 | 50 ms | 4.00 |" in lines[7]  # the ratio is per image, not per call
    svg = ElementTree.parse(path.with_suffix(".svg")).getroot()
    assert len([e for e in svg if e.tag.endswith("rect")]) == 1 + 4
    assert any("15.00 x" in (e.text or "") for e in svg)


def test_no_file_is_an_error():
    process = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert process.returncode == 1
    assert "wanted at least one JSON" in process.stderr


def test_plot_of_budgets(tmp_path):
    """A point for each method and budget in each panel; a metric that no run has leaves no panel."""
    common = {"category": "nut", "p_ap": 1.0, "seconds": 3.0}
    runs = [
        {**common, "method": method, "budget": budget, "seed": seed, "cpu_seconds": budget / 3,
         "i_auroc": 90.0 + seed, "p_auroc": 80.0, "aupro": None}
        for method in ("budget", "rd4ad") for budget in (15.0, 60.0) for seed in (1, 2)
    ]  # fmt: skip
    path = tmp_path / "budget.json"
    path.write_text(json.dumps({"runs": runs}))
    subprocess.run([sys.executable, SCRIPT.with_name("plot_budget.py"), path], check=True)
    drawing = path.with_suffix(".svg").read_text()
    root = ElementTree.fromstring(drawing)
    circles = [e for e in root.iter() if e.tag.endswith("circle") and e.get("r") == "4"]
    assert len(circles) == 2 * 2 * 2  # methods, budgets, panels
    assert "I-AUROC" in drawing and "P-AUROC" in drawing and "AUPRO" not in drawing
    assert "--budget" in drawing and "PatchCore" not in drawing
