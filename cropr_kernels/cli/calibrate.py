"""`cropr calibrate`: queries for a pretrained model from a folder of photos, and what each rate would cost."""

import argparse
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import calibration
from ..models.adapters import anatomy
from ..models.factory import Pixels
from ..tuning import default_rates
from ..utils.images import find_photos, load_photo
from ..utils.io import table
from ..utils.optional import need
from .common import add_arguments, load_model


def add_parser(commands: Any) -> None:
    """The command's arguments."""
    parser = commands.add_parser(
        "calibrate",
        help="prune a pretrained model without labels and without training",
        description="Solve for the queries of a pretrained model on photos of a folder, compare the pruned model with "
        "the unpruned one on others, at several rates, and recommend one. Load them with cropr.load_queries.",
    )
    add_arguments(parser, "model", "--rates", "--llf", "--merge", "--mean", "--std", "--quiet")
    parser.add_argument("folder", type=Path, help="photos, searched in all folders below; a few hundred are enough")
    parser.add_argument("--out", type=Path, default=Path("queries.pt"), help="file to write (default: queries.pt)")
    parser.add_argument("--photos", type=int, default=400, help="photos to calibrate on, at most (default: 400)")
    parser.add_argument("--held-out", type=int, default=200, help="other photos to compare on, at most (default: 200)")
    parser.add_argument(
        "--least", type=float, default=95.0, help="agreement of the recommended rate in %% (default: 95)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which photos are drawn (default: 0)")
    parser.set_defaults(run=run)


class Photos:
    """Photos as batches of 16; those that cannot be read are left out and counted."""

    def __init__(self, paths: list[Path], pixels: Pixels, label: str, show: bool):
        self.paths, self.pixels, self.label, self.show = paths, pixels, label, show
        self.unreadable = 0

    def _read(self) -> Iterator[Tensor]:
        tqdm = need("tqdm", "demo", "cropr calibrate").tqdm
        for path in tqdm(self.paths, desc=self.label, disable=not self.show, leave=False, mininterval=1):
            try:
                yield self.pixels.normalise(load_photo(path, self.pixels.img_size))
            except OSError:
                self.unreadable += 1

    def __iter__(self) -> Iterator[Tensor]:
        photos = self._read()
        while batch := list(islice(photos, 16)):
            yield torch.stack(batch)


def run(options: argparse.Namespace) -> None:
    paths = find_photos(options.folder)
    if len(paths) < 2:
        raise ValueError(
            f"{options.folder} must hold 2 photos or more, one to fit and one to compare, got {len(paths)}"
        )
    random.Random(options.seed).shuffle(paths)
    fitted = min(options.photos, max(len(paths) * 2 // 3, 1))
    compared = paths[fitted : fitted + options.held_out]
    model, pixels, _ = load_model(options)
    fit = Photos(paths[:fitted], pixels, "calibrating", not options.quiet)
    compare = Photos(compared, pixels, "reading photos to compare on", not options.quiet)
    calibration.calibrate(model, fit)
    rows = calibration.agreement(model, compare, options.rates or default_rates(model))
    best = calibration.recommend(rows, options.least / 100)
    facts: dict[str, Any] = {"model": options.model, "llf": model.cropr.llf, "merge": model.cropr.merging is not None}
    facts |= {"rate": None if best is None else best.rate, "report": [row._asdict() for row in rows]}
    calibration.save_queries(model, options.out, facts)
    classifies = anatomy(model).num_classes > 0
    cells = [
        [
            str(row.rate),
            f"{row.flops:.2f}",
            f"{100 * row.agreement:.1f}",
            f"{row.divergence:.3f}" if classifies else "-",
        ]
        for row in rows
    ]
    print(table(["rate", "times fewer FLOPs", "same class, %" if classifies else "cosine, %", "KL"], cells, left=0))
    unreadable = fit.unreadable + compare.unreadable
    used = fitted - fit.unreadable, len(compared) - compare.unreadable
    print(f"{used[0]} photos to fit, {used[1]} to compare, {unreadable} unreadable")
    what = f"recommended: rate {best.rate}" if best else f"no rate agrees in {options.least:g} %: try lower --rates"
    print(f"{what}; wrote {options.out}")
