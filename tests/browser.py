"""Headless Chromium for the tests of pages."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

WANTED = "RECONTRAST_CHROMIUM"  # set to 1 where a browser must be there: its absence is a failure, not a skip
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
         "--hide-scrollbars", "--window-size=1200,900")  # fmt: skip


def programs():
    """Chromium and its driver; where they are not, the test is passed over, or fails if they are wanted."""
    found = [next(filter(None, map(shutil.which, names)), None)
             for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))]  # fmt: skip
    if None in found:
        text = "needs Chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"
        (pytest.fail if os.environ.get(WANTED) == "1" else pytest.skip)(text)
    return found


@contextmanager
def browser():
    """A driver of Selenium with the console's log."""
    from selenium import webdriver

    chromium, driver = programs()
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        here = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            yield here
        finally:
            here.quit()


def open_page(here, path, *, width=1200, height=900, scheme="light"):
    """Show the file as on a screen of that size and colour scheme; nothing moves: nothing must be waited for."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    here.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wanted = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wanted.items()]
    here.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "screen", "features": features})
    here.get(Path(path).as_uri())
