"""`cropr bench`: time a model on this device, unpruned and at several rates."""

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from cropr_kernels import __version__

from ..inference.loading import device_and_dtype, load_model
from ..models.outputs import outputs_of
from ..pruning.api import set_rate
from ..pruning.deployment import deployed_copy, hold_graphs
from ..pruning.model import modules_of
from ..utils.flops import flop_counter
from ..utils.io import table, write_text
from ..utils.progress import each
from ..utils.timing import ABOVE_FLOPS, above_flops, time_interleaved
from ..utils.viz import save_speed_curves
from .outputs import check_file, checked_rates

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def differing(expected: Tensor, actual: Tensor) -> tuple[Tensor, float]:
    """Return a mask of images that differ, (B,), and the largest difference over the largest
    output.

    In 16 bits no image counts as different: near-ties are frequent.
    """
    difference = (actual - expected).flatten(1).abs().amax(1) / expected.abs().max()
    allowed = _TOLERANCE.get(expected.dtype)
    differs = (
        ~(difference <= allowed)
        if allowed is not None
        else torch.zeros_like(difference, dtype=torch.bool)
    )
    return differs, difference.max().item()


def agrees(model: nn.Module, images: Tensor, rate: int) -> bool:
    """Return true if the engine and the functional ops agree in float64.

    Images that differ only in float32 have near-ties: rounding decides which token is pruned.
    """
    exact = copy.deepcopy(model).double()
    fast = set_rate(deployed_copy(exact, engine=True), rate)
    plain = set_rate(deployed_copy(exact, engine=False), rate)
    images = images.double()
    differs, _ = differing(outputs_of(plain(images)), outputs_of(fast(images)))
    return not differs.any()


def _run(model: nn.Module, rate: int, images: Tensor) -> object:
    return set_rate(model, rate)(images)


@torch.inference_mode()
def measure(
    model: nn.Module,
    images: Tensor,
    rates: list[int],
    *,
    graphs: bool | None,
    rounds: int | None,
    show: bool,
) -> list[dict[str, float]]:
    """Return a row per rate, 0 first; raises RuntimeError if engine and functional ops differ."""
    num_graphs = None if graphs is None else graphs * len(rates)
    fast = deployed_copy(model, cuda_graphs=num_graphs)
    by_image = modules_of(fast).has_counts_by_image
    equal = deployed_copy(model, equal_counts=True) if by_image else fast
    hold_graphs(fast, len(rates))
    plain = deployed_copy(model, engine=False)
    calls: dict[int, Callable[[], object]] = {}
    gflops: dict[int, float] = {}
    label = f"batch {len(images)}"
    for rate in each(rates, f"{label}, comparing with the functional ops", show=show):
        expected = outputs_of(set_rate(plain, rate)(images))
        actual = outputs_of(set_rate(equal, rate)(images))
        differs, difference = differing(expected, actual)
        if differs.any() and not agrees(model, images[differs], rate):
            raise RuntimeError(
                f"at rate {rate} the engine differs from the functional ops: {difference:.2g}"
            )
        with flop_counter() as counter:
            set_rate(fast, rate)(images)
        gflops[rate] = counter.get_total_flops() / 2e9 / len(images)
        calls[rate] = partial(_run, fast, rate, images)
    rows = []
    for rate, timing in time_interleaved(
        calls, images.device, rounds, show=show, label=label
    ).items():
        row = {"rate": rate, **timing._asdict(), "images_per_second": len(images) / timing.seconds}
        rows.append(
            row
            | {
                "spread": timing.spread,
                "gflops": gflops[rate],
                "flop_ratio": gflops[0] / gflops[rate],
            }
        )
    return [row | {"speedup": rows[0]["seconds"] / row["seconds"]} for row in rows]


def report(rows: list[dict[str, float]]) -> str:
    """Format the rows of a batch size as a table, and note speed-ups above the ratio of FLOPs."""
    formats = dict(
        rate="d",
        images_per_second=".1f",
        spread=".0%",
        speedup=".2f",
        gflops=".3g",
        flop_ratio=".2f",
    )
    cells = [[format(row[name], spec) for name, spec in formats.items()] for row in rows]
    text = table(
        ["rate", "images/s", "spread", "speed-up", "GFLOPs", "FLOP ratio"], cells, left_aligned=0
    )
    notable = [str(row["rate"]) for row in rows if above_flops(row["speedup"], row["flop_ratio"])]
    return f"batch {rows[0]['batch']}\n{text}" + (
        f"\nrate {', '.join(notable)}: {ABOVE_FLOPS}" if notable else ""
    )


def run(options: argparse.Namespace) -> None:
    stem = options.out.with_suffix("") if options.out.suffix in (".json", ".png") else options.out
    out, picture = (stem.with_name(stem.name + suffix) for suffix in (".json", ".png"))
    check_file(out, ".json")
    device, dtype = device_and_dtype(options)
    model, pixels, *_ = load_model(options, pretrained=False)
    rates = [0, *(rate for rate in checked_rates(model, options.rates) if rate)]
    model.to(device, dtype)
    modules_of(model).thresholds = None  # of photos, and the images are noise
    rows: list[dict[str, float]] = []
    dtype_name = str(dtype).removeprefix("torch.")
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    reason = deployed_copy(model).cropr.engine_reason
    metadata = {
        "model": options.model,
        "llf": model.cropr.config.llf and str(model.cropr.config.llf),
        "merge": model.cropr.config.merge is not None,
        "dtype": dtype_name,
        "device": device_name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cropr_kernels": __version__,
        "engine": f"off, {reason}" if reason else "zero-copy",
        "cuda_graphs": {None: "of small batches", True: "yes", False: "no"}[options.cuda_graphs],
    }
    print(
        f"{device_name}, {dtype_name}, engine {metadata['engine']}; spread: between the "
        "quartiles, over the median"
    )
    for batch in options.batch:
        images = torch.randn(batch, 3, *pixels.img_size).to(device, dtype)
        measured = measure(
            model,
            images,
            rates,
            graphs=options.cuda_graphs,
            rounds=options.rounds,
            show=not options.quiet,
        )
        batch_rows = [{"batch": batch, **row} for row in measured]
        rows += batch_rows
        print(report(batch_rows), flush=True)
        write_text(out, json.dumps({**metadata, "rows": rows}, indent=1) + "\n")
    print(f"wrote {out}")
    try:
        save_speed_curves(picture, rows, f"{options.model} on {device_name}, {dtype_name}")
        print(f"wrote {picture}")
    except ImportError as error:
        print(f"no picture: {error}")
