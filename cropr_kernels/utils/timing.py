"""Interleaved timing of several calls on one device."""

import random
import time
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

import torch

from .progress import Progress, announce

# As many rounds as there is time for
ROUNDS = 9
LEAST_ROUNDS = 3
SECONDS = 45.0

ABOVE_FLOPS = (
    "faster than the FLOP ratio: not less arithmetic, but fewer tokens that fit the caches "
    "better, or a noisy device; "
    "it need not hold elsewhere"
)


Key = TypeVar("Key", bound=Hashable)


class Timing(NamedTuple):
    """Seconds of a call: median and quartiles of several."""

    seconds: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """The interquartile range, as a share of the median."""
        return (self.high - self.low) / self.seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Time one call in seconds, until the device is done."""
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def fitting(seconds: float, budget: float = SECONDS) -> int:
    """Number of rounds of this many seconds each that fit into a budget: 3 to 9."""
    return max(LEAST_ROUNDS, min(ROUNDS, int(budget / max(seconds, 1e-9))))


def time_interleaved(
    calls: Mapping[Key, Callable[[], object]],
    device: torch.device,
    rounds: int | None = None,
    *,
    show: bool = False,
    label: str = "measuring",
) -> dict[Key, Timing]:
    """Time every call over `rounds` rounds, interleaved in shuffled order, after a warm-up round.

    Without a number of rounds there are 3 to 9, as many as take 45 seconds.
    """
    order = list(calls)
    shuffler = random.Random(0)
    times: dict[Key, list[float]] = {key: [] for key in calls}
    with Progress(f"{label}, warming up", len(calls), show=show) as progress:
        warm_up = 0.0
        for call in calls.values():
            warm_up += seconds_of(call, device)
            progress.update()
    rounds = rounds or fitting(warm_up)
    if show:
        announce(label, f"{rounds} rounds of {len(calls)} calls", rounds * warm_up)
    with Progress(label, rounds * len(calls), show=show) as progress:
        for _ in range(rounds):
            shuffler.shuffle(order)
            for key in order:
                times[key].append(seconds_of(calls[key], device))
                progress.update()
    return {key: _timing(values) for key, values in times.items()}


def _timing(values: list[float]) -> Timing:
    values = sorted(values)
    last = len(values) - 1
    return Timing(values[len(values) // 2], values[round(last / 4)], values[round(3 * last / 4)])


def above_flops(speedup: float, flop_ratio: float) -> bool:
    """Return true if a speed-up exceeds the ratio of FLOPs by more than 3 %."""
    return speedup > 1.03 * flop_ratio
