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

# WCAG 2.2 contrast of each element with its own text against the nearest painted background.
CONTRAST = """
const parse = c => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const light = c => { const [r, g, b] = c.slice(0, 3).map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
  if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
return [...document.querySelectorAll('main *')].filter(e => !['OPTION', 'SCRIPT'].includes(e.tagName) &&
  [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).map(e => {
  const style = getComputedStyle(e), ink = e instanceof SVGElement ? style.fill : style.color;
  const [a, b] = [light(parse(ink)), light(ground(e))].sort((x, y) => y - x);
  return [(a + 0.05) / (b + 0.05), e.className.baseVal ?? e.className, e.textContent.slice(0, 30)]; });
"""


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
