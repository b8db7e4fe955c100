"""`cropr bench`: how fast a model runs on this device, unpruned and at several rates."""

import argparse
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.outputs import outputs_of
from ..pruning.api import deployed_copy, set_rate
from ..tuning import default_rates
from ..utils.flops import flop_counter
from ..utils.io import table, write_text
from ..utils.timing import medians
from ..utils.viz import save_speed_curves
from .common import add_arguments, add_model, count, load_model, place_of

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure a model on this device, unpruned and at several rates",
        description="Time a deployed model at several rates and batch sizes, in turns; a name has random weights. The "
        "engine is first compared with the functional ops. Writes OUT.json and, with matplotlib, OUT.png.",
    )
    add_model(parser)
    add_arguments(parser, "--rates", "--llf", "--merge", "--device", "--dtype", "--rounds", "--quiet")
    parser.add_argument("--batch", type=count, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--cuda-graphs", action="store_true", help="replay CUDA graphs")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="file without suffix (default: bench)")
    parser.set_defaults(run=run)


@torch.inference_mode()
def measure(model: Any, images: Tensor, rates: list[int], *, graphs: int, rounds: int, show: bool) -> list[dict]:
    """One row per rate, 0 first; RuntimeError where the engine computes something else than the functional ops."""
    fast, plain = deployed_copy(model, cuda_graphs=graphs), deployed_copy(model, engine=False)
    calls: dict[Any, Callable[[], Any]] = {}
    gflops: dict[int, float] = {}
    for rate in rates:
        expected, got = (outputs_of(set_rate(one, rate)(images)) for one in (plain, fast))
        difference = ((got - expected).abs().max() / expected.abs().max()).item()
        allowed = _TOLERANCE.get(images.dtype)  # in 16 bits a near-tie may prune another token
        if allowed is not None and not difference <= allowed:
            raise RuntimeError(f"at rate {rate} the engine differs from the functional ops: {difference:.2g}")
        with flop_counter() as counter:
            plain(images[:1])
        gflops[rate] = counter.get_total_flops() / 2e9
        calls[rate] = lambda rate=rate: set_rate(fast, rate)(images)  # type: ignore[misc]
    rows = []
    for rate, seconds in medians(calls, images.device, rounds, show).items():
        row = {"rate": rate, "seconds": seconds, "images_per_second": len(images) / seconds, "gflops": gflops[rate]}
        rows.append(row | {"flop_ratio": gflops[0] / gflops[rate]})
    return [row | {"speedup": rows[0]["seconds"] / row["seconds"]} for row in rows]


def run(options: argparse.Namespace) -> None:
    model, pixels, _ = load_model(options, pretrained=False)
    place = place_of(options)
    model.to(**place)
    rates = [0, *(rate for rate in options.rates or default_rates(model) if rate)]
    graphs, rows = len(rates) if options.cuda_graphs else 0, []
    for batch in options.batch:
        images = torch.randn(batch, 3, *pixels.img_size).to(**place)
        found = measure(model, images, rates, graphs=graphs, rounds=options.rounds, show=not options.quiet)
        rows += [{"batch": batch, **row} for row in found]
    device, dtype = place["device"], str(place["dtype"]).removeprefix("torch.")
    device = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    reason = deployed_copy(model).cropr.engine_reason
    about = {
        "model": options.model,
        "llf": model.cropr.config.llf,
        "merge": model.cropr.config.merge is not None,
        "dtype": dtype,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cropr_kernels": importlib.metadata.version("cropr_kernels"),
        "engine": f"off, {reason}" if reason else "zero-copy",
    }
    out, picture = options.out.with_suffix(".json"), options.out.with_suffix(".png")
    write_text(out, json.dumps({**about, "rows": rows}, indent=1) + "\n")
    formats = dict(batch="d", rate="d", images_per_second=".1f", speedup=".2f", gflops=".3g", flop_ratio=".2f")
    cells = [[format(row[name], one) for name, one in formats.items()] for row in rows]
    print(table(["batch", "rate", "images/s", "speed-up", "GFLOPs", "FLOP ratio"], cells, left=0))
    print(f"{device}, {dtype}, engine {about['engine']}; wrote {out}")
    try:
        save_speed_curves(picture, rows, f"{options.model} on {device}, {dtype}")
        print(f"wrote {picture}")
    except ImportError as error:
        print(error)
