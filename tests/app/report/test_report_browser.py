"""Report page in headless Chromium."""

import json

import pytest
from browser import CONTRAST, browser, open_page
from report_run import make_run

from recontrast.app.report.write import write_report


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    run, data = make_run(root)
    return write_report(run, [data], root / "report.html", device="cpu").path


@pytest.fixture(scope="module")
def driver():
    with browser() as window:
        yield window


def count_visible(driver):
    return driver.execute_script(
        "return [...document.querySelectorAll('#cards > li')].filter(c => c.offsetParent).length"
    )


def test_page_opens_without_errors_or_requests(driver, page):
    open_page(driver, page)
    driver.get_log("performance")
    open_page(driver, page)
    assert [line["message"] for line in driver.get_log("browser") if line["level"] in ("SEVERE", "WARNING")] == []
    events = [json.loads(line["message"])["message"] for line in driver.get_log("performance")]
    schemes = {
        e["params"]["request"]["url"].split(":")[0] for e in events if e["method"] == "Network.requestWillBeSent"
    }
    assert schemes <= {"file", "data"}
    broken = driver.execute_script("return [...document.images].filter(i => i.complete && !i.naturalWidth).length")
    assert len(driver.find_elements("css selector", "#cards img")) > 12 and broken == 0


def test_gallery_filters(driver, page):
    from selenium.webdriver.support.select import Select

    open_page(driver, page)
    total = count_visible(driver)
    assert total == 8
    Select(driver.find_element("id", "of-defect")).select_by_value("square")
    assert count_visible(driver) == 4 and driver.find_element("id", "count").text == "4 of 8 images"
    cards = driver.find_elements("css selector", "#cards > li:not([hidden])")
    assert {card.get_attribute("data-defect") for card in cards} == {"square"}
    outcome = Select(driver.find_element("id", "of-outcome"))
    for option in [o.get_attribute("value") for o in outcome.options][1:]:
        outcome.select_by_value(option)
        cards = driver.find_elements("css selector", "#cards > li:not([hidden])")
        assert all(c.get_attribute("data-outcome") == option for c in cards)
    outcome.select_by_value("passed" if "passed" in [o.get_attribute("value") for o in outcome.options] else "")
    if count_visible(driver) == 0:  # defects are never "passed", so all cards are hidden and the reset button appears
        driver.find_element("id", "reset").click()
        assert count_visible(driver) == total


def test_slider_responds_to_the_keyboard(driver, page):
    from selenium.webdriver.common.keys import Keys

    open_page(driver, page)
    slider = driver.find_element("id", "mix")
    driver.execute_script("arguments[0].focus()", slider)

    def opacities():
        at = "getComputedStyle(document.querySelector('.mixed %s')).opacity"
        return [float(driver.execute_script("return " + at % part)) for part in ("img", ".heat")]

    assert opacities() == [1, 1]
    slider.send_keys(Keys.HOME)
    assert opacities() == [1, 0] and slider.get_attribute("aria-valuetext") == "image"
    slider.send_keys(Keys.END)
    assert opacities() == [0, 1] and slider.get_attribute("aria-valuetext") == "heat map"
    slider.send_keys(Keys.ARROW_LEFT)
    assert opacities() == pytest.approx([0.1, 1])


def test_keyboard_navigation_shows_focus(driver, page):
    from selenium.webdriver.common.keys import Keys

    open_page(driver, page)
    driver.find_element("tag name", "body").send_keys(Keys.TAB)
    link = driver.switch_to.active_element
    assert link.text == "Skip to the images" and link.get_attribute("href").endswith("#gallery")
    assert driver.execute_script("return arguments[0].getBoundingClientRect().top", link) >= 0
    style = "const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.outlineWidth]"
    assert driver.execute_script(style) == ["solid", "3px"]
    for control in driver.find_elements("css selector", "#controls select, #controls input, summary"):
        assert driver.execute_script("return arguments[0].tabIndex", control) == 0


@pytest.mark.parametrize("width", [360, 700, 1200])
def test_page_does_not_scroll_sideways(driver, page, width):
    open_page(driver, page, width=width)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    driver.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_contrast(driver, page, scheme):
    open_page(driver, page, scheme=scheme)
    contrasts = driver.execute_script(CONTRAST)
    paper = driver.execute_script("return getComputedStyle(document.documentElement).backgroundColor")
    assert (max(map(int, paper[4:-1].split(","))) < 60) is (scheme == "dark")
    assert len(contrasts) > 60
    assert [row for row in contrasts if row[0] < 4.5] == []


def test_page_prints(driver, page):
    open_page(driver, page)
    printed = driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
    assert len(printed["data"]) > 10_000
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    hidden = "return getComputedStyle(document.getElementById('controls')).display"
    assert driver.execute_script(hidden) == "none"
