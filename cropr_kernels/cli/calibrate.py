"""`cropr calibrate`: queries for a pretrained model from a folder of photos, and the cost of each
rate."""

import argparse
import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from .. import calibration
from ..inference.loading import load_model
from ..models.adapters import find_spec
from ..models.pixels import Pixels
from ..query_files import save_queries
from ..utils.images import describe_skipped, find_photos, read_photos
from ..utils.io import table
from ..utils.optional import import_optional
from ..utils.progress import each
from .outputs import check_file, checked_rates


def batches(
    paths: list[Path], pixels: Pixels, label: str, show: bool, unreadable: list[str]
) -> Iterator[Tensor]:
    """Yield photos in batches of 16; collect those that cannot be read."""
    readable = read_photos(each(paths, label, show=show), pixels.load, unreadable)
    photos = (pixels.normalize(photo) for _, photo in readable)
    while batch := list(islice(photos, 16)):
        yield torch.stack(batch)


def run(options: argparse.Namespace) -> None:
    check_file(options.out, ".safetensors")
    for library in ("safetensors.torch", "PIL.Image"):
        import_optional(library, "demo", "cropr calibrate")
    skipped: Counter[str] = Counter()
    paths = find_photos(options.folder, skipped)
    if len(paths) < 2:
        raise ValueError(
            f"{options.folder} must hold at least 2 photos, to fit and to compare, got {len(paths)}"
        )
    random.Random(options.seed).shuffle(paths)
    num_fit = min(options.photos, max(len(paths) * 2 // 3, 1))
    held_out = paths[num_fit : num_fit + options.held_out]
    model, pixels, *_ = load_model(options)
    rates = checked_rates(model, options.rates)
    show = not options.quiet
    print(f"photos: {pixels}{describe_skipped(skipped)}")
    unreadable: tuple[list[str], list[str]] = [], []
    calibration.calibrate(
        model, batches(paths[:num_fit], pixels, "calibrating", show, unreadable[0])
    )
    metadata: dict[str, object] = {"model": options.model, "rate": None}
    # Before the comparison, which may be interrupted
    save_queries(model, options.out, metadata)
    compare = batches(held_out, pixels, f"comparing at {len(rates)} rates", show, unreadable[1])
    rows = calibration.agreement(model, compare, rates)
    best = calibration.recommend(rows, options.least / 100)
    classifies = find_spec(model).num_classes > 0
    cells = [
        [f"{row.rate}", f"{row.flops:.2f}", f"{100 * row.agreement:.1f}", f"{row.divergence:.3f}"]
        for row in rows
    ]
    if not classifies:
        cells = [[*row[:-1], "-"] for row in cells]
    print(
        table(
            ["rate", "times fewer FLOPs", "same class, %" if classifies else "cosine, %", "KL"],
            cells,
            left_aligned=0,
        )
    )
    num_used = num_fit - len(unreadable[0])
    num_compared = len(held_out) - len(unreadable[1])
    print(
        f"{num_used} photos to fit, {num_compared} to compare, {sum(map(len, unreadable))} "
        "unreadable"
    )
    print("".join(f"  {line}\n" for line in [*unreadable[0], *unreadable[1]][:5]), end="")
    metadata |= {
        "rate": None if best is None else best.rate,
        "report": [row._asdict() for row in rows],
    }
    save_queries(model, options.out, metadata)
    recommendation = (
        f"recommended: rate {best.rate}"
        if best
        else f"no rate agrees in {options.least:g} %: try lower --rates"
    )
    print(f"{recommendation}; wrote {options.out}")
