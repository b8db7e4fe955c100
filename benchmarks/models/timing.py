"""Networks side by side: checked, then timed in turns; their FLOPs and peak memory."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cropr_kernels as cropr
from benchmarks.utils.timing import compiled, graphed, quantile, seconds_of, time_interleaved
from cropr_kernels.utils.flops import flop_counter

Method = Callable[[Tensor], Tensor]


def check(methods: dict[str, Any], images: Tensor) -> None:
    """Refuse to time a wrong result.

    Raises:
        RuntimeError: the engine does not compute what the functional ops compute.
    """
    tolerance = 1e-3 if images.dtype == torch.float32 else 0.1
    for one, other in (("unpruned", "plain"), ("engine", "functional")):
        if not {one, other} <= set(methods):
            continue
        got, expected = methods[one](images).float(), methods[other](images).float()
        error = ((got - expected).norm() / expected.norm()).item()
        if not error < tolerance:
            raise RuntimeError(f"{one} differs from {other} by {error:.1e} of its norm")
    if "merge" in methods and images.dtype == torch.float32:  # in 16 bits a near-tie may send the two apart
        got, expected = methods["merge"](images), cropr.deploy(methods["merge"], engine=False)(images)
        error = ((got - expected).norm() / expected.norm()).item()
        if not error < tolerance:
            raise RuntimeError(f"merge differs from its functional form by {error:.1e} of its norm")


def in_mode(model: Any, mode: str) -> Method:
    """The model as it is ("eager"), compiled, or as a CUDA graph."""
    if mode == "compiled":
        return compiled(model)
    return graphed(model) if mode == "graph" else model


def launches(method: Method, images: Tensor) -> int:
    """CUDA kernels of one call, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        method(images)
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if event.self_device_time_total > 0)


@torch.inference_mode()
def measure(methods: dict[str, Any], images: Tensor, mode: str, rounds: int) -> dict[str, Any]:
    """One row: how many times faster than "unpruned" each method is, on a GPU also milliseconds, kernels and memory."""
    check(methods, images)
    row: dict[str, Any] = {}
    ready: dict[str, Method] = {}
    for name, model in methods.items():
        try:
            ready[name] = in_mode(model, mode)
            if images.is_cuda:
                torch.cuda.reset_peak_memory_stats()
            ready[name](images)
            if images.is_cuda:
                row[f"{name}, peak MiB"] = torch.cuda.max_memory_allocated() >> 20
                if mode == "eager":
                    row[f"{name}, kernels"] = launches(ready[name], images)
        except (RuntimeError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:  # recorded, not hidden
            ready.pop(name, None)
            row[f"{name}: error"] = str(error).splitlines()[0][:200]
    once = max(seconds_of(method, images) for method in ready.values())
    calls = max(1, min(20, int(0.02 / once)))
    turns = {name: lambda method=method: seconds_of(method, images, calls) for name, method in ready.items()}
    times = time_interleaved(turns, rounds)
    median = {name: quantile(values, 0.5) for name, values in times.items()}
    if images.is_cuda:  # absolute times from a GPU only
        for name, values in times.items():
            row[f"{name}, ms"] = round(1e3 * median[name], 4)
            row[f"{name}, ms p10 p90"] = [round(1e3 * quantile(values, q), 4) for q in (0.1, 0.9)]
            row[f"{name}, images/s"] = round(len(images) / median[name], 1)
    for name, value in median.items():
        row[f"unpruned / {name}"] = round(median["unpruned"] / value, 4)
    if {"engine", "free slice"} <= set(median):
        row["free slice / engine"] = round(median["free slice"] / median["engine"], 4)
    return row


def gflops(model: Any, image: Tensor) -> float:
    """Multiply-adds of one image, as the paper counts."""
    with flop_counter() as counter:
        model(image)
    return round(counter.get_total_flops() / 2e9, 3)


def peak_mib(model: Any, images: Tensor) -> float:
    """The most memory that one forward holds beside weights and images, in MiB: what the profiler saw allocated."""
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(images)
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it says that it started and stopped
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        model(images)
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return round(peak / 2**20, 1)


def cell(models: dict[str, Any], image: Tensor, batch: int, mode: str, rounds: int) -> list[dict[str, Any]]:
    """One row a system: what `measure` finds, GFLOPs and peak memory.

    Raises:
        RuntimeError: an output is not finite, or the engine does not compute what the plain network computes.
    """
    images = image.repeat(batch, *[1] * (image.ndim - 1))
    for name, model in models.items():
        if not model(images).isfinite().all():
            raise RuntimeError(f"{name}: the output is not finite; not timed")
    figures = measure(models, images, mode, rounds)
    rows = []
    for name, model in models.items():
        row: dict[str, Any] = {"system": name, "GFLOPs": gflops(model, image), "peak MiB": peak_mib(model, images)}
        keys = {"speed-up": f"unpruned / {name}", "error": f"{name}: error"}
        keys |= {key: f"{name}, {key}" for key in ("ms", "images/s", "kernels")}
        rows.append(row | {key: figures[found] for key, found in keys.items() if found in figures})
    return rows
