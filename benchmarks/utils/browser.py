"""A headless browser of the distribution, driven by Selenium; nothing is downloaded."""

import base64
import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DRIVER = "chromedriver"
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
    "--hide-scrollbars",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)
_DROP = """
const [target, name, content] = arguments;
const bytes = Uint8Array.from(atob(content), character => character.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], name, {type: "image/jpeg"}));
for (const type of ["dragenter", "dragover", "drop"])
  target.dispatchEvent(new DragEvent(
    type, {bubbles: true, cancelable: true, dataTransfer: transfer}));
"""


def missing() -> str | None:
    """Name the missing program or library, None if there is none."""
    if importlib.util.find_spec("selenium") is None:
        return "selenium is not installed"
    if not any(map(shutil.which, BROWSERS)):
        return f"there is no browser: {', '.join(BROWSERS)}"
    return None if shutil.which(DRIVER) else f"there is no {DRIVER}"


@contextmanager
def browsing(
    profile: Path, width: int = 1280, height: int = 1600, scale: float = 1
) -> Iterator[Any]:
    """Context with the driver of a browser.

    Args:
        profile: an empty folder for what it stores.
        width, height: of the window in CSS pixels.
        scale: pixels of a screenshot for each of them.

    Raises:
        RuntimeError: there is no browser, driver or Selenium.
    """
    reason = missing()
    if reason is not None:
        raise RuntimeError(f"a browser is needed: {reason}")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, BROWSERS)))
    window = (f"--window-size={width},{height}", f"--force-device-scale-factor={scale:g}")
    for flag in (*FLAGS, *window, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


def drop_file(driver: Any, selector: str, path: Path) -> None:
    """Drop a file on an element, as a person does from another window."""
    target = driver.find_element("css selector", selector)
    content = base64.b64encode(path.read_bytes()).decode()
    driver.execute_script(_DROP, target, path.name, content)
