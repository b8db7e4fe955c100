"""A headless browser of the distribution, driven by Selenium; nothing is downloaded."""

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
DROP = """
const [target, name, content] = arguments;
const bytes = Uint8Array.from(atob(content), character => character.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], name, {type: "image/jpeg"}));
for (const type of ["dragenter", "dragover", "drop"])
  target.dispatchEvent(new DragEvent(
    type, {bubbles: true, cancelable: true, dataTransfer: transfer}));
"""


@contextmanager
def browsing(folder: Path, width: int = 1280, height: int = 1600) -> Iterator[object]:
    """Context with a driver of a browser whose profile is in a folder; skips the test without
    one."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver_path = shutil.which("chromedriver")
    if browser is None or driver_path is None:
        pytest.skip(f"needs {' or '.join(BROWSERS)}, and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={folder}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_path))
    try:
        yield driver
    finally:
        driver.quit()


def drop_file(driver: object, selector: str, path: Path) -> None:
    """Drop a file on an element, as a person does from another window."""
    target = driver.find_element("css selector", selector)
    content = base64.b64encode(path.read_bytes()).decode()
    driver.execute_script(DROP, target, path.name, content)
