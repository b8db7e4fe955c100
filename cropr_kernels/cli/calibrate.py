"""`cropr calibrate`: queries for a pretrained model from a folder of photos, and what each rate would cost."""

import argparse
import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import calibration
from ..models.adapters import find_spec
from ..models.pixels import Pixels
from ..utils.images import find_photos, readable, told
from ..utils.io import table
from ..utils.optional import need
from ..utils.progress import each
from .common import load_model
from .outputs import check_file, checked_rates


def batches(paths: list[Path], pixels: Pixels, label: str, show: bool, unreadable: list[str]) -> Iterator[Tensor]:
    """Photos in batches of 16; those that cannot be read go to a list."""
    read = readable(each(paths, label, show=show), pixels.load, unreadable)
    photos = (pixels.normalize(photo) for _, photo in read)
    while batch := list(islice(photos, 16)):
        yield torch.stack(batch)


def run(options: argparse.Namespace) -> None:
    check_file(options.out, ".safetensors")
    for library in ("safetensors.torch", "PIL.Image"):
        need(library, "demo", "cropr calibrate")
    skipped: Counter[str] = Counter()
    paths = find_photos(options.folder, skipped)
    if len(paths) < 2:
        raise ValueError(f"{options.folder} must hold 2 photos or more, to fit and to compare, got {len(paths)}")
    random.Random(options.seed).shuffle(paths)
    fitted = min(options.photos, max(len(paths) * 2 // 3, 1))
    compared = paths[fitted : fitted + options.held_out]
    model, pixels, _ = load_model(options)
    rates = checked_rates(model, options.rates)
    show = not options.quiet
    print(f"photos: {pixels}{told(skipped)}")
    unreadable: tuple[list[str], list[str]] = [], []
    calibration.calibrate(model, batches(paths[:fitted], pixels, "calibrating", show, unreadable[0]))
    facts: dict[str, Any] = {"model": options.model, "rate": None}
    calibration.save_queries(model, options.out, facts)  # what follows may be interrupted
    compare = batches(compared, pixels, f"comparing at {len(rates)} rates", show, unreadable[1])
    rows = calibration.agreement(model, compare, rates)
    best = calibration.recommend(rows, options.least / 100)
    classifies = find_spec(model).num_classes > 0
    cells = [[f"{row.rate}", f"{row.flops:.2f}", f"{100 * row.agreement:.1f}", f"{row.divergence:.3f}"] for row in rows]
    if not classifies:
        cells = [[*row[:-1], "-"] for row in cells]
    print(table(["rate", "times fewer FLOPs", "same class, %" if classifies else "cosine, %", "KL"], cells, left=0))
    used = fitted - len(unreadable[0]), len(compared) - len(unreadable[1])
    print(f"{used[0]} photos to fit, {used[1]} to compare, {sum(map(len, unreadable))} unreadable")
    print("".join(f"  {line}\n" for line in [*unreadable[0], *unreadable[1]][:5]), end="")
    facts |= {"rate": None if best is None else best.rate, "report": [row._asdict() for row in rows]}
    calibration.save_queries(model, options.out, facts)
    what = f"recommended: rate {best.rate}" if best else f"no rate agrees in {options.least:g} %: try lower --rates"
    print(f"{what}; wrote {options.out}")
