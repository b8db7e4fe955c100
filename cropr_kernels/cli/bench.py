"""`cropr bench`: how fast a model runs on this device, unpruned and at several rates."""

import argparse
import copy
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cropr_kernels import __version__

from ..models.outputs import outputs_of
from ..pruning.api import deployed_copy, hold_graphs, set_rate
from ..utils.flops import flop_counter
from ..utils.io import table, write_text
from ..utils.progress import each
from ..utils.timing import ABOVE_FLOPS, above_flops, time_interleaved
from ..utils.viz import save_speed_curves
from .common import load_model, place_of
from .outputs import check_file, checked_rates

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def differing(expected: Tensor, got: Tensor) -> tuple[Tensor, float]:
    """Which images differ, (B,) bool, and by how much of the largest output at most. In 16 bits near-ties are many."""
    difference = (got - expected).flatten(1).abs().amax(1) / expected.abs().max()
    allowed = _TOLERANCE.get(expected.dtype)
    odd = ~(difference <= allowed) if allowed is not None else torch.zeros_like(difference, dtype=torch.bool)
    return odd, difference.max().item()


def agrees(model: Any, images: Tensor, rate: int) -> bool:
    """Whether the engine computes what the functional ops do in float64.

    What differs in float32 and not here is a near-tie: by rounding another token is pruned.
    """
    whole = copy.deepcopy(model).double()
    fast, plain = (set_rate(deployed_copy(whole, engine=engine), rate) for engine in (True, False))
    odd, _ = differing(*(outputs_of(one(images.double())) for one in (plain, fast)))
    return not odd.any()


@torch.inference_mode()
def measure(
    model: Any, images: Tensor, rates: list[int], *, graphs: bool | None, rounds: int | None, show: bool
) -> list[dict[str, Any]]:
    """One row per rate, 0 first; RuntimeError where the engine computes something else than the functional ops."""
    fast = deployed_copy(model, cuda_graphs=None if graphs is None else graphs * len(rates))
    hold_graphs(fast, len(rates))
    plain = deployed_copy(model, engine=False)
    calls: dict[Any, Callable[[], Any]] = {}
    gflops: dict[int, float] = {}
    what = f"batch {len(images)}"
    for rate in each(rates, f"{what}, comparing with the functional ops", show=show):
        with flop_counter() as counter:
            expected = outputs_of(set_rate(plain, rate)(images))
        got = outputs_of(set_rate(fast, rate)(images))
        odd, difference = differing(expected, got)
        if odd.any() and not agrees(model, images[odd], rate):
            raise RuntimeError(f"at rate {rate} the engine differs from the functional ops: {difference:.2g}")
        gflops[rate] = counter.get_total_flops() / 2e9 / len(images)
        calls[rate] = lambda rate=rate: set_rate(fast, rate)(images)  # type: ignore[misc]
    rows = []
    for rate, timing in time_interleaved(calls, images.device, rounds, show=show, what=what).items():
        row = {"rate": rate, **timing._asdict(), "images_per_second": len(images) / timing.seconds}
        rows.append(row | {"spread": timing.spread, "gflops": gflops[rate], "flop_ratio": gflops[0] / gflops[rate]})
    return [row | {"speedup": rows[0]["seconds"] / row["seconds"]} for row in rows]


def report(rows: list[dict[str, Any]]) -> str:
    """The rows of a batch size as a table, and what is to be known about them."""
    formats = dict(rate="d", images_per_second=".1f", spread=".0%", speedup=".2f", gflops=".3g", flop_ratio=".2f")
    cells = [[format(row[name], one) for name, one in formats.items()] for row in rows]
    text = table(["rate", "images/s", "spread", "speed-up", "GFLOPs", "FLOP ratio"], cells, left=0)
    beyond = [str(row["rate"]) for row in rows if above_flops(row["speedup"], row["flop_ratio"])]
    return f"batch {rows[0]['batch']}\n{text}" + (f"\nrate {', '.join(beyond)}: {ABOVE_FLOPS}" if beyond else "")


def run(options: argparse.Namespace) -> None:
    stem = options.out.with_suffix("") if options.out.suffix in (".json", ".png") else options.out
    out, picture = (stem.with_name(stem.name + suffix) for suffix in (".json", ".png"))
    check_file(out, ".json")
    place = place_of(options)
    model, pixels, _ = load_model(options, pretrained=False)
    rates = [0, *(rate for rate in checked_rates(model, options.rates) if rate)]
    model.to(**place)
    rows = list[dict[str, Any]]()
    device, dtype = place["device"], str(place["dtype"]).removeprefix("torch.")
    device = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    reason = deployed_copy(model).cropr.engine_reason
    about = {
        "model": options.model,
        "llf": model.cropr.config.llf and str(model.cropr.config.llf),
        "merge": model.cropr.config.merge is not None,
        "dtype": dtype,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cropr_kernels": __version__,
        "engine": f"off, {reason}" if reason else "zero-copy",
        "cuda_graphs": {None: "of small batches", True: "yes", False: "no"}[options.cuda_graphs],
    }
    print(f"{device}, {dtype}, engine {about['engine']}; spread: between the quartiles, over the median")
    for batch in options.batch:
        images = torch.randn(batch, 3, *pixels.img_size).to(**place)
        found = measure(model, images, rates, graphs=options.cuda_graphs, rounds=options.rounds, show=not options.quiet)
        rows += (own := [{"batch": batch, **row} for row in found])
        print(report(own), flush=True)
        write_text(out, json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(f"wrote {out}")
    try:
        save_speed_curves(picture, rows, f"{options.model} on {device}, {dtype}")
        print(f"wrote {picture}")
    except ImportError as error:
        print(f"no picture: {error}")
