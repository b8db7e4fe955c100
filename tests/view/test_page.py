"""The page in a browser: photos, sliders, damaged files, labels and keys. Skips without Gradio,
Selenium or a browser."""

import gc
import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.extras import require
from helpers.models import reference_vit

import cropr_kernels as cropr
from benchmarks.utils.browser import browsing, drop_file, missing
from cropr_kernels.models.pixels import Pixels
from cropr_kernels.view.comparison import Setting, Viewer
from cropr_kernels.view.page import Content, Session, serving

require("PIL", "gradio")
# Gradio leaves sockets and event loops to the garbage collector
IGNORED = "ignore::pytest.PytestUnraisableExceptionWarning"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(IGNORED)]

PHOTOS = sorted((Path(__file__).parents[2] / "examples" / "photos").glob("*.jpg"))
PIXELS = Pixels((64, 64), (0.5,) * 3, (0.5,) * 3)
NAMES = ["ant", "bee", "cat", "dog", "elk"]
CONTROLS = {"button", "slider", "spinbutton", "radio", "textbox", "combobox", "checkbox"}


class Page:
    """A page in a browser, and the viewer behind it."""

    def __init__(self, driver, viewer, content, address):
        self.driver = driver
        self.viewer = viewer
        self.content = content
        driver.get(address)
        self.wait(lambda: self.tiles("first") and self.tiles("second"))

    def wait(self, holds, seconds=60):
        """Wait until holds() is true, and return its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = holds()
            if value:
                return value
            time.sleep(0.05)
        raise AssertionError(f"{holds} stays false; the page: {self.text('body')}")

    def text(self, selector):
        elements = self.driver.find_elements("css selector", selector)
        return elements[0].text if elements else ""

    def tiles(self, side):
        script = "return document.querySelector(arguments[0])?.src"
        return self.driver.execute_script(script, f"#{side}-photo img.tiles")

    def press(self, selector, *keys):
        self.driver.find_element("css selector", selector).send_keys(*keys)

    def click(self, selector):
        self.driver.find_element("css selector", selector).click()

    def classes(self, side):
        """Names and shares in the table of a photo, row by row."""
        script = """return [...document.querySelectorAll(arguments[0])].map(
            row => [...row.cells].map(cell => cell.textContent))"""
        return self.driver.execute_script(script, f"#{side}-photo tbody tr")

    def comparison(self, path, setting):
        photo, _ = Session(self.viewer, self.content).read(path, path.stem)
        return self.viewer.compare(photo, setting)

    def shows_counts(self, rate):
        """Tell whether the page shows the first two photos' own counts at a rate."""
        text = self.text("#counts")
        tokens = [self.comparison(path, Setting(rate)).tokens for path in PHOTOS[:2]]
        return all(
            f"tokens, photo {side + 1} {' '.join(map(str, counts))}" in text
            for side, counts in enumerate(tokens)
        )

    def expected_classes(self, path, setting):
        """The table of a photo, from the model."""
        comparison = self.comparison(path, setting)
        columns = []
        for logits in (comparison.unpruned, comparison.pruned):
            best = logits.softmax(0).topk(5)
            columns.append([NAMES[index] for index in best.indices])
            columns.append([f"{100 * share:.1f} %" for share in best.values])
        return [list(row) for row in zip(*columns, strict=True)]


