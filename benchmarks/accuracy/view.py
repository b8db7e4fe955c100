"""The page of `cropr view`: milliseconds a move, what queries of its examples are worth, pictures.

python -m benchmarks.accuracy.view --data FOLDER [--parts moves queries pictures]

FOLDER as in accuracy/data.py. Needs Gradio, Selenium and a browser (benchmarks/utils/browser.py).
A move is timed in the browser, from the event of the slider to the decoded pictures of both photos.
Writes benchmarks/results/view.json, in which the rows of other parts stay, docs/view.jpg and
docs/view.gif.
"""

import argparse
import io
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import cropr_kernels as cropr
from benchmarks.accuracy.data import DATA, TRAIN, VAL, WEIGHTS, load_model, read_photos
from benchmarks.utils.browser import browsing
from benchmarks.utils.results import DOCS, RESULTS, ROOT, Results, environment
from cropr_kernels.models.class_names import class_names
from cropr_kernels.models.pixels import pixels_of
from cropr_kernels.utils.io import atomic_write
from cropr_kernels.view.comparison import Viewer
from cropr_kernels.view.page import Content, serving

NAME = "vit_tiny_patch16_224"
PHOTOS = sorted((ROOT / "examples" / "photos").glob("*.jpg"))
SHOWN = ("cat_chelsea", "coffee")  # in the pictures
PARTS = ("moves", "queries", "pictures")
RATE = 8
PHOTO_COUNT = 300  # to calibrate on, and to compare on
SEEDS = (5, 6, 7)  # of off_the_shelf
_MOVE = """
const [control, value, done] = arguments;
const range = document.querySelector(`#${control} input[type=range]`);
const tiles = () => ["first", "second"].map(
  side => document.querySelector(`#${side}-photo img.tiles`));
// With the caption, which names the block: a photo may lose no token in one
const state = image => image.closest("figure").innerHTML;
const before = tiles().map(state);
const start = performance.now();
const observer = new MutationObserver(() => {
  const images = tiles();
  if (!images.every((image, i) => image && state(image) !== before[i])) return;
  observer.disconnect();
  Promise.all(images.map(image => image.decode())).then(() => done(performance.now() - start));
});
observer.observe(document.body, {subtree: true, childList: true, attributes: true});
const value_of = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value");
value_of.set.call(range, value);
range.dispatchEvent(new Event("input", {bubbles: true}));
range.dispatchEvent(new Event("change", {bubbles: true}));
"""
# Top and bottom of what the pictures show
_BOX = """
const top = document.querySelector("#rate").getBoundingClientRect().top;
const tables = [...document.querySelectorAll("#first-photo table, #second-photo table")];
const bottom = Math.max(...tables.map(table => table.getBoundingClientRect().bottom));
return [top + scrollY - 12, bottom + scrollY + 12];
"""


@contextmanager
def page(folder: Path, photos: Sequence[Path], scale: float = 1) -> Iterator[tuple[Viewer, Any]]:
    """Context with a viewer of the pretrained model, and a browser at its page."""
    model, _ = load_model(folder)
    names = class_names(model, str(folder / WEIGHTS), model.config.num_classes)
    cropr.apply(model, rate=RATE, merge=True, num_outputs=0)
    viewer = Viewer(model, pixels_of(model, NAME), names)
    device = f"cpu, {torch.get_num_threads()} threads"
    with (
        tempfile.TemporaryDirectory() as profile,
        serving(viewer, Content(NAME, photos, None, device)) as address,
        browsing(Path(profile), width=1100, height=1500, scale=scale) as driver,
    ):
        driver.set_script_timeout(60)
        driver.get(address)
        wait_for_speed(driver)
        yield viewer, driver


def wait_for_speed(driver: Any) -> None:
    """Wait until the page has measured the time of its setting: nothing runs any more."""
    end = time.monotonic() + 120
    while "times as fast" not in driver.find_element("css selector", "body").text:
        if time.monotonic() > end:
            raise RuntimeError("the page measures no time within two minutes")
        time.sleep(0.1)


def move(driver: Any, control: str, value: int) -> float:
    """Move a slider, and return the milliseconds until the pictures are new."""
    return float(driver.execute_async_script(_MOVE, control, str(value)))


