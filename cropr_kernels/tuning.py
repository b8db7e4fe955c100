"""A schedule for a latency, from the latency curve of a model on this device: time against the
number of tokens.

Matrix kernels work in tiles, so time falls with the number of tokens in steps, and one token fewer
can be slower. A count is efficient if no larger one is as fast. The schedule prunes at a constant
rate, the lowest that meets the goal, with every count raised to the next efficient one: more
tokens, and never slower. The curve is measured at as many counts as there is time for, made
monotone (isotonic regression), which pools noise and keeps steps, and linear in between.
"""

import itertools
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .pruning.deployment import deployed_copy, hold_graphs
from .pruning.model import modules_of, require_pruned, run
from .pruning.state import PruningOptions
from .schedule import Schedule
from .utils.flops import flop_counter
from .utils.io import write_text
from .utils.progress import announce
from .utils.timing import LEAST_ROUNDS, ROUNDS, SECONDS, fitting, seconds_of, time_interleaved

_TRIALS = 4  # schedules that are tried
_AVERAGE = 0.6  # time of a forward at an average token count, over that at all tokens
_PAIR = 1.7  # time of a pruned and an unpruned forward, over that of the latter
_TOLERANCE = 0.02  # of the goal


class Tuned(NamedTuple):
    """A schedule and its speed."""

    keep: list[int]  # kept tokens after each module: cropr.apply(model, keep=...)
    predicted: float  # speed-up over the unpruned model, from the latency curve
    measured: float  # the same, measured afterwards
    unpruned_ms: float  # a forward, measured in turns with the pruned one
    pruned_ms: float
    # Tokens -> milliseconds of a block with pruning, minus that of one with all tokens
    latency_curve: dict[int, float]
    # Times fewer FLOPs than the unpruned model; more speed than that has other reasons
    flop_ratio: float
    spread: float  # the larger of the two interquartile ranges of the measurements, over its median


def efficient(latencies: Mapping[int, float]) -> list[int]:
    """Return the token counts that are faster than all larger ones, ascending."""
    counts: list[int] = []
    for count in sorted(latencies, reverse=True):
        if not counts or latencies[count] < latencies[counts[-1]]:
            counts.append(count)
    return counts[::-1]


def monotone(latencies: Mapping[int, float]) -> dict[int, float]:
    """Fit latencies that never fall as tokens rise, by least squares (pool adjacent violators)."""
    pools: list[tuple[float, list[int]]] = []  # mean, counts
    for count in sorted(latencies):
        mean = latencies[count]
        members = [count]
        while pools and pools[-1][0] > mean:
            lower_mean, lower = pools.pop()
            mean = (mean * len(members) + lower_mean * len(lower)) / (len(members) + len(lower))
            members = [*lower, *members]
        pools.append((mean, members))
    return {count: mean for mean, members in pools for count in members}


def constant_rate_counts(
    latencies: Mapping[int, float], rate: float, num_tokens: int, num_modules: int, num_prefix: int
) -> list[int]:
    """Kept tokens after each module at a constant rate, raised to the next efficient count."""
    targets = [
        max(num_tokens - rate * (module + 1), num_prefix + 1) for module in range(num_modules)
    ]
    counts = efficient(latencies)
    return [next(count for count in counts if count >= target) for target in targets]


def solve(
    latencies: Mapping[int, float],
    saving: float,
    num_tokens: int,
    num_modules: int,
    num_prefix: int,
) -> list[int] | None:
    """Find the lowest rate that saves `saving` seconds: kept tokens after each module, or None if
    none does.

    `latencies` are the seconds of a block, and of the pruning before it, by its tokens; num_tokens
    is among them.
    """
    for quarter in range(int(4 * highest_rate(num_tokens, num_modules, num_prefix)) + 1):
        keep = constant_rate_counts(latencies, quarter / 4, num_tokens, num_modules, num_prefix)
        if seconds_saved(latencies, keep, num_tokens) >= saving:
            return keep
    return None


def highest_rate(num_tokens: int, num_modules: int, num_prefix: int) -> float:
    """The rate that keeps one patch in the end."""
    return (num_tokens - num_prefix - 1) / num_modules


