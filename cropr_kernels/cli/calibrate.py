"""`cropr calibrate`: queries for a pretrained model from a folder of photos, and what each rate would cost."""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import calibration
from ..pruning.api import apply
from ..tuning import default_rates
from ..utils.viz import find_photos, load_photo
from .common import Loaded, load_model


def add_parser(commands: Any) -> None:
    """The command's arguments."""
    parser = commands.add_parser(
        "calibrate",
        help="prune a pretrained model without labels and without training",
        description="Solve for the queries of a pretrained model on photos of a folder, compare the pruned model with "
        "the unpruned one on others, at several rates, and recommend one. Load them with cropr.load_queries.",
    )
    parser.add_argument("model", help="a model of timm, which downloads its weights, or a local weight file")
    parser.add_argument("folder", type=Path, help="photos, searched in all folders below; a few hundred are enough")
    parser.add_argument("--out", type=Path, default=Path("queries.pt"), help="file to write (default: queries.pt)")
    parser.add_argument("--photos", type=int, default=400, help="photos to calibrate on, at most (default: 400)")
    parser.add_argument("--held-out", type=int, default=200, help="other photos to compare on, at most (default: 200)")
    parser.add_argument("--rates", type=int, nargs="+", help="tokens dropped after each block (default: four rates)")
    parser.add_argument(
        "--least", type=float, default=95.0, help="agreement of the recommended rate in %% (default: 95)"
    )
    parser.add_argument("--merge", action="store_true", help="tokens that leave merge into those that stay")
    parser.add_argument("--llf", action="store_true", help="Last Layer Fusion")
    parser.add_argument("--mean", type=float, nargs=3, help="of the pixels (default: the model's, or 0.5)")
    parser.add_argument("--std", type=float, nargs=3, help="of the pixels (default: the model's, or 0.5)")
    parser.add_argument("--seed", type=int, default=0, help="which photos are drawn (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


class Photos:
    """Photos of a folder as batches; those that cannot be read are left out and counted."""

    def __init__(self, paths: list[Path], loaded: Loaded, label: str, show: bool):
        self.paths, self.loaded, self.label, self.show = paths, loaded, label, show
        self.broken: list[Path] = []

    def __iter__(self) -> Iterator[Tensor]:
        from tqdm import tqdm

        batch: list[Tensor] = []
        for path in tqdm(self.paths, desc=self.label, disable=not self.show, leave=False, mininterval=1):
            try:
                batch.append(self.loaded.normalise(load_photo(path, self.loaded.img_size)))
            except (OSError, SyntaxError):
                self.broken.append(path)
            if len(batch) == 16:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)


def run(options: argparse.Namespace) -> None:
    try:
        import tqdm  # noqa: F401
    except ImportError as error:
        raise ImportError("cropr calibrate needs tqdm and pillow: pip install 'cropr_kernels[demo]'") from error
    paths = find_photos(options.folder)
    if len(paths) < 2:
        raise ValueError(f"{options.folder} holds {len(paths)} photos; two is the least: one to fit, one to compare")
    random.Random(options.seed).shuffle(paths)
    fitted = min(options.photos, max(len(paths) * 2 // 3, 1))
    loaded = load_model(options.model, options.mean, options.std)
    model = loaded.model
    parts = paths[:fitted], paths[fitted : fitted + options.held_out]
    fit, compare = (
        Photos(part, loaded, label, not options.quiet)
        for part, label in zip(parts, ("calibrating", "reading photos to compare on"))
    )
    apply(model, rate=0, llf=options.llf, merge=options.merge, num_outputs=0)
    calibration.calibrate(model, fit)
    rows = calibration.agreement(model, compare, options.rates or default_rates(model))
    best = calibration.recommend(rows, options.least / 100)
    report = [row._asdict() for row in rows]
    facts: dict[str, Any] = {"model": options.model, "llf": options.llf, "merge": options.merge}
    facts |= {"rate": None if best is None else best.rate, "report": report}
    calibration.save_queries(model, options.out, facts)
    kind = "same class, %" if model.num_classes else "cosine, %"
    print(f"{'rate':>5}  {'times fewer FLOPs':>17}  {kind:>13}  {'KL':>7}")
    for row in rows:
        print(f"{row.rate:>5}  {row.flops:>17.2f}  {100 * row.agreement:>13.1f}  {row.divergence:>7.3f}")
    broken = len(fit.broken) + len(compare.broken)
    used = fitted - len(fit.broken), len(parts[1]) - len(compare.broken)
    print(f"{used[0]} photos to fit, {used[1]} to compare, {broken} unreadable")
    what = f"recommended: rate {best.rate}" if best else f"no rate agrees in {options.least:g} %: try lower --rates"
    print(f"{what}; wrote {options.out}")
