"""`cropr tune`: the schedule that reaches a speed on this device."""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch

from ..models.adapters import find_spec
from ..models.naming import create_model
from ..pruning.api import apply
from ..tuning import save_tuned, tune


def add_parser(commands: Any) -> None:
    """The arguments of `cropr tune`."""
    parser = commands.add_parser(
        "tune",
        help="find the schedule that reaches a speed on this device",
        description="Measure how the time of a model depends on the number of tokens on this device, choose how many "
        "stay after each block, measure that, and write it for cropr.apply(model, keep=FILE).",
    )
    parser.add_argument("model", help="a preset of cropr_kernels or a model of timm, with random weights")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--speedup", type=float, help="times as fast as the unpruned model")
    goal.add_argument("--latency-ms", type=float, help="milliseconds of a forward of the batch")
    parser.add_argument("--batch", type=int, default=1, help="images at a time (default: 1)")
    parser.add_argument("--llf", action="store_true", help="Last Layer Fusion")
    parser.add_argument("--merge", action="store_true", help="tokens that leave merge into those that stay")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on cuda")
    parser.add_argument("--rounds", type=int, default=9, help="timings of every token count (default: 9)")
    parser.add_argument(
        "--out", type=Path, default=Path("schedule.json"), help="file to write (default: schedule.json)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    if options.batch < 1:
        raise ValueError(f"--batch must be >= 1, got {options.batch}")
    model = create_model(options.model).eval().to(options.device, getattr(torch, dtype))
    apply(model, rate=0, llf=options.llf, merge=options.merge, num_outputs=0)
    known = find_spec(model)
    sides = (count * side for count, side in zip(known.grid, known.patch_size))
    images = torch.randn(options.batch, 3, *sides).to(options.device, getattr(torch, dtype))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuned = tune(
            model,
            images,
            speedup=options.speedup,
            latency_ms=options.latency_ms,
            rounds=options.rounds,
            show=not options.quiet,
        )
    about = {"model": options.model, "batch": options.batch, "dtype": dtype, "llf": options.llf, "merge": options.merge}
    save_tuned(options.out, tuned, about | {"device": options.device, "torch": torch.__version__})
    print(f"kept after each block: {' '.join(map(str, tuned.keep))}")
    print(f"unpruned {tuned.unpruned_ms:.3g} ms, pruned {tuned.pruned_ms:.3g} ms a batch of {options.batch}")
    print(f"speed-up: {tuned.measured:.2f} measured, {tuned.predicted:.2f} predicted")
    for warning in caught:
        if str(warning.message).startswith("cropr.tune: "):
            print(f"warning: {str(warning.message).removeprefix('cropr.tune: ')}")
    print(f"wrote {options.out}: cropr.apply(model, keep={str(options.out)!r}{', llf=True' if options.llf else ''})")
