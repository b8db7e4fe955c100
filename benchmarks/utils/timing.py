"""Timing: by the clock or by CUDA events, interleaved, and in CUDA graphs."""

import ctypes
import random
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from cropr_kernels.pruning.graphs import Graphs

Key = TypeVar("Key")
COLD_BYTES = 400 << 20  # several times the L2 cache


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


@cache
def keep_memory() -> None:
    """Make glibc keep freed memory; a no-op with other C libraries.

    By default glibc returns large blocks to the system or not, depending on earlier calls, and
    returned blocks fault in again page by page: one and the same unpruned ViT-Ti took 147 or 165 ms
    in one process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            mallopt(parameter, value)


def interleaved(calls: dict[Key, Callable[[], float]], rounds: int) -> dict[Key, list[float]]:
    """Run the calls in turns, in an order that changes every round, and collect their results."""
    results: dict[Key, list[float]] = {key: [] for key in calls}
    order = list(calls)
    shuffler = random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for key in order:
            results[key].append(calls[key]())
    return results


def seconds_of(function: Callable[[Tensor], Any], x: Tensor, calls: int = 1) -> float:
    """Mean time of back-to-back calls; on a GPU by events, with gaps between eager launches."""
    if not x.is_cuda:
        keep_memory()
        start = time.perf_counter()
        for _ in range(calls):
            function(x)
        return (time.perf_counter() - start) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(calls):
        function(x)
    last.record()
    last.synchronize()
    return 1e-3 * first.elapsed_time(last) / calls


def timed(
    methods: dict[Key, Callable[[Tensor], Any]], x: Tensor, rounds: int
) -> dict[Key, list[float]]:
    """Seconds of each method on x, interleaved call by call, after two rounds of warm-up."""
    with tqdm(total=(rounds + 2) * len(methods), mininterval=5) as bar:

        def turn(method: Callable[[Tensor], Any]) -> float:
            bar.update()
            return seconds_of(method, x)

        turns = {key: partial(turn, method) for key, method in methods.items()}
        interleaved(turns, 2)
        return interleaved(turns, rounds)


def speed_up(plain: list[float], times: list[float]) -> dict[str, Any]:
    """Speed-up over `plain` by medians, with the spread of the times."""
    base = quantile(plain, 0.5)
    spread = [round(base / quantile(times, q), 3) for q in (0.9, 0.1)]
    return {"speed-up": round(base / quantile(times, 0.5), 3), "p10 p90": spread}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True)


def graphed(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Replay the model as a CUDA graph, captured at its first call."""
    graphs = Graphs(1)
    return lambda x: graphs(model, (x,), x.shape)


def cold_copies(x: Tensor) -> list[Tensor]:
    """Copies of x that exceed the L2 cache together."""
    return [x.clone() for _ in range(min(max(2, COLD_BYTES // max(x.nbytes, 1)), 64))]


def capture(function: Callable[..., Any], inputs: list[Tensor], *args: Any) -> torch.cuda.CUDAGraph:
    """One graph that calls the function once on each input."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(inputs[0], *args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in inputs:
            function(x, *args)
    return graph


def replay(
    graphs: dict[str, torch.cuda.CUDAGraph], calls: int, rounds: int = 25
) -> dict[str, list[float]]:
    """Microseconds of one call, with the graphs interleaved."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for round_ in range(rounds):
        for name, graph in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if round_ > 2:
                times[name].append(1e3 * start.elapsed_time(stop) / calls)
    return times


def clocked(
    functions: dict[str, Callable[[Tensor], Any]], inputs: list[Tensor], rounds: int
) -> dict[str, list[float]]:
    """Microseconds of one call by the clock, to test a script without a GPU."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for x in inputs:
                function(x)
            times[name].append(1e6 * (time.perf_counter() - start) / len(inputs))
    return times
