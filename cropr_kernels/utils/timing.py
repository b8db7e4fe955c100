"""Time of calls that take turns on one device."""

import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .optional import need


def medians(calls: Mapping[Any, Callable[[], Any]], device: torch.device, rounds: int, show: bool) -> dict[Any, float]:
    """Median seconds of every call of `rounds` timings; they take turns in shuffled order, after a round to warm up."""
    settle = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    order, shuffler = list(calls), random.Random(0)
    times: dict[Any, list[float]] = {key: [] for key in calls}
    turns: Any = range(rounds + 1)
    if show:
        turns = need("tqdm", "demo", "a progress bar").tqdm(turns, desc="measuring", leave=False, mininterval=1)
    for turn in turns:
        shuffler.shuffle(order)
        for key in order:
            settle()
            start = time.perf_counter()
            calls[key]()
            settle()
            if turn:
                times[key].append(time.perf_counter() - start)
    return {key: sorted(values)[len(values) // 2] for key, values in times.items()}
