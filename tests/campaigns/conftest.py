"""Size of the fault-injection campaigns, and the table of what they tried."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FIGURES = "RECONTRAST_CAMPAIGN_FIGURES"  # file to which a test in a new process writes its figures
FORKING = ("test_crashes.py", "test_ray_crashes.py", "test_refused_writes.py", "test_two_writers.py")


def pytest_collection_modifyitems(items):
    for item in items:
        if "campaigns" in item.path.parts:
            item.add_marker(pytest.mark.campaign)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a test that forks in a new process: after a backward pass in this one, PyTorch refuses another in a fork."""
    if pyfuncitem.path.name not in FORKING or FIGURES in os.environ:
        return None
    counter, folder = pyfuncitem.funcargs["campaign"], pyfuncitem.funcargs["tmp_path"]
    figures = folder / "figures.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    command += ["--basetemp", str(folder / "process"), "-m", "campaign" if counter.whole else ""]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {FIGURES: str(figures)}
    result = subprocess.run(
        command, cwd=pyfuncitem.config.rootpath, env=environment, capture_output=True, text=True, errors="replace"
    )
    if figures.exists():
        counter.tried, counter.failures = json.loads(figures.read_text())
    assert result.returncode == 0 or counter.failures, result.stdout[-4000:] + result.stderr[-1000:]
    return True


class Campaign:
    """Counts the trials of one campaign and collects those that failed."""

    def __init__(self, name, whole):
        self.name, self.whole = name, whole
        self.tried, self.failures = 0, []

    def tries(self, selection, whole):
        """Number of trials: ``selection`` in an ordinary run of the tests, ``whole`` with ``pytest -m campaign``."""
        return whole if self.whole else selection

    def passed(self, count=1):
        self.tried += count

    def failed(self, description):
        """Count one failed trial; the test goes on with the next one and fails at its end."""
        self.tried += 1
        self.failures.append(description)


@pytest.fixture
def campaign(request, record_property):
    """Return the counter of this test; its figures are printed after the run, and one failed trial fails the test."""
    name = request.node.name.removeprefix("test_").replace("_", " ")
    counter = Campaign(name, whole=request.config.option.markexpr == "campaign")
    yield counter
    if FIGURES in os.environ:
        Path(os.environ[FIGURES]).write_text(json.dumps([counter.tried, counter.failures]))
    record_property("campaign", [name, counter.tried, len(counter.failures)])
    assert counter.tried, f"{name}: nothing was tried"
    assert not counter.failures, f"{len(counter.failures)} of {counter.tried}: " + "\n".join(counter.failures[:20])


def pytest_terminal_summary(terminalreporter):
    rows = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "teardown"
        for key, value in report.user_properties
        if key == "campaign"
    ]
    if rows:
        terminalreporter.section("campaigns")
        for name, tried, failed in sorted(rows):
            terminalreporter.write_line(f"{name}: {tried} tried, {failed} failed")
