"""Timing of several networks: checked first, then interleaved; their FLOPs and peak memory."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import cropr_kernels as cropr
from benchmarks.utils.results import Row
from benchmarks.utils.timing import compiled, graphed, interleaved, quantile, seconds_of
from cropr_kernels.utils.flops import flop_counter

Method = Callable[[Tensor], Tensor]


def relative_difference(output: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to that of the expected output."""
    return ((output.float() - expected.float()).norm() / expected.float().norm()).item()


def check(methods: dict[str, Any], images: Tensor) -> None:
    """Refuse to time a wrong result.

    Raises:
        RuntimeError: the engine does not compute what the functional ops compute.
    """
    tolerance = 1e-3 if images.dtype == torch.float32 else 0.1
    for name, expected_name in (("unpruned", "plain"), ("engine", "functional")):
        if not {name, expected_name} <= set(methods):
            continue
        error = relative_difference(methods[name](images), methods[expected_name](images))
        if not error < tolerance:
            raise RuntimeError(f"{name} differs from {expected_name} by {error:.1e} of its norm")
    # In 16 bits near-ties may select other tokens
    if "merge" in methods and images.dtype == torch.float32:
        functional = cropr.deploy(methods["merge"], engine=False)
        error = relative_difference(methods["merge"](images), functional(images))
        if not error < tolerance:
            raise RuntimeError(f"merge differs from its functional form by {error:.1e} of its norm")


def in_mode(model: Any, mode: str) -> Method:
    """Return the model itself ("eager"), compiled, or as a CUDA graph."""
    if mode == "compiled":
        return compiled(model)
    return graphed(model) if mode == "graph" else model


def launches(method: Method, images: Tensor) -> int:
    """Number of CUDA kernels of one call, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        method(images)
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if event.self_device_time_total > 0)


def warm_up(model: Any, images: Tensor, mode: str) -> tuple[Method, dict[str, int]]:
    """Run a model once in a mode; return it with its peak memory and number of kernels on a GPU."""
    method = in_mode(model, mode)
    if not images.is_cuda:
        method(images)
        return method, {}
    torch.cuda.reset_peak_memory_stats()
    method(images)
    figures = {"peak MiB": torch.cuda.max_memory_allocated() >> 20}
    if mode == "eager":
        figures["kernels"] = launches(method, images)
    return method, figures


@torch.inference_mode()
def measure(methods: dict[str, Any], images: Tensor, mode: str, rounds: int) -> Row:
    """Speed-up of each method over "unpruned"; on a GPU also milliseconds, kernels and memory."""
    check(methods, images)
    row: Row = {}
    ready: dict[str, Method] = {}
    for name, model in methods.items():
        try:
            ready[name], figures = warm_up(model, images, mode)
            row |= {f"{name}, {key}": value for key, value in figures.items()}
        # Recorded, not hidden
        except (RuntimeError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:
            row[f"{name}: error"] = str(error).splitlines()[0][:200]
    slowest = max(seconds_of(method, images) for method in ready.values())
    calls = max(1, min(20, int(0.02 / slowest)))
    times = interleaved(
        {name: partial(seconds_of, ready[name], images, calls) for name in ready}, rounds
    )
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
    """GFLOPs of one image, counted as multiply-adds, as in the paper."""
    with flop_counter() as counter:
        model(image)
    return round(counter.get_total_flops() / 2e9, 3)


def peak_mib(model: Any, images: Tensor) -> float:
    """Peak memory of one forward in MiB, without weights and images; on a CPU by the profiler."""
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        baseline = torch.cuda.memory_allocated()
        model(images)
        return round((torch.cuda.max_memory_allocated() - baseline) / 2**20, 1)
    # Silences the profiler's start and stop messages
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from torch.profiler import ProfilerActivity, profile

    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        model(images)
    allocated = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return round(peak / 2**20, 1)


def cell(models: dict[str, Any], image: Tensor, batch: int, mode: str, rounds: int) -> list[Row]:
    """One row for each system: the figures of `measure`, GFLOPs and peak memory.

    Raises:
        RuntimeError: an output is not finite, or the engine does not compute what the plain network
            computes.
    """
    images = image.repeat(batch, *[1] * (image.ndim - 1))
    for name, model in models.items():
        if not model(images).isfinite().all():
            raise RuntimeError(f"{name}: the output is not finite; not timed")
    figures = measure(models, images, mode, rounds)
    rows = []
    for name, model in models.items():
        row: Row = {
            "system": name,
            "GFLOPs": gflops(model, image),
            "peak MiB": peak_mib(model, images),
        }
        keys = {"speed-up": f"unpruned / {name}", "error": f"{name}: error"}
        keys |= {key: f"{name}, {key}" for key in ("ms", "images/s", "kernels")}
        rows.append(
            row | {key: figures[column] for key, column in keys.items() if column in figures}
        )
    return rows
