"""Tests of `benchmarks/measurements.py`: results are stored one by one, and a later call continues."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLANNED = [{"method": method, "seed": seed} for method in ("a", "b") for seed in (1, 2)]


@pytest.fixture
def measure_missing(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from measurements import measure_missing

    return measure_missing


def read_runs(path):
    return [(run["method"], run["seed"], run["value"]) for run in json.loads(path.read_text())["runs"]]


def test_a_stopped_measurement_continues(measure_missing, tmp_path):
    out, called = tmp_path / "new/runs.json", []

    def measure(method, seed):
        called.append((method, seed))
        if called == [("a", 1), ("a", 2)]:
            raise RuntimeError("stopped")
        return {"method": method, "seed": seed, "value": [len(called)]}

    with pytest.raises(RuntimeError):
        measure_missing(out, PLANNED, measure)
    assert read_runs(out) == [("a", 1, [1])]
    record = measure_missing(out, PLANNED, measure)
    assert called == [("a", 1), ("a", 2), ("a", 2), ("b", 1), ("b", 2)]
    assert read_runs(out) == [("a", 1, [1]), ("a", 2, [3]), ("b", 1, [4]), ("b", 2, [5])]
    assert record == json.loads(out.read_text()) and record["date"] and record["machine"]


def test_what_has_no_result_is_left_out(measure_missing, tmp_path):
    out = tmp_path / "runs.json"
    record = measure_missing(
        out, PLANNED, lambda method, seed: None if method == "a" else {"method": method, "seed": seed, "value": 0}
    )
    assert read_runs(out) == [("b", 1, 0), ("b", 2, 0)] and len(record["runs"]) == 2


def test_a_repeated_measurement_runs_once(measure_missing, tmp_path):
    out = tmp_path / "runs.json"
    measure_missing(out, PLANNED + PLANNED, lambda **values: {**values, "value": 0})
    assert len(read_runs(out)) == 4
