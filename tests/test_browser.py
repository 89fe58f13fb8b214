"""The explorer in a real browser: Chromium without a window, driven by Selenium.

The page is read through Bokeh's models in the browser, and used through its elements, as a user does.  Each test waits
for what must come, and starts from a page of its own in the same browser.
"""

import re
import shutil
import subprocess
import sys
from urllib.parse import parse_qsl

import numpy as np
import pytest

pytest.importorskip("bokeh")
pytest.importorskip("selenium")

from selenium.common.exceptions import JavascriptException, StaleElementReferenceException
from selenium.webdriver import ActionChains, Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.support.ui import WebDriverWait

from adaptive_c.explore.settings import Lane, Settings

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
if not (BROWSER and DRIVER):
    pytest.skip("no browser: apt install chromium chromium-driver", allow_module_level=True)

PATIENCE = 120  # seconds, of which a page takes about three


@pytest.fixture(scope="module")
def address():
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "adaptive_c", "explore", "--no-browser", "--port", "0"],
        stdout=subprocess.PIPE, text=True, cwd="/",
    )  # fmt: skip
    found = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
    assert found
    yield found[0]
    process.terminate()
    process.communicate()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = ChromeOptions()
    options.binary_location = BROWSER
    for argument in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1280,1100",
        "force-device-scale-factor=1", f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=ChromeService(DRIVER))  # given its path, Selenium fetches nothing
    driver.set_script_timeout(PATIENCE)
    yield driver
    driver.quit()


