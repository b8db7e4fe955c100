"""Images per second of networks on photos, unpruned and with Cropr; random weights.

python -m benchmarks.models.end_to_end [--models vit_small_patch16_224 ...] [--repeats 9]
"""

import argparse
import dataclasses
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import cropr_kernels as cropr
from benchmarks.utils.results import RESULTS, Results, environment
from cropr_kernels.pruning.deployment import deployed_copy
from cropr_kernels.utils.flops import flop_counter
from cropr_kernels.utils.images import find_photos, load_photo
from cropr_kernels.utils.io import table as text_table
from cropr_kernels.utils.timing import time_interleaved

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
RATE = 8


@dataclass
class Row:
    model: str
    method: str
    images_per_s: float
    speed_up: float
    gflops: float  # multiply-adds of one image, as papers count them
    flop_ratio: float
    pruning_share: float  # of the forward's time, in the functional cropr ops


def variants(model: nn.Module, rate: int = RATE) -> dict[str, nn.Module]:
    """Return the model, and deployed copies with Cropr, without and with Last Layer Fusion."""
    models = {"no pruning": model}
    for name, llf in ((f"Cropr, R = {rate}", False), (f"Cropr, R = {rate}, LLF", True)):
        cropr.apply(model, rate=rate, llf=llf, num_outputs=0)
        models[name] = deployed_copy(model)
        cropr.remove(model)
    return models


def gflops(model: nn.Module, image: Tensor) -> float:
    with flop_counter() as counter:
        model(image)
    return counter.get_total_flops() / 2e9


def pruning_share(model: nn.Module, images: Tensor) -> float:
    """Share of the forward's time spent in cropr ops, by the profiler.

    Measured on the functional ops: ops of the engine include work of an unpruned block, which
    cannot be separated.
    """
    # Silences the profiler's start and stop messages
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    model = cropr.deploy(model, engine=False)
    on_gpu = images.device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities, acc_events=True) as profiler:
        model(images)
        if on_gpu:
            torch.cuda.synchronize()
    total = in_cropr = 0.0
    for event in profiler.key_averages():
        self_time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        total += self_time
        if event.key.startswith("cropr::"):
            in_cropr += event.device_time_total if on_gpu else event.cpu_time_total
    return in_cropr / total


@torch.inference_mode()
def compare(names: list[str], images: Tensor, repeats: int = 5) -> list[Row]:
    """Time every variant of every model, interleaved, and return one row each, by the median."""
    rows = []
    device = images.device
    pixels = (images - 0.5) / 0.5
    for name in names:
        torch.manual_seed(0)
        base = cropr.create_vit(name).eval().to(device)
        methods = variants(base)
        expected = base(pixels[:1])
        cropr.apply(base, rate=0, num_outputs=0)
        if not torch.equal(base(pixels[:1]), expected):
            raise RuntimeError(f"{name}: at rate 0 the pruned model differs from the unpruned one")
        cropr.remove(base)
        calls = {method: partial(model, pixels) for method, model in methods.items()}
        timings = time_interleaved(calls, device, repeats, show=True)
        times = {method: timings[method].seconds for method in methods}
        first_time = times["no pruning"]
        first_flops = gflops(base, pixels[:1])
        for method, model in methods.items():
            seconds = times[method]
            flops = gflops(model, pixels[:1])
            rows.append(
                Row(
                    model=name,
                    method=method,
                    images_per_s=len(images) / seconds,
                    speed_up=first_time / seconds,
                    gflops=flops,
                    flop_ratio=first_flops / flops,
                    pruning_share=0.0 if model is base else pruning_share(model, pixels),
                )
            )
    return rows


def table(rows: list[Row]) -> str:
    """Format the rows as text, one line each."""
    lines = [
        (
            row.model,
            row.method,
            f"{row.images_per_s:.1f}",
            f"{row.speed_up:.2f}x",
            f"{row.gflops:.1f}",
            f"{row.flop_ratio:.2f}x",
            f"{100 * row.pruning_share:.1f} %" if row.pruning_share else "-",
        )
        for row in rows
    ]
    return text_table(
        ("model", "method", "images/s", "speed-up", "GFLOPs", "FLOP ratio", "pruning"),
        lines,
        left_aligned=2,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=["vit_small_patch16_224", "vit_base_patch16_224"]
    )
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = options.out or RESULTS / f"{device}_end_to_end.json"
    images = torch.stack([load_photo(path) for path in find_photos(PHOTOS)]).to(device)
    rows = []
    results = Results(out, environment(device) | {"batch": len(images), "dtype": "float32"})
    for model in options.models:
        rows += compare([model], images, options.repeats)
        results.replace([dataclasses.asdict(row) for row in rows])
    print(table(rows))
    print(out)


if __name__ == "__main__":
    main()
