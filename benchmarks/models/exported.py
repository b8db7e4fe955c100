"""Time networks on a CPU, pruned and not, in PyTorch and as exported files in other runtimes.

python -m benchmarks.models.exported [--models M...] [--rates R...] [--minutes M] [--out FILE]
    -> benchmarks/results/exported.json

Needs the extra `openvino`, and onnxruntime. Weights are random, and queries calibrated on random
images. Files take any batch, and stay in the folder `--files`: a run that is interrupted goes on.
Each cell checks every output against eager PyTorch, and then times all runtimes, the unpruned and
the pruned network interleaved: eager, the engine in float32 and bfloat16, onnxruntime, OpenVINO in
float32 and bfloat16, with --compiled torch.compile (ViT-S, R = 8, merging). The share is the
speed-up over the FLOP ratio.
"""

import argparse
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cropr_kernels as cropr
from benchmarks.models.deployment import create, image_size
from benchmarks.models.timing import relative_difference
from benchmarks.utils.results import RESULTS, Results, environment
from benchmarks.utils.runtimes import Call, onnxruntime_call, openvino_call
from cropr_kernels.pruning.deployment import deployed_copy
from cropr_kernels.utils.flops import flop_counter
from cropr_kernels.utils.timing import LEAST_ROUNDS, Timing, time_interleaved

TOLERANCES = {"bfloat16": 0.3}  # a near-tie may prune another token
FLOAT32_TOLERANCE = 2e-3
# What torch.compile takes: unpruned, and merging at R = 8
COMPILED = (("vit_small_patch16_224", 0, False), ("vit_small_patch16_224", 8, True))


def pruned(name: str, rate: int, merge: bool) -> Any:
    """Create a network with calibrated queries."""
    model = cropr.apply(create(name, "cpu", torch.float32), rate=rate, merge=merge, num_outputs=0)
    if rate:
        torch.manual_seed(0)
        cropr.calibrate(model, torch.randn(4, 3, image_size(name), image_size(name)))
    return model


def exported(model: Any, path: Path) -> Path:
    """Export a network as ONNX, unless the file is there."""
    if not path.exists():
        side = image_size(path.name.partition("-")[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cropr.export(model, torch.randn(1, 3, side, side), path, dynamic_batch=True)
    return path


def calls_of(name: str, rate: int, merge: bool, folder: Path, *, compiles: bool) -> dict[str, Call]:
    """Return a network in every runtime."""
    model = pruned(name, rate, merge)
    kind = "unpruned" if not rate else f"{'merge' if merge else 'drop'}{rate}"
    path = exported(model, folder / f"{name}-{kind}.onnx")
    eager = deployed_copy(model, engine=False)
    engine = deployed_copy(model, equal_counts=True)  # as files have
    half = deployed_copy(model, equal_counts=True).to(torch.bfloat16)
    calls: dict[str, Call] = {
        "eager": eager,
        "engine": engine,
        "engine, bfloat16": lambda images: half(images.to(torch.bfloat16)),
        "onnxruntime": onnxruntime_call(path),
        "OpenVINO": openvino_call(path, "f32"),
        "OpenVINO, bfloat16": openvino_call(path, "bf16"),
    }
    if compiles:
        calls["torch.compile"] = torch.compile(eager, dynamic=False)
    return calls


def check(calls: dict[str, Call], images: Tensor) -> dict[str, float]:
    """Differences from eager; RuntimeError if a runtime computes something else."""
    expected = calls["eager"](images)
    differences: dict[str, float] = {}
    for runtime, call in calls.items():
        difference = relative_difference(call(images), expected)
        precision = runtime.rpartition(", ")[2]
        tolerance = TOLERANCES.get(precision, FLOAT32_TOLERANCE)
        if not difference < tolerance:
            raise RuntimeError(
                f"{runtime} differs from eager by {difference:.1e} of its norm, allowed are "
                f"{tolerance:g}"
            )
        differences[runtime] = difference
    return differences


def flops(model: Call, images: Tensor) -> int:
    with flop_counter() as counter:
        model(images)
    return counter.get_total_flops()


def time_pair(before: Call, after: Call, images: Tensor, seconds: float) -> list[Timing]:
    """Time two networks in one runtime, interleaved; between runtimes threads and memory change
    hands, which both would pay for."""
    calls = {"before": partial(before, images), "after": partial(after, images)}
    warm_up = time_interleaved(calls, images.device, 1)
    once = sum(timing.seconds for timing in warm_up.values())
    rounds = max(LEAST_ROUNDS, int(seconds / once))
    return list(time_interleaved(calls, images.device, rounds).values())


def measure(
    unpruned: dict[str, Call], fast: dict[str, Call], images: Tensor, seconds: float
) -> list[dict[str, Any]]:
    """Time both networks in all runtimes, and return a row for each runtime."""
    differences = check(unpruned, images), check(fast, images)
    ratio = flops(unpruned["eager"], images) / flops(fast["eager"], images)
    times = {
        runtime: time_pair(unpruned[runtime], fast[runtime], images, seconds / len(fast))
        for runtime in fast
    }
    rows: list[dict[str, Any]] = []
    for runtime in fast:
        before, after = times[runtime]
        speedup = before.seconds / after.seconds
        rows.append(
            {
                "runtime": runtime,
                "unpruned_ms": round(1e3 * before.seconds, 3),
                "pruned_ms": round(1e3 * after.seconds, 3),
                "spread": round(max(before.spread, after.spread), 4),
                "speedup": round(speedup, 4),
                "flop_ratio": round(ratio, 4),
                "share": round(speedup / ratio, 4),
                "over_eager": round(times["eager"][0].seconds / after.seconds, 4),
                "difference": float(f"{max(part[runtime] for part in differences):.1e}"),
            }
        )
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = ["vit_small_patch16_224", "vit_base_patch16_224"]
    parser.add_argument("--models", nargs="+", default=models)
    parser.add_argument("--rates", nargs="+", type=int, default=[8, 12])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--compiled", action="store_true", help="with torch.compile: minutes more")
    parser.add_argument("--files", type=Path, default=Path("build/exported"))
    parser.add_argument("--seconds", type=float, default=40.0, help="timing of one cell")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, default=RESULTS / "exported.json")
    options = parser.parse_args()
    os.makedirs(options.files, exist_ok=True)
    keys = ("model", "rate", "merge", "batch")
    results = Results(options.out, environment("cpu"), keys)
    cells = [
        (name, rate, merge, batch)
        for name in options.models
        for rate in options.rates
        for merge in (True, False)
        for batch in options.batches
    ]
    networks: dict[tuple[str, int, bool], dict[str, Call]] = {}
    for cell in results.remaining(cells, options.minutes):
        name, rate, merge, batch = cell
        needed = {(name, 0, False), (name, rate, merge)}
        networks = {key: calls for key, calls in networks.items() if key in needed}
        for key in needed - set(networks):
            networks[key] = calls_of(
                *key, options.files, compiles=options.compiled and key in COMPILED
            )
        side = image_size(name)
        torch.manual_seed(0)
        images = torch.randn(batch, 3, side, side)
        fast = networks[name, rate, merge]
        unpruned = {runtime: networks[name, 0, False][runtime] for runtime in fast}
        rows = measure(unpruned, fast, images, options.seconds)
        results.add(*({**dict(zip(keys, cell)), **row} for row in rows))
        for row in rows:
            print(*cell, row["runtime"], row["speedup"], row["share"], flush=True)


if __name__ == "__main__":
    main()