class Opened:
    """A page in the browser, as its models say it is."""

    def __init__(self, browser, address, query):
        self.browser = browser
        browser.get(address + query)
        self.wait(lambda: self("return window.Bokeh?.documents[0]?.is_idle"))

    def __call__(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def wait(self, condition):
        """What the condition gives as soon as that is true.

        A page that has no models yet, and elements that were replaced since they were found, give nothing.
        """
        passing = [JavascriptException, StaleElementReferenceException]
        return WebDriverWait(self.browser, PATIENCE, 0.05, passing).until(lambda _: condition())

    def get(self, name, attribute):
        return self("return Bokeh.documents[0].get_model_by_name(arguments[0])[arguments[1]]", name, attribute)

    def column(self, lane, name):
        """A column of a course, with None where there is no number."""
        return self("return Array.from(Bokeh.documents[0].get_model_by_name(arguments[0]).data[arguments[1]])"
                    ".map(x => Number.isFinite(x) ? x : null)", f"course {lane}", name)  # fmt: skip

    def path(self, lane):
        return np.array([self.column(lane, "w1"), self.column(lane, "w2")], float).T

    @property
    def settings(self):
        return Settings.from_query(dict(parse_qsl(self.get("texts", "data")["query"][0])))

    def element(self, name, selector):
        """An element of a model's view, as soon as there is one."""
        return self.wait(lambda: self("""
            const view = Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name(arguments[0]))
            return view.shadow_el.querySelector(arguments[1])""", name, selector))  # fmt: skip

    def write(self, name, text):
        self("arguments[0].focus(); arguments[0].select()", self.element(name, "input"))
        ActionChains(self.browser).send_keys(text, Keys.ENTER).perform()

    def click(self, name, x, y):
        """Click on a place of a figure, given from the upper left corner of its view."""
        left, top = self("""
            const view = Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name(arguments[0]))
            view.el.scrollIntoView({block: "center"})
            const box = view.el.getBoundingClientRect()
            return [box.left, box.top]""", name)  # fmt: skip
        actions = ActionChains(self.browser)
        actions.w3c_actions.pointer_action.move_to_location(round(left + x), round(top + y))
        actions.w3c_actions.pointer_action.click()
        actions.perform()


@pytest.fixture
def opened(browser, address):
    def open_page(query=""):
        return Opened(browser, address, query)

    browser.get_log("browser")
    yield open_page
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [line for line in severe if "favicon" not in line] == []


def test_the_page_opens_and_shows_the_courses(opened):
    page = opened("?steps=30&A=Adam,lr=0.5&B=RMSprop,lr=0.5")
    assert page.browser.title == "adaptive_c explorer"
    s = Settings(lanes=(Lane("Adam", {"lr": 0.5}), Lane("RMSprop", {"lr": 0.5}), None), steps=30)
    assert page.settings == s
    for i, lane in enumerate("AB"):
        assert page.path(lane).tobytes() == s.run(i).w.tobytes()
    assert np.isnan(page.path("C")).all()
    assert page("return performance.getEntriesByType('resource').every(x => x.name.startsWith(location.origin))")


def same(page, s):
    """Whether the page shows the courses of these settings, to the last bit."""
    return page.settings == s and all(
        page.path(name).tobytes() == s.run(i).w.tobytes() if s.lanes[i] else np.isnan(page.path(name)).all()
        for i, name in enumerate("ABC")
    )


def test_a_slider_that_is_moved_changes_the_course(opened):
    page = opened("?steps=30&A=Adam,lr=0.5&B=RMSprop,lr=0.5")
    page.element("lr A", ".noUi-handle").send_keys(Keys.ARROW_RIGHT)
    lanes = (Lane("Adam", {"lr": 0.6}), Lane("RMSprop", {"lr": 0.5}), None)
    page.wait(lambda: same(page, Settings(lanes=lanes, steps=30)))
    assert page.element("lr A", ".bk-slider-value").text == "0.6"
    page.element("steps", ".noUi-handle").send_keys(Keys.ARROW_LEFT)
    page.wait(lambda: same(page, Settings(lanes=lanes, steps=29)))


def test_figures_keep_their_places_whatever_their_axes_show(opened):
    """Otherwise a slider that changes a label of an axis has the browser lay out the whole page anew."""
    page = opened("?steps=100&A=RMSprop,lr=0.5")

    def frames():
        return page("""
            const views = ["surface", "error", "state"].map(
                name => Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name(name)))
            return [views[1].frame.y_scale.type,
                    ...views.map(view => [view.bbox.top, view.frame.bbox.left, view.frame.bbox.width])]""")

    scale, *before = frames()
    assert scale == "LogScale"
    assert len({(left, width) for _, left, width in before}) == 1
    for formula, start, scale in (("1e-9*w1**2 + 1e-9*w2**2", -15, "LogScale"), ("-1e9*w1**2 - w2**2", -15, "LinearScale"),
                                  ("w1**2 + w2**2", 3, "LogScale")):  # fmt: skip
        page.write("formula", formula)
        page.write("start w1", str(start))
        s = Settings(formula, (start, 20), lanes=(Lane("RMSprop", {"lr": 0.5}), None, None))
        page.wait(lambda s=s: same(page, s))
        page.wait(lambda scale=scale: frames() == [scale, *before])


def test_a_slider_draws_each_figure_once(opened):
    """Nothing is drawn again because an axis or a legend follows later.

    While the page is new, fonts that are loaded late have figures drawn too, so that one of several movements counts.
    """
    page = opened("?steps=100&A=RMSprop,lr=0.5&B=SGD,lr=0.001&C=Adam,lr=0.1")
    page("""
        window.drawn = []
        for (const name of ["surface", "error", "state"]) {
          Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name(name)).repainted.connect(() => drawn.push(name))
        }""")
    frames = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done)))"
    once = ["error", "state", "surface"]
    for key, lr in [(Keys.ARROW_RIGHT, 0.6), (Keys.ARROW_LEFT, 0.5)] * 5:
        page("drawn.length = 0")
        page.element("lr A", ".noUi-handle").send_keys(key)
        lanes = (Lane("RMSprop", {"lr": lr}), Lane("SGD", {"lr": 0.001}), Lane("Adam", {"lr": 0.1}))
        page.wait(lambda lanes=lanes: same(page, Settings(lanes=lanes, steps=100)))
        page.wait(lambda: set(page("return drawn")) == set(once))
        for _ in range(5):
            page.browser.execute_async_script(frames)
        drawn = sorted(page("return drawn"))
        if drawn == once:
            break
    assert drawn == once


