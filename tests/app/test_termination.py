"""Commands that are told to end by SIGTERM, or by a terminal that closes, end as after Ctrl-C."""

import os
import shutil
import signal

import pytest
from faults import list_hidden, run_command, start, wait
from saved_model import RECIPE, draw, save

from recontrast.runtime.termination import SIGNALS, interrupt_on_termination


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    return save(root / "checkpoint.pt", RECIPE), draw(root / "images", 3, seed=0)


@pytest.mark.parametrize("number", SIGNALS)
def test_predict_removes_its_temporary_files(inputs, tmp_path, number):
    checkpoint, images = inputs
    arguments = ["predict", checkpoint, images, "--out", tmp_path / "out", "--maps", "npy", "--device", "cpu"]
    whole = wait(start(run_command(arguments, tmp_path / "out"), tmp_path / "report"), tmp_path / "report")
    operations = len(whole["operations"])
    for point in (1, operations // 2, operations - 2):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)  # a stopped prediction would go on where it stopped
        action = run_command(
            arguments, tmp_path / "out", lambda: os.kill(os.getpid(), number), point, interrupt_on_termination
        )
        result = wait(start(action, tmp_path / "report"), tmp_path / "report")
        assert result["code"] == 130 and "recontrast: interrupted" in result["text"], result
        assert not list_hidden(tmp_path / "out")


def test_an_ignored_signal_stays_ignored(monkeypatch):
    """Commands under nohup go on when the terminal closes."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        monkeypatch.setenv("WORLD_SIZE", "2")
        interrupt_on_termination()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        monkeypatch.delenv("WORLD_SIZE")
        interrupt_on_termination()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
