"""`cropr tune`: find the schedule that reaches a speed on this device."""

import argparse
import warnings

import torch

from ..inference.loading import device_and_dtype, load_model
from ..tuning import save_tuned, tune
from ..utils.timing import ABOVE_FLOPS, above_flops
from .outputs import check_file


def run(options: argparse.Namespace) -> None:
    check_file(options.out, ".json")
    device, dtype = device_and_dtype(options)
    batch = options.batch
    model, pixels, *_ = load_model(options, pretrained=False)
    images = torch.randn(batch, 3, *pixels.img_size).to(device, dtype)
    goal = {"speedup": options.speedup, "latency_ms": options.latency_ms}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuned = tune(
            model.to(device, dtype), images, **goal, rounds=options.rounds, show=not options.quiet
        )
    llf = model.cropr.config.llf
    metadata = {
        "model": options.model,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "llf": llf and str(llf),
        "merge": model.cropr.config.merge is not None,
    }
    print(f"kept after each block: {' '.join(map(str, tuned.keep))}")
    print(
        f"unpruned {tuned.unpruned_ms:.3g} ms, pruned {tuned.pruned_ms:.3g} ms a batch of {batch}"
    )
    print(
        f"speed-up: {tuned.measured:.2f} measured (spread of the times {tuned.spread:.0%}), "
        f"{tuned.predicted:.2f} "
        f"predicted; {tuned.flop_ratio:.2f} times fewer FLOPs"
    )
    if above_flops(tuned.measured, tuned.flop_ratio):
        print(ABOVE_FLOPS)
    for warning in caught:
        if str(warning.message).startswith("cropr.tune: "):
            print(f"warning: {str(warning.message).removeprefix('cropr.tune: ')}")
    save_tuned(options.out, tuned, metadata | {"device": str(device), "torch": torch.__version__})
    apply_options = (", merge=True" if model.cropr.config.merge else "") + (
        f", llf=cropr.{llf!r}" if llf else ""
    )
    print(f"wrote {options.out}: cropr.apply(model, keep={str(options.out)!r}{apply_options})")