def default_rates(model: nn.Module) -> list[int]:
    """A quarter, a half, three quarters and nine tenths of the highest rate of a pruned model."""
    modules = modules_of(model)
    patches = modules.spec.num_scheduled(modules.config.grid) - modules.spec.num_prefix
    highest = (patches - 4) // modules.num_used
    return sorted({max(round(highest * share), 1) for share in (0.25, 0.5, 0.75, 0.9)})


def interpolate(latencies: Mapping[int, float], step: int) -> dict[int, float]:
    """Add the values at every multiple of `step`, linearly."""
    dense = dict(latencies)
    for low, high in itertools.pairwise(sorted(latencies)):
        for count in range(low - low % step + step, high, step):
            share = (count - low) / (high - low)
            dense[count] = (1 - share) * latencies[low] + share * latencies[high]
    return dense


def seconds_saved(latencies: Mapping[int, float], keep: Sequence[int], num_tokens: int) -> float:
    """Seconds that a schedule saves."""
    return sum(latencies[num_tokens] - latencies[count] for count in keep)


class MeasurementBudget(NamedTuple):
    """The measurements that there is time for."""

    num_counts: int  # token counts of the curve
    rounds: int
    check_rounds: int  # of a chosen schedule


def measurement_budget(forward: float, rounds: int | None) -> MeasurementBudget:
    """Plan measurements of a model whose forward takes `forward` seconds.

    A curve and all trials take 45 seconds each, or as long as eight counts and three rounds do.
    """
    average = _AVERAGE * forward
    num_counts = min(max(int(SECONDS / (average * ((rounds or ROUNDS) + 1))), 8), 50)
    check_rounds = 2 * (rounds or ROUNDS)
    if rounds is None:
        rounds = fitting(average * num_counts)
        check_rounds = min(
            max(int(SECONDS / (_TRIALS * _PAIR * forward)) - 1, LEAST_ROUNDS), check_rounds
        )
    return MeasurementBudget(num_counts, rounds, check_rounds)


@dataclass(frozen=True)
class _Goal:
    """A speed-up or a latency; exactly one."""

    speedup: float | None
    latency_ms: float | None

    def __post_init__(self) -> None:
        if (self.speedup is None) == (self.latency_ms is None):
            raise ValueError("cropr.tune: give exactly one of speedup and latency_ms")
        if (self.speedup is not None and not self.speedup >= 1) or (
            self.latency_ms is not None and not self.latency_ms > 0
        ):
            raise ValueError(
                f"cropr.tune: speedup must be >= 1 and latency_ms > 0, got {self.speedup}, "
                f"{self.latency_ms}"
            )

    def seconds(self, unpruned: float) -> float:
        """The time of a pruned forward, if an unpruned one takes `unpruned` seconds."""
        return (
            unpruned / self.speedup if self.speedup is not None else (self.latency_ms or 0.0) / 1e3
        )