def test_a_function_that_is_typed_is_drawn_and_a_bad_one_gets_a_message(opened):
    page = opened("?steps=30&A=Adam,lr=0.5")
    lanes = (Lane("Adam", {"lr": 0.5}), None, None)
    page.write("formula", "sin(w1) + cos(w2)")
    s = Settings("sin(w1) + cos(w2)", lanes=lanes, steps=30)
    page.wait(lambda: same(page, s))
    surface = page("""return Bokeh.documents[0].get_model_by_name("surface").renderers
                      .find(r => r.fill_renderer).line_renderer.data_source.data.xs.length""")  # fmt: skip
    assert surface > 0

    page.write("formula", "sin(w1) + foo(w2)")
    page.wait(lambda: page.get("trouble", "visible"))
    page.wait(lambda: "position 11: 'foo' is no function here" in page.element("trouble", "[role=alert]").text)
    assert page.element("trouble", "[role=alert]").is_displayed()
    assert same(page, s)  # the last good picture stays

    page.write("formula", "w1**2 + w2**2")
    page.wait(lambda: same(page, Settings("w1**2 + w2**2", lanes=lanes, steps=30)))
    page.wait(lambda: not page.get("trouble", "visible"))


def test_a_click_on_the_surface_moves_the_start(opened):
    page = opened("?steps=30&A=Adam,lr=0.5")
    left, top, width, height = page("""
        const view = Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name("surface"))
        const box = view.frame.bbox
        return [box.left, box.top, box.width, box.height]""")  # fmt: skip
    page.click("surface", left + 0.75 * width, top + 0.25 * height)
    page.wait(lambda: page.settings.start != (-15, 20))
    start = page.settings.start
    assert start == pytest.approx((10, 12.5), abs=0.2)  # the click is on a whole pixel
    page.wait(lambda: same(page, Settings(start=start, lanes=(Lane("Adam", {"lr": 0.5}), None, None), steps=30)))
    assert [page.get(f"start w{i}", "value") for i in (1, 2)] == list(start)


def entry(page, legend, label):
    """An entry of a legend, by its text."""
    return page.wait(lambda: page("""
        const view = Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name(arguments[0]))
        return [...view.shadow_el.querySelectorAll(".bk-item")].find(x => x.innerText.includes(arguments[1]))""",
        legend, label))  # fmt: skip


def seen(page, legend, label):
    return page("""
        const items = Bokeh.documents[0].get_model_by_name(arguments[0]).items
        return items.find(x => x.label.value.includes(arguments[1])).renderers.map(x => x.visible)""",
        legend, label)  # fmt: skip


def test_entries_of_the_legends_switch_courses_and_states(opened):
    page = opened("?steps=30&A=RMSprop,lr=0.5&B=Adam,lr=0.5")
    before = page.settings
    errors = """return Bokeh.documents[0].get_model_by_name("error").renderers.map(x => x.visible)"""
    assert page(errors) == [True] * 3
    entry(page, "courses", "B: Adam").click()
    page.wait(lambda: seen(page, "courses", "B: Adam") == [False, False])
    assert seen(page, "courses", "A: RMSprop") == [True, True]
    assert page(errors) == [True, False, True]
    entry(page, "courses", "B: Adam").click()
    page.wait(lambda: seen(page, "courses", "B: Adam") == [True, True])

    assert seen(page, "states", "B: m1") == [False, False]
    entry(page, "states", "B: m1").click()
    page.wait(lambda: seen(page, "states", "B: m1") == [True, True])
    assert page.settings == before


