"""`cropr tune`: the schedule that reaches a speed on this device."""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch

from ..tuning import save_tuned, tune
from ..utils.timing import ABOVE_FLOPS, above_flops
from .common import add_arguments, load_model, place_of
from .outputs import check_file


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="find the schedule that reaches a speed on this device",
        description="Measure how the time of a model depends on the number of tokens on this device, choose how many "
        "are kept after each block, measure that, and write it for cropr.apply(model, keep=FILE). A name has random "
        "weights.",
    )
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--speedup", type=float, help="times as fast as the unpruned model")
    goal.add_argument("--latency-ms", type=float, help="milliseconds of a forward of the batch")
    add_arguments(parser, "model", "--batch", "--llf", "--merge", "--device", "--dtype", "--rounds", "--quiet")
    parser.add_argument("--out", type=Path, default=Path("schedule.json"), help="file (default: %(default)s)")
    parser.set_defaults(run=run, after_stop="nothing was written; the same command begins anew")


def run(options: argparse.Namespace) -> None:
    check_file(options.out, ".json")
    place, batch = place_of(options), options.batch
    model, pixels, _ = load_model(options, pretrained=False)
    images = torch.randn(batch, 3, *pixels.img_size).to(**place)
    goal = {"speedup": options.speedup, "latency_ms": options.latency_ms}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuned = tune(model.to(**place), images, **goal, rounds=options.rounds, show=not options.quiet)
    llf, dtype = model.cropr.config.llf, str(place["dtype"]).removeprefix("torch.")
    about = {"model": options.model, "batch": batch, "dtype": dtype, "llf": llf, "merge": options.merge}
    print(f"kept after each block: {' '.join(map(str, tuned.keep))}")
    print(f"unpruned {tuned.unpruned_ms:.3g} ms, pruned {tuned.pruned_ms:.3g} ms a batch of {batch}")
    print(
        f"speed-up: {tuned.measured:.2f} measured (spread of the times {tuned.spread:.0%}), {tuned.predicted:.2f} "
        f"predicted; {tuned.flop_ratio:.2f} times fewer FLOPs"
    )
    if above_flops(tuned.measured, tuned.flop_ratio):
        print(ABOVE_FLOPS)
    for warning in caught:
        if str(warning.message).startswith("cropr.tune: "):
            print(f"warning: {str(warning.message).removeprefix('cropr.tune: ')}")
    save_tuned(options.out, tuned, about | {"device": str(place["device"]), "torch": torch.__version__})
    print(f"wrote {options.out}: cropr.apply(model, keep={str(options.out)!r}{', llf=True' if llf else ''})")
