"""Time of calls that take turns on one device."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from .progress import Progress, announce

ROUNDS, LEAST_ROUNDS, SECONDS = 9, 3, 45.0  # as many rounds as there is time for

ABOVE_FLOPS = (
    "faster than the FLOP ratio: not less arithmetic, but fewer tokens that fit the caches better, or a noisy device; "
    "it need not hold elsewhere"
)


class Timing(NamedTuple):
    """Seconds of one call: the median of several, and the quartiles."""

    seconds: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """The interquartile range, as a share of the median."""
        return (self.high - self.low) / self.seconds


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, with all that it leaves to the device."""
    settle = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    settle()
    start = time.perf_counter()
    call()
    settle()
    return time.perf_counter() - start


def fitting(seconds: float, budget: float = SECONDS) -> int:
    """Rounds of so many seconds each that fit into a budget: 3 to 9."""
    return max(LEAST_ROUNDS, min(ROUNDS, int(budget / max(seconds, 1e-9))))


def time_interleaved(
    calls: Mapping[Any, Callable[[], Any]],
    device: torch.device,
    rounds: int | None = None,
    *,
    show: bool = False,
    what: str = "measuring",
) -> dict[Any, Timing]:
    """Times of every call over `rounds` rounds; they take turns in shuffled order, after a round to warm up.

    Without a number of rounds there are 3 to 9: as many as take 45 seconds. With `show`, what it will take is said.
    """
    order, shuffler = list(calls), random.Random(0)
    times: dict[Any, list[float]] = {key: [] for key in calls}
    with Progress(f"{what}, warming up", len(calls), show=show) as progress:
        warm = 0.0
        for call in calls.values():
            warm += seconds_of(call, device)
            progress.update()
    rounds = rounds or fitting(warm)
    if show:
        announce(what, f"{rounds} rounds of {len(calls)} calls", rounds * warm)
    with Progress(what, rounds * len(calls), show=show) as progress:
        for _ in range(rounds):
            shuffler.shuffle(order)
            for key in order:
                times[key].append(seconds_of(calls[key], device))
                progress.update()
    return {key: _timing(values) for key, values in times.items()}


def _timing(values: list[float]) -> Timing:
    values, last = sorted(values), len(values) - 1
    return Timing(values[len(values) // 2], values[round(last / 4)], values[round(3 * last / 4)])


def above_flops(speedup: float, flop_ratio: float) -> bool:
    """Whether a speed-up is more than less arithmetic explains, by more than 3 %."""
    return speedup > 1.03 * flop_ratio
