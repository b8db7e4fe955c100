"""`cropr bench`: how fast a model runs on this device, unpruned and at several rates."""

import argparse
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.adapters import find_spec
from ..models.naming import create_model
from ..pruning.api import apply, deploy, set_rate
from ..tuning import default_rates, medians
from ..utils.flops import flop_counter
from ..utils.io import table, write_text
from ..utils.viz import save_speed_curves

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def add_parser(commands: Any) -> None:
    """The command's arguments."""
    parser = commands.add_parser(
        "bench",
        help="measure a model on this device, unpruned and at several rates",
        description="Time a deployed model at several rates and batch sizes, all on the same engine, in turns. The "
        "engine is first compared with the functional ops. Writes OUT.json and, with matplotlib, OUT.png.",
    )
    parser.add_argument("model", help="a preset of cropr_kernels or a model of timm, with random weights")
    parser.add_argument("--rates", type=int, nargs="+", help="tokens dropped after each block (default: four rates)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--llf", action="store_true", help="Last Layer Fusion")
    parser.add_argument("--merge", action="store_true", help="tokens that leave merge into those that stay")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on cuda")
    parser.add_argument("--cuda-graphs", action="store_true", help="replay CUDA graphs")
    parser.add_argument("--rounds", type=int, default=9, help="timings of each (default: 9)")
    parser.add_argument(
        "--out", type=Path, default=Path("bench"), help="what to write, without suffix (default: bench)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


@torch.inference_mode()
def measure(model: Any, images: Tensor, rates: list[int], *, graphs: int, rounds: int, show: bool) -> list[dict]:
    """One row per rate, 0 first: seconds of a batch, images a second, speed-up, GFLOPs an image, and its ratio.

    Raises:
        RuntimeError: the engine computes something else than the functional ops.
    """
    fast, plain = deploy(model, cuda_graphs=graphs), deploy(model, engine=False)
    calls: dict[Any, Callable[[], Any]] = {}
    flops: dict[int, float] = {}
    for rate in rates:
        expected, got = set_rate(plain, rate)(images), set_rate(fast, rate)(images)
        difference = ((got - expected).abs().max() / expected.abs().max()).item()
        allowed = _TOLERANCE.get(images.dtype)  # in 16 bits a near-tie may send another token away
        if allowed is not None and not difference <= allowed:
            raise RuntimeError(
                f"cropr bench: at rate {rate} the engine differs from the functional ops: {difference:.2g}"
            )
        with flop_counter() as counter:
            plain(images[:1])
        flops[rate] = counter.get_total_flops() / 2e9
        calls[rate] = lambda rate=rate: set_rate(fast, rate)(images)  # type: ignore[misc]
    times = medians(calls, images.device, rounds, show)
    return [
        {
            "rate": rate,
            "seconds": times[rate],
            "images_per_second": len(images) / times[rate],
            "speedup": times[0] / times[rate],
            "gflops": flops[rate],
            "flop_ratio": flops[0] / flops[rate],
        }
        for rate in rates
    ]


def run(options: argparse.Namespace) -> None:
    if min(options.batch) < 1:
        raise ValueError(f"--batch must be >= 1, got {min(options.batch)}")
    dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    model = create_model(options.model).eval().to(options.device, getattr(torch, dtype))
    apply(model, rate=0, llf=options.llf, merge=options.merge, num_outputs=0)
    known = find_spec(model)
    rates = options.rates or default_rates(model)
    rows: list[dict[str, Any]] = []
    for batch in options.batch:
        sides = (count * side for count, side in zip(known.grid, known.patch_size))
        images = torch.randn(batch, 3, *sides).to(options.device, getattr(torch, dtype))
        how = {"graphs": len(rates) + 1 if options.cuda_graphs else 0, "rounds": options.rounds}
        found = measure(model, images, [0, *(rate for rate in rates if rate)], show=not options.quiet, **how)
        rows += [{"batch": batch, **row} for row in found]
    device = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else options.device
    about = {"model": options.model, "llf": options.llf, "merge": options.merge, "dtype": dtype, "device": device}
    about |= {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cropr_kernels": importlib.metadata.version("cropr_kernels"),
    }
    about["engine"] = deploy(model).cropr.engine_reason or "zero-copy"
    written = options.out.with_suffix(".json")
    write_text(written, json.dumps({**about, "rows": rows}, indent=1) + "\n")
    cells = [
        [f"{row['batch']}", f"{row['rate']}", f"{row['images_per_second']:.1f}"]
        + [f"{row[name]:.2f}" for name in ("speedup", "gflops", "flop_ratio")]
        for row in rows
    ]
    print(table(["batch", "rate", "images/s", "speed-up", "GFLOPs", "FLOP ratio"], cells))
    print(f"{device}, {dtype}, engine {about['engine']}; wrote {written}")
    try:
        save_speed_curves(options.out.with_suffix(".png"), rows, f"{options.model} on {device}, {dtype}")
    except ImportError as error:
        print(f"no picture: {error}")
    else:
        print(f"wrote {options.out.with_suffix('.png')}")