def test_hovering_over_a_point_shows_its_numbers(opened):
    page = opened("?steps=3&A=RMSprop,lr=2,alpha=0.9")
    second = page.path("A")[1]
    x, y = page("""
        const view = Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name("surface"))
        view.el.scrollIntoView({block: "center"})
        const box = view.el.getBoundingClientRect(), frame = view.frame
        return [box.left + frame.x_scale.compute(arguments[0]), box.top + frame.y_scale.compute(arguments[1])]""",
        *second)  # fmt: skip
    actions = ActionChains(page.browser)
    actions.w3c_actions.pointer_action.move_to_location(round(x) - 30, round(y))
    actions.w3c_actions.pointer_action.move_to_location(round(x), round(y))
    actions.perform()
    text = page.wait(lambda: page("""
        const all = [...Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name("surface")).views.all_views()]
        const tips = all.filter(x => x.model.type == "Tooltip" && x.model.visible)
        return tips.map(x => x.shadow_el.textContent).join(" ")"""))  # fmt: skip
    for part in ("after 1 steps", "gradient", "(810", "v"):
        assert part in text


def test_tabs_show_the_first_updates_the_amplification_and_the_code(opened):
    page = opened("?steps=30&A=SGD,lr=0.001&B=RMSprop,lr=0.05")

    def choose(title):
        page("""
            const view = Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name("views"))
            return [...view.shadow_el.querySelectorAll(".bk-tab")].find(x => x.innerText == arguments[0])""",
             title).click()  # fmt: skip

    choose("first updates")
    page.wait(lambda: "(-14.8205, 19.208)" in page.element("first numbers", "table").text)
    choose("amplification")
    page.wait(lambda: page.element("beta", ".noUi-handle").is_displayed())
    page.wait(lambda: page("return Bokeh.documents[0].get_model_by_name('amplified').data.c[0].length > 100"))
    data = """return Array.from(Bokeh.documents[0].get_model_by_name("amplified").data.c[0]).slice(0, 3)"""
    old = page(data)
    page.element("beta", ".noUi-handle").send_keys(Keys.ARROW_LEFT)
    page.wait(lambda: page(data) != old)
    choose("Python")
    page.wait(lambda: "optimizers.RMSprop(w, lr=0.05" in page.element("code", "pre").text)


def test_the_address_is_a_link_that_restores_the_page(opened):
    page = opened()
    page.write("formula", "w1**2 + 2*w2**2")
    page.wait(lambda: "2*w2**2" in page.browser.current_url)
    s = page.settings
    address, _, query = page.browser.current_url.partition("?")
    again = Opened(page.browser, address, f"?{query}")
    assert again.settings == s
    assert same(again, s)
    assert again.get("formula", "value") == "w1**2 + 2*w2**2"


def test_buttons_copy_the_link_and_the_code(opened):
    page = opened("?steps=30&A=Adam,lr=0.5")
    page.browser.execute_cdp_cmd("Browser.grantPermissions", {
        "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})  # fmt: skip

    def copied():
        return page.browser.execute_async_script(
            "const done = arguments[0]; navigator.clipboard.readText().then(done, error => done(String(error)))"
        )

    page.element("copy link", "button").click()
    page.wait(lambda: Settings.from_query(dict(parse_qsl(copied().partition("?")[2]))) == page.settings)
    page.element("copy code", "button").click()
    page.wait(lambda: copied() == page.settings.code())


def test_a_picture_can_be_saved(opened, tmp_path):
    page = opened("?steps=30&A=Adam,lr=0.5")
    page.browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    button = page("""
        const views = [...Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name("surface")).views.all_views()]
        return views.find(x => x.model.tool?.type == "SaveTool")?.el""")  # fmt: skip
    button.click()
    page.wait(lambda: any(p.read_bytes().startswith(b"\x89PNG") for p in tmp_path.glob("*.png")))
