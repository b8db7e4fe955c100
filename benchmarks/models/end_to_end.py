"""Images per second of whole networks on photos, unpruned and with Cropr, on the device at hand; random weights.

python -m benchmarks.models.end_to_end [--models vit_small_patch16_224 ...] [--repeats 9]
"""

import argparse
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import cropr_kernels as cropr
from benchmarks.utils.results import RESULTS, Results, environment
from cropr_kernels.pruning.api import deployed_copy
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
    """The model as it is, and deployed with Cropr, without and with Last Layer Fusion."""
    made = {"no pruning": model}
    for name, llf in ((f"Cropr, R = {rate}", False), (f"Cropr, R = {rate}, LLF", True)):
        cropr.apply(model, rate=rate, llf=llf)
        made[name] = deployed_copy(model)
        cropr.remove(model)
    return made


def gflops(model: nn.Module, image: Tensor) -> float:
    with flop_counter() as counter:
        model(image)
    return counter.get_total_flops() / 2e9


def pruning_share(model: nn.Module, images: Tensor) -> float:
    """Time inside cropr ops over the time of the whole forward, by the profiler.

    Of the functional ops: those of the engine also do what a block without pruning does, and cannot be told apart.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler says that it started and stopped
    model = cropr.deploy(model, engine=False)
    on_gpu = images.device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities, acc_events=True) as profiler:
        model(images)
        if on_gpu:
            torch.cuda.synchronize()
    total = ours = 0.0
    for event in profiler.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        total += own
        if event.key.startswith("cropr::"):
            ours += event.device_time_total if on_gpu else event.cpu_time_total
    return ours / total


@torch.inference_mode()
def compare(names: list[str], images: Tensor, repeats: int = 5) -> list[Row]:
    """Time every variant of every model, in turns, and return one row each; the median is used."""
    rows, device = [], images.device
    pixels = (images - 0.5) / 0.5
    for name in names:
        torch.manual_seed(0)
        base = cropr.create_vit(name).eval().to(device)
        made = variants(base)
        expected = base(pixels[:1])
        cropr.apply(base, rate=0)
        if not torch.equal(base(pixels[:1]), expected):
            raise RuntimeError(f"{name}: at rate 0 the pruned model differs from the unpruned one")
        cropr.remove(base)
        calls = {method: lambda model=model: model(pixels) for method, model in made.items()}
        times = {method: one.seconds for method, one in time_interleaved(calls, device, repeats, show=True).items()}
        first_time = times["no pruning"]
        first_flops = gflops(base, pixels[:1])
        for method, model in made.items():
            seconds, flops = times[method], gflops(model, pixels[:1])
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
    """The rows as text, one line each."""
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
    return text_table(("model", "method", "images/s", "speed-up", "GFLOPs", "FLOP ratio", "pruning"), lines, left=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "vit_base_patch16_224"])
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
