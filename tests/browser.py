"""Headless Chromium for the tests of HTML pages."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

REQUIRED = "RECONTRAST_CHROMIUM"  # if set to 1, a missing browser is a failure instead of a skip
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
         "--hide-scrollbars", "--window-size=1200,900")  # fmt: skip


def find_programs():
    """Return the paths of Chromium and its driver; without them the test is skipped, or fails if they are required."""
    paths = [next(filter(None, map(shutil.which, names)), None)
             for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))]  # fmt: skip
    if None in paths:
        message = "needs Chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"
        (pytest.fail if os.environ.get(REQUIRED) == "1" else pytest.skip)(message)
    return paths


@contextmanager
def browser():
    """Yield a Selenium driver that records the console and network logs."""
    from selenium import webdriver

    chromium, driver = find_programs()
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            yield window
        finally:
            window.quit()


def open_page(window, path, *, width=1200, height=900, scheme="light"):
    """Open a file with the given window size and colour scheme, without animations, so that tests need not wait."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    preferences = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in preferences.items()]
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "screen", "features": features})
    window.get(Path(path).as_uri())
