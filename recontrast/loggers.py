"""Levels of the loggers of other packages."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silence_loggers(*names: str, below: int = logging.ERROR) -> Iterator[None]:
    """Drop log lines below a level while the block runs.

    Args:
        names: Names of the loggers.
        below: Lowest level that is logged.
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(below)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
