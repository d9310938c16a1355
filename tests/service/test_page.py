"""The page of the service in headless Chromium: upload, decision, heat map, history, keyboard, phones, dark."""

import json

import pytest
from browser import CONTRAST, browser
from client import serving


@pytest.fixture(scope="module")
def driver():
    with browser() as window:
        yield window


@pytest.fixture(scope="module")
def client(calibrated, plain):
    with serving({"main": calibrated, "plain": plain}) as client:
        yield client


def open_service(driver, client, *, width=1200, scheme="light", fresh=True):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    preferences = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in preferences.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "screen", "features": features})
    address = f"http://127.0.0.1:{client.port}/"
    driver.get(address)
    if fresh:
        driver.execute_script("localStorage.clear(); sessionStorage.clear()")
        driver.get(address)
    wait(driver, lambda: "decides" in text(driver, "about") or "gives scores" in text(driver, "about"))


def wait(driver, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 60, poll_frequency=0.05).until(lambda _: condition())


def text(driver, name):
    return driver.find_element("id", name).text


def upload(driver, path):
    count = len(driver.find_elements("css selector", "#history li"))
    driver.find_element("id", "file").send_keys(str(path))
    wait(driver, lambda: len(driver.find_elements("css selector", "#history li")) == count + 1)


def list_problems(driver):
    return [line["message"] for line in driver.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]


def test_upload_shows_decision_heat_map_and_history(driver, client, images):
    open_service(driver, client)
    list_problems(driver)
    driver.get_log("performance")
    defect, good = images[-1], images[0]
    upload(driver, defect)
    wanted = client.predict(defect.read_bytes(), "/predict/main")
    assert text(driver, "decision") == "Defect" and wanted["decision"] == "defect"
    assert float(text(driver, "score")) == pytest.approx(wanted["score"], rel=1e-3)
    assert float(text(driver, "p-value")) == pytest.approx(wanted["p_value"], rel=1e-3)
    assert text(driver, "regions") == str(wanted["region_count"]) != "0"
    picture = driver.find_element("id", "picture")
    assert picture.get_attribute("src").startswith("data:image/png") and "regions outlined" in picture.get_attribute(
        "alt"
    )
    assert driver.execute_script("return arguments[0].naturalWidth", picture) == 64
    assert "at most 2/40" in text(driver, "promise")
    assert "has to be measured" in text(driver, "promise-section")
    upload(driver, good)
    assert text(driver, "decision") == "Good" and len(driver.find_elements("css selector", "#history li")) == 2
    assert list_problems(driver) == []
    events = [json.loads(line["message"])["message"] for line in driver.get_log("performance")]
    addresses = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert all(a.startswith((f"http://127.0.0.1:{client.port}/", "data:", "blob:")) for a in addresses)


def test_history_survives_a_reload_and_can_be_cleared(driver, client, images):
    open_service(driver, client)
    for path in images[:2]:
        upload(driver, path)
    open_service(driver, client, fresh=False)
    buttons = driver.find_elements("css selector", "#history button")
    assert len(buttons) == 2
    buttons[1].click()
    assert images[0].name in text(driver, "file-name") and "small picture" in text(driver, "file-name")
    driver.find_element("id", "clear").click()
    assert driver.find_elements("css selector", "#history button") == []
    open_service(driver, client, fresh=False)
    assert driver.find_elements("css selector", "#history button") == []


def test_history_ends_at_fifty(driver, client, images):
    open_service(driver, client)
    entry = {"name": "old.png", "score": 1, "p_value": None, "decision": None, "threshold": None, "thumbnail": "",
             "time": 0, "width": 1, "height": 1}  # fmt: skip
    driver.execute_script("localStorage.setItem('recontrast-history', arguments[0])", json.dumps([entry] * 50))
    open_service(driver, client, fresh=False)
    assert len(driver.find_elements("css selector", "#history li")) == 50
    driver.find_element("id", "file").send_keys(str(images[0]))
    first = "return document.querySelector('#history li').textContent"
    wait(driver, lambda: images[0].name in driver.execute_script(first))
    assert len(driver.find_elements("css selector", "#history li")) == 50


