"""Size of the fault-injection campaigns, and the table of what they tried."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "campaigns" in item.path.parts:
            item.add_marker(pytest.mark.campaign)


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
