"""Tests of `recontrast.loggers`: levels come back, also after an error."""

import logging

import pytest

from recontrast.loggers import silence_loggers


def test_lines_below_the_level_are_dropped_in_the_block(caplog):
    first, second = logging.getLogger("first.of.two"), logging.getLogger("second.of.two")
    first.setLevel(logging.INFO)
    with pytest.raises(KeyError), silence_loggers(first.name, second.name):
        first.warning("dropped")
        second.error("kept")
        raise KeyError
    first.info("back")
    assert [record.message for record in caplog.records] == ["kept", "back"]
    with silence_loggers(first.name, below=logging.CRITICAL + 1):
        first.critical("dropped")
    assert len(caplog.records) == 2 and first.level == logging.INFO and second.level == logging.NOTSET