def test_hostile_history_and_names_run_nothing(driver, client, images, tmp_path):
    name = "<img src=x onerror=document.title='broken'>.png"
    path = tmp_path / name
    path.write_bytes(images[0].read_bytes())
    open_service(driver, client)
    upload(driver, path)
    assert name in text(driver, "file-name")
    for stored in ("{", '[{"name": 3}]', '[{"name": "a", "score": 1, "thumbnail": "javascript:x"}]', "[null, 7]"):
        driver.execute_script("localStorage.setItem('recontrast-history', arguments[0])", stored)
        open_service(driver, client, fresh=False)
        assert driver.find_elements("css selector", "#history button") == []
    assert driver.title == "recontrast: inspect an image"


def test_errors_are_said(driver, client, tmp_path):
    open_service(driver, client)
    (tmp_path / "broken.png").write_bytes(b"no image")
    driver.find_element("id", "file").send_keys(str(tmp_path / "broken.png"))
    wait(driver, lambda: "got a file that starts with" in text(driver, "message"))
    assert driver.find_element("id", "message").get_attribute("class") == "error"
    assert not driver.find_element("id", "result").is_displayed()
    list_problems(driver)  # the browser logs the refusal


def test_other_detector_gives_scores_alone(driver, client, images):
    from selenium.webdriver.support.select import Select

    open_service(driver, client)
    Select(driver.find_element("id", "detector")).select_by_value("plain")
    assert "not calibrated" in text(driver, "about") and not driver.find_element("id", "promise-section").is_displayed()
    upload(driver, images[0])
    assert text(driver, "decision") == "No decision" and not driver.find_element("id", "gauge").is_displayed()


def test_keyboard_reaches_everything(driver, client, images):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    open_service(driver, client)
    for path in images[:3]:
        upload(driver, path)
    seen = []
    driver.execute_script("document.activeElement.blur(); document.body.focus()")
    for _ in range(12):
        ActionChains(driver).send_keys(Keys.TAB).perform()  # a file input takes the keys of its own for a path
        active = driver.switch_to.active_element
        seen.append(active.get_attribute("id") or active.get_attribute("value") or active.text.split("\n")[0])
        if active.tag_name == "a" and "Skip" in active.text:
            assert driver.execute_script("return arguments[0].getBoundingClientRect().top", active) >= 0
    assert {"detector", "file", "overlay", "clear"} <= set(seen), seen
    radio = driver.find_element("css selector", "[value=overlay]")
    radio.send_keys(Keys.ARROW_RIGHT)
    assert (
        driver.find_element("id", "original").is_displayed() and not driver.find_element("id", "picture").is_displayed()
    )
    first = driver.find_element("css selector", "#history button")
    first.send_keys(Keys.ENTER)
    assert images[2].name in text(driver, "file-name")
    driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert images[1].name in text(driver, "file-name")
    style = "const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.outlineWidth]"
    assert driver.execute_script(style) == ["solid", "3px"]


@pytest.mark.parametrize("width", [360, 700, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_width_and_contrast(driver, client, images, width, scheme):
    open_service(driver, client, width=width, scheme=scheme)
    upload(driver, images[-1])
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert [row for row in driver.execute_script(CONTRAST) if row[0] < 4.5] == []
    driver.get(f"http://127.0.0.1:{client.port}/docs")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width


def test_token_is_asked_for(driver, calibrated, images):
    token = "a-token-of-the-tests"
    with serving({"main": calibrated}, token=token) as client:
        address = f"http://127.0.0.1:{client.port}/"
        driver.get(address)
        wait(driver, lambda: driver.find_element("id", "token").is_displayed())
        driver.find_element("id", "token").send_keys("another-token-here")
        driver.find_element("css selector", "#access button").click()
        wait(driver, lambda: "wanted Bearer" in text(driver, "message"))
        driver.find_element("id", "token").send_keys(token)
        driver.find_element("css selector", "#access button").click()
        wait(driver, lambda: "decides" in text(driver, "about"))
        upload(driver, images[0])
        assert not driver.find_element("id", "access").is_displayed()