class _TunedModel:
    """A deployed copy of a pruned model, which runs on one batch with any schedule."""

    def __init__(self, model: nn.Module, images: Tensor):
        modules = modules_of(model)
        self.model = deployed_copy(model, cuda_graphs=None)
        self.images = images
        self.config = modules.config
        self.depth = len(modules.spec.blocks)
        self.num_modules = modules.num_used
        self.num_prefix = modules.spec.num_prefix
        self.num_tokens = run(self.model, lambda: self.model(images), PruningOptions())[
            1
        ].num_scheduled

    @property
    def unpruned(self) -> list[int]:
        """The schedule that keeps all tokens."""
        return [self.num_tokens] * self.num_modules

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The last arguments of `solve`."""
        return self.num_tokens, self.num_modules, self.num_prefix

    def call(self, keep: Sequence[int], images: Tensor | None = None) -> Callable[[], object]:
        """Return a function that runs the model with a schedule."""
        batch = self.images if images is None else images
        config = replace(self.config, schedule=Schedule(keep=keep))
        config.counts(self.num_tokens, self.depth, self.num_prefix)

        def forward() -> object:
            modules_of(self.model).config = config
            return self.model(batch)

        return forward

    def flops(self, keep: Sequence[int]) -> int:
        """FLOPs of one image."""
        with flop_counter() as counter:
            self.call(keep, self.images[:1])()
        return counter.get_total_flops()

    def __str__(self) -> str:
        return f"at batch {len(self.images)} on {self.images.device}"


class _LatencyCurve(NamedTuple):
    unpruned: float  # seconds of a forward without pruning
    # Tokens -> seconds of a block with pruning, minus that of one with all tokens
    latencies: dict[int, float]


class _Trial(NamedTuple):
    """A schedule, timed in turns with no pruning."""

    keep: list[int]
    unpruned: float  # seconds
    pruned: float
    spread: float

    @property
    def speedup(self) -> float:
        return self.unpruned / self.pruned

    def shortfall(self, goal: _Goal) -> float:
        """Seconds that are still to be saved."""
        return self.pruned - goal.seconds(self.unpruned)

    def reaches(self, goal: _Goal) -> bool:
        return self.shortfall(goal) <= _TOLERANCE * self.pruned


@torch.inference_mode()
def tune(
    model: nn.Module,
    images: Tensor,
    *,
    speedup: float | None = None,
    latency_ms: float | None = None,
    rounds: int | None = None,
    show: bool = False,
) -> Tuned:
    """Choose the number of tokens kept after each block, for a speed on this device, and measure
    it.

    The model is timed with several numbers of tokens after its first block, which gives the latency
    curve of all blocks together. `solve` chooses a schedule, which is timed against no pruning; if
    it falls short, it chooses again.

    Args:
        model: pruned by `apply`, on the device and in the precision to tune for; it is not changed.
        images: (B, C, H, W), a batch of the size to tune for.
        speedup, latency_ms: the goal; exactly one. Latency is that of a forward of the batch.
        rounds: timings of every count; the median is used. Default 3 to 9, and fewer counts of a
            slow model: about a minute in all.
        show: print the expected duration, and the progress.

    Raises:
        TypeError: the model is not pruned.
        ValueError: not exactly one goal, one that is out of range, or one that no schedule reaches.
    """
    require_pruned(model, "cropr.tune")
    goal = _Goal(speedup, latency_ms)
    tuned_model = _TunedModel(model, images)
    unpruned = tuned_model.call(tuned_model.unpruned)
    forward = min(seconds_of(unpruned, images.device) for _ in range(2))  # the first warms up
    budget = measurement_budget(forward, rounds)
    curve = _measure_curve(tuned_model, budget, forward, show)
    latencies = interpolate(curve.latencies, 4)
    trials = _try_schedules(tuned_model, goal, curve.unpruned, latencies, budget.check_rounds, show)
    if not trials:
        raise _unreachable(tuned_model, goal, curve.unpruned, latencies)
    reached = trials[-1].reaches(goal)
    best = trials[-1] if reached else max(trials, key=lambda trial: trial.speedup)
    if best.keep[-1] < tuned_model.num_tokens and best.speedup < 1.05:
        warnings.warn(
            f"cropr.tune: pruning will not pay {tuned_model}: {best.speedup:.2f} times as fast",
            stacklevel=2,
        )
    elif not reached:
        warnings.warn(
            f"cropr.tune: the goal was not reached {tuned_model}: {best.speedup:.2f} times as "
            "fast, "
            f"{1e3 * best.pruned:.3g} ms. On a shared device times are noisy: try again, or with "
            "more rounds",
            stacklevel=2,
        )
    return _report(tuned_model, curve, latencies, best)


def _measure_curve(
    tuned_model: _TunedModel, budget: MeasurementBudget, forward: float, show: bool
) -> _LatencyCurve:
    """Time the model at several token counts, and fit a monotone curve."""
    tokens = tuned_model.num_tokens
    num_modules = tuned_model.num_modules
    step = 4 * math.ceil(tokens / (4 * budget.num_counts))
    counts = [count for count in range(step, tokens, step) if count > tuned_model.num_prefix]
    if show:
        curve_forwards = _AVERAGE * (len(counts) + 2) * (budget.rounds + 1)
        trial_forwards = _TRIALS * _PAIR * (budget.check_rounds + 1)
        work = (
            f"{len(counts) + 2} schedules, {budget.rounds} rounds, and the chosen one up to "
            f"{_TRIALS} times"
        )
        announce("tune", work, forward * (curve_forwards + trial_forwards))
    hold_graphs(tuned_model.model, len(counts) + 2 + 2 * _TRIALS)
    # One token after each module: all the work of pruning, and no less of the blocks
    one_less = tuned_model.unpruned
    if tokens > num_modules + tuned_model.num_prefix:
        one_less = [tokens - module - 1 for module in range(num_modules)]
    calls: dict[int | str, Callable[[], object]] = {
        count: tuned_model.call([count] * num_modules) for count in [*counts, tokens]
    }
    calls["one less"] = tuned_model.call(one_less)
    timings = time_interleaved(
        calls, tuned_model.images.device, budget.rounds, show=show, label="latency curve"
    )
    seconds = {count: timing.seconds for count, timing in timings.items()}
    unpruned = seconds[tokens]
    # Of pruning, a module; every count has one
    overhead = max((seconds["one less"] - unpruned) / num_modules, 0.0)
    saved = {
        count: (seconds[count] - unpruned + (num_modules - 1) * overhead) / num_modules
        for count in counts
    }
    return _LatencyCurve(unpruned, monotone(saved | {tokens: 0.0}))


def _try_schedules(
    tuned_model: _TunedModel,
    goal: _Goal,
    unpruned: float,
    latencies: Mapping[int, float],
    rounds: int,
    show: bool,
) -> list[_Trial]:
    """Choose schedules and time them until one reaches the goal: each measurement corrects the
    curve."""
    saving = unpruned - goal.seconds(unpruned)
    trials: list[_Trial] = []
    for _ in range(_TRIALS):
        keep = solve(latencies, saving, *tuned_model.sizes)
        if keep is None:
            break
        calls = {
            "unpruned": tuned_model.call(tuned_model.unpruned),
            "pruned": tuned_model.call(keep),
        }
        timings = time_interleaved(
            calls, tuned_model.images.device, rounds, show=show, label="chosen schedule"
        )
        spread = max(timing.spread for timing in timings.values())
        trials.append(_Trial(keep, timings["unpruned"].seconds, timings["pruned"].seconds, spread))
        if trials[-1].reaches(goal):
            break
        saving += trials[-1].shortfall(goal)
    return trials


def _unreachable(
    tuned_model: _TunedModel, goal: _Goal, unpruned: float, latencies: Mapping[int, float]
) -> ValueError:
    keep = constant_rate_counts(latencies, highest_rate(*tuned_model.sizes), *tuned_model.sizes)
    speedup = unpruned / (unpruned - seconds_saved(latencies, keep, tuned_model.num_tokens))
    return ValueError(
        f"cropr.tune: no schedule takes {1e3 * goal.seconds(unpruned):.3g} ms {tuned_model}: "
        "unpruned takes "
        f"{1e3 * unpruned:.3g} ms, and the highest rate is about {speedup:.2f} times as fast"
    )


def _report(
    tuned_model: _TunedModel, curve: _LatencyCurve, latencies: Mapping[int, float], trial: _Trial
) -> Tuned:
    predicted = curve.unpruned / (
        curve.unpruned - seconds_saved(latencies, trial.keep, tuned_model.num_tokens)
    )
    offset = curve.latencies[tuned_model.num_tokens]
    return Tuned(
        keep=trial.keep,
        predicted=predicted,
        measured=trial.speedup,
        unpruned_ms=1e3 * trial.unpruned,
        pruned_ms=1e3 * trial.pruned,
        latency_curve={
            count: 1e3 * (curve.latencies[count] - offset) for count in sorted(curve.latencies)
        },
        flop_ratio=tuned_model.flops(tuned_model.unpruned) / tuned_model.flops(trial.keep),
        spread=trial.spread,
    )


def save_tuned(
    path: str | Path, tuned: Tuned, metadata: Mapping[str, object] | None = None
) -> None:
    """Write a schedule as JSON: `apply` takes the path as its `keep`."""
    write_text(path, json.dumps({**(metadata or {}), **tuned._asdict()}, indent=1) + "\n")