def uploads():
    """Files in Gradio's folder, but the examples."""
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    files = {path for path in folder.rglob("*") if path.is_file()}
    contents = {path.read_bytes() for path in PHOTOS}
    copies = [path for path in files if path.read_bytes() in contents]
    return files - set(copies[: len(PHOTOS)])


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    if missing():
        pytest.skip(missing())
    with browsing(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def page(driver):
    """A page and a model of this test's own: no other leaves it a photo or a measurement."""
    torch.manual_seed(0)
    model = cropr.apply(reference_vit().eval(), rate=5, merge=True, num_outputs=0)
    viewer = Viewer(model, PIXELS, NAMES)
    content = Content("small", PHOTOS, None, "cpu")
    with serving(viewer, content) as address:
        yield Page(driver, viewer, content, address)
    gc.collect()


def test_the_page_calibrates_says_so_and_shows_two_examples(page):
    assert page.viewer.calibrated.num_photos == len(PHOTOS)
    assert f"calibrated on {len(PHOTOS)} photos" in page.text("#status")
    for side, path in zip(("first", "second"), PHOTOS):
        assert page.classes(side) == page.expected_classes(path, Setting(5))
    page.wait(lambda: "At rate 5, merging, measured on cpu" in page.text("#speed"))
    assert page.shows_counts(5)


def test_the_slider_of_the_rate_changes_tiles_counts_and_classes(page):
    from selenium.webdriver.common.keys import Keys

    before = page.tiles("first")
    page.press("#rate input[type=range]", Keys.END)
    highest = page.viewer.highest_rate
    page.wait(lambda: re.search(rf"tokens 65 {64 - highest} ", page.text("#counts")))
    assert page.tiles("first") != before
    for side, path in zip(("first", "second"), PHOTOS):
        assert page.classes(side) == page.expected_classes(path, Setting(highest))
    page.press("#rate input[type=range]", Keys.HOME)
    page.wait(lambda: re.search(r"tokens 65 65 65 65", page.text("#counts")))
    assert page.classes("first") == page.expected_classes(PHOTOS[0], Setting(0))
    page.press("#rate input[type=range]", *[Keys.ARROW_RIGHT] * 5)
    page.wait(lambda: page.tiles("first") == before)


def test_the_slider_of_the_block_shows_the_tiles_grow_and_runs_no_model(page):
    from selenium.webdriver.common.keys import Keys

    runs = []
    count = page.comparison(PHOTOS[1], Setting(5)).tokens[1] - 1
    page.wait(lambda: "times as fast" in page.text("#speed"))
    handle = page.viewer.model.register_forward_pre_hook(lambda *_: runs.append(1))
    last = page.tiles("second")
    page.press("#block input[type=range]", Keys.HOME)
    page.wait(lambda: "before block 1: 64 patches in 64 tokens" in page.text("#second-photo"))
    first = page.tiles("second")
    page.press("#block input[type=range]", Keys.ARROW_RIGHT)
    page.wait(lambda: f"after block 1: 64 patches in {count} tokens" in page.text("#second-photo"))
    assert len({first, page.tiles("second"), last}) == 3
    page.press("#block input[type=range]", Keys.END)
    page.wait(lambda: page.tiles("second") == last)
    handle.remove()
    assert runs == []


def test_dropped_tokens_are_shown_as_such(page):
    page.click("#mode label:nth-of-type(2)")
    page.wait(lambda: re.search(r"tokens 65 59 54 49", page.text("#counts")))  # equal counts
    page.click("#mode label:nth-of-type(3)")
    page.wait(lambda: "48 of 64 patches are left" in page.text("#first-photo"))
    expected = page.expected_classes(PHOTOS[0], Setting(5, merge=False))
    assert page.classes("first") == expected
    page.click("#mode label:nth-of-type(1)")
    count = page.comparison(PHOTOS[0], Setting(5)).tokens[-1] - 1
    page.wait(lambda: f"64 patches in {count} tokens" in page.text("#first-photo"))


def test_a_photo_that_is_dropped_is_classified_and_its_file_deleted(page):
    drop_file(page.driver, "#first-drop button[aria-dropeffect]", PHOTOS[3])
    page.wait(lambda: f"{PHOTOS[3].name}, as the model takes it" in page.text("#first-photo"))
    assert page.classes("first") == page.expected_classes(PHOTOS[3], Setting(5))
    page.wait(lambda: uploads() == set())


def test_the_camera_takes_a_photo_and_until_then_the_last_one_stays(page):
    before = page.tiles("first")
    page.click("#first-drop [aria-label='Capture from camera']")
    page.wait(lambda: "Webcam" in page.text("#first-drop"))
    assert page.tiles("first") == before
    access = "//*[@id='first-drop']//button[contains(., 'Webcam')]"
    page.driver.find_element("xpath", access).click()
    capture = "#first-drop [aria-label='capture photo']"
    page.wait(lambda: page.driver.find_elements("css selector", capture))
    film = "return document.querySelector('#first-drop video')?.readyState >= 3"
    page.wait(lambda: page.driver.execute_script(film))
    page.click(capture)
    page.wait(lambda: "image.png, as the model takes it" in page.text("#first-photo"))
    assert page.tiles("first") != before
    page.wait(lambda: uploads() == set())


def test_a_damaged_file_gets_a_sentence_and_the_next_photo_works(page, tmp_path):
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(PHOTOS[0].read_bytes()[:300])
    drop_file(page.driver, "#second-drop button[aria-dropeffect]", damaged)
    page.wait(lambda: "damaged.jpg cannot be read as a photo" in page.text("#second-photo"))
    assert page.driver.find_elements("css selector", "#second-photo [role=alert]")
    assert page.tiles("first")
    example = page.driver.find_elements("css selector", "#second-examples button.thumbnail-item")[2]
    example.click()
    page.wait(lambda: PHOTOS[2].stem in page.text("#second-photo"))
    assert page.classes("second") == page.expected_classes(PHOTOS[2], Setting(5))


def test_moves_while_it_computes_end_at_the_last_one(page, monkeypatch):
    from selenium.webdriver.common.keys import Keys

    tokens = page.comparison(PHOTOS[1], Setting(12)).tokens
    row = f"tokens, photo 2 {' '.join(map(str, tokens))}"
    compare = page.viewer.compare
    settings = []
    moved = threading.Event()

    def slow(photo, setting):
        assert moved.wait(60)
        settings.append(setting.rate)
        return compare(photo, setting)

    monkeypatch.setattr(page.viewer, "compare", slow)
    page.press("#rate input[type=range]", *[Keys.ARROW_RIGHT] * 7)
    moved.set()
    page.wait(lambda: row in page.text("#counts"))
    end = time.monotonic() + 2  # measurements of other rates end
    while time.monotonic() < end:
        assert row in page.text("#counts")
    page.wait(lambda: "At rate 12, merging, measured on cpu" in page.text("#speed"))
    assert set(settings) < set(range(5, 13)) and settings[-1] == 12


def test_nothing_is_loaded_from_elsewhere(page):
    urls = set()
    for entry in page.driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            urls.add(message["params"]["request"]["url"])
    loaded = {url.split("/")[2] for url in urls if url.startswith(("http", "ws"))}
    assert len(loaded) == 1 and loaded.pop().startswith("127.0.0.1:")
    refused = [line["message"] for line in page.driver.get_log("browser") if "Policy" in str(line)]
    assert refused == []


def test_every_control_has_a_name_and_the_keyboard_reaches_it(page):
    from selenium.webdriver.common.keys import Keys

    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    controls = [node for node in tree if not node["ignored"] and node["role"]["value"] in CONTROLS]
    names = [(node["role"]["value"], node["name"]["value"]) for node in controls]
    assert [role for role, name in names if not name.strip()] == []
    assert {"slider", "radio", "button"} <= {role for role, _ in names}
    images = page.driver.execute_script(
        "return [...document.querySelectorAll('.cropr img')].map(image => image.alt)"
    )
    assert images and all(images)
    assert page.driver.execute_script("return document.documentElement.lang") == "en"
    assert len(page.driver.find_elements("css selector", "h1")) == 1
    page.click("h1")  # the keyboard goes on from there
    order = []
    for _ in range(60):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        order.append(
            page.driver.execute_script(
                "return document.activeElement.closest('[id]:not(input)')?.id ?? ''"
            )
        )
    reached = list(dict.fromkeys(order))
    expected = ["rate", "mode", "block", "first-drop", "first-examples", "second-drop"]
    assert [name for name in reached if name in expected] == expected