def time_moves(folder: Path) -> list[dict[str, Any]]:
    """Time moves to rates that are new, to those that were seen, and to blocks."""
    load = os.getloadavg()[0]  # of other processes
    with page(folder, PHOTOS) as (viewer, driver):
        rates = [rate for rate in range(1, viewer.highest_rate + 1) if rate != RATE]
        random.Random(0).shuffle(rates)
        moves: dict[str, list[float]] = {"new rate": [], "seen rate": [], "block": []}
        for rate in rates:
            moves["new rate"].append(move(driver, "rate", rate))
            wait_for_speed(driver)
        for rate in rates[:-1]:
            moves["seen rate"].append(move(driver, "rate", rate))
        for block in range(viewer.depth - 2, 0, -1):
            moves["block"].append(move(driver, "block", block))
    return [
        {
            "move": name,
            "ms": round(statistics.median(times)),
            "slowest": round(max(times)),
            "moves": len(times),
            "load": round(load, 1),
        }
        for name, times in moves.items()
    ]


@torch.inference_mode()
def measure_queries(folder: Path) -> list[dict[str, Any]]:
    """Agreement on photos of Tiny-ImageNet with queries of the examples, and of many photos."""
    rows = []
    archive = folder / DATA["Tiny-ImageNet"]
    for seed in SEEDS:
        images, _ = read_photos(archive, VAL, PHOTO_COUNT, seed)
        many, _ = read_photos(archive, TRAIN, PHOTO_COUNT, seed)
        model, _ = load_model(folder)
        cropr.apply(model, rate=RATE, merge=True, num_outputs=0)
        pixels = pixels_of(model, NAME)
        examples = pixels.normalize(torch.stack([pixels.load(path) for path in PHOTOS]))
        for source in (examples, many):
            cropr.calibrate(model, source)
            [row] = cropr.agreement(model, images, [RATE])
            rows.append({"photos": len(source), "seed": seed, "agreement": 100 * row.agreement})
    return rows


def screenshot(driver: Any) -> Image.Image:
    """Picture of the controls, the photos and their classes."""
    top, bottom = driver.execute_script(_BOX)
    content = driver.get_screenshot_as_png()
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    scale = picture.width / driver.execute_script("return innerWidth")
    return picture.crop((0, round(top * scale), picture.width, round(bottom * scale)))


def save_pictures(folder: Path) -> None:
    """Write a picture of the page, and a recording: tiles grow block by block, then the rate
    rises."""
    photos = [path for name in SHOWN for path in PHOTOS if path.stem == name]
    photos += [path for path in PHOTOS if path not in photos]
    with page(folder, photos, scale=2) as (_, driver), atomic_write(DOCS / "view.jpg") as temporary:
        picture = screenshot(driver)
        picture = picture.resize(size_of(picture, 1300), Image.Resampling.LANCZOS)
        picture.save(temporary, "JPEG", quality=85)
    with page(folder, photos) as (viewer, driver):
        frames = []
        for block in (*range(viewer.depth - 1), viewer.depth):
            move(driver, "block", block)
            frames.append((screenshot(driver), 350))
        frames[-1] = (frames[-1][0], 1500)
        for rate in (10, 12, 14, 16):
            move(driver, "rate", rate)
            wait_for_speed(driver)
            frames.append((screenshot(driver), 900))
    save_recording(frames, DOCS / "view.gif")


def size_of(picture: Image.Image, width: int) -> tuple[int, int]:
    """Size of a picture that is scaled to this width."""
    return width, round(picture.height * width / picture.width)


def save_recording(frames: list[tuple[Image.Image, int]], path: Path, width: int = 880) -> None:
    """Write frames, each with its milliseconds, as one GIF in colors that they share."""
    pictures = [
        frame.resize(size_of(frame, width), Image.Resampling.LANCZOS) for frame, _ in frames
    ]
    height = max(picture.height for picture in pictures)
    sheet = Image.new("RGB", (width, height * len(pictures)), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (0, number * height))
    indexed = sheet.quantize(256, dither=Image.Dither.NONE)
    cells = [
        indexed.crop((0, number * height, width, (number + 1) * height))
        for number in range(len(pictures))
    ]
    with atomic_write(path) as temporary:
        cells[0].save(
            temporary,
            "GIF",
            save_all=True,
            append_images=cells[1:],
            duration=[milliseconds for _, milliseconds in frames],
            loop=0,
            optimize=True,
        )
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {len(frames)} frames")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=RESULTS / "view.json")
    options = parser.parse_args()
    metadata = {"rate": RATE, "model": NAME}
    results = Results(options.out, environment("cpu") | metadata, keys=("part",))
    for part, measure in (("moves", time_moves), ("queries", measure_queries)):
        if part in options.parts:
            rows = [{"part": part, **row} for row in measure(options.data)]
            results.replace([*(row for row in results.rows if row["part"] != part), *rows])
            for row in rows:
                print(row)
    if "pictures" in options.parts:
        save_pictures(options.data)


if __name__ == "__main__":
    main()
