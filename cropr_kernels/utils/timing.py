"""Time of calls that take turns on one device."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .optional import need


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, until its result is there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def medians(calls: Mapping[Any, Callable[[], Any]], device: torch.device, rounds: int, show: bool) -> dict[Any, float]:
    """Median seconds of every call; they take turns in shuffled order, after one round that does not count.

    Args:
        calls: what to time, by name.
        device: where they run.
        rounds: timings of each, at least 1.
        show: whether to show a progress bar (tqdm).
    """
    order, shuffler = list(calls), random.Random(0)
    times: dict[Any, list[float]] = {key: [] for key in calls}
    turns: Any = range(rounds + 1)
    if show:
        turns = need("tqdm", "demo", "a progress bar").tqdm(turns, desc="measuring", leave=False, mininterval=1)
    for turn in turns:
        shuffler.shuffle(order)
        for key in order:
            spent = seconds(calls[key], device)
            if turn:
                times[key].append(spent)
    return {key: sorted(values)[len(values) // 2] for key, values in times.items()}
