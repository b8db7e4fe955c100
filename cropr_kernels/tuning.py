"""A schedule for a latency, from the latency curve of a model on this device: time against the number of tokens.

Matrix kernels work in tiles, so time falls with the number of tokens in steps, and one token fewer can be slower. A
count is efficient if no larger one is as fast. The schedule prunes at a constant rate, the lowest that meets the goal,
with every count raised to the next efficient one: more tokens, and never slower. The curve is measured at as many
counts as there is time for, made monotone (isotonic regression), which pools noise and keeps steps, and straight in
between.
"""

import itertools
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .pruning.api import deployed_copy, hold_graphs
from .pruning.model import require_pruned
from .pruning.model import run as pruned_run
from .pruning.state import PruningOptions
from .schedule import Schedule
from .utils.flops import flop_counter
from .utils.io import write_text
from .utils.progress import announce
from .utils.timing import LEAST_ROUNDS, ROUNDS, SECONDS, fitting, seconds_of, time_interleaved

_TRIALS = 4  # schedules that are tried
_AVERAGE = 0.6  # time of a forward at an average token count, over that at all tokens


class Tuned(NamedTuple):
    """A schedule, and how fast it is."""

    keep: list[int]  # kept tokens after each module: cropr.apply(model, keep=...)
    predicted: float  # speed-up over the unpruned model, from the latency curve
    measured: float  # the same, measured afterwards
    unpruned_ms: float  # a forward, measured in turns with the pruned one
    pruned_ms: float
    latency_curve: dict[int, float]  # tokens -> milliseconds of a block with pruning, minus that of one with all tokens
    flop_ratio: float  # times fewer FLOPs than the unpruned model: what is faster than that is faster for other reasons
    spread: float  # the larger of the two interquartile ranges of what was measured, over its median


def efficient(costs: Mapping[int, float]) -> list[int]:
    """The token counts that are faster than all larger ones, ascending."""
    found: list[int] = []
    for count in sorted(costs, reverse=True):
        if not found or costs[count] < costs[found[-1]]:
            found.append(count)
    return found[::-1]


def monotone(costs: Mapping[int, float]) -> dict[int, float]:
    """The costs nearest to these in squares that never fall as tokens rise (pool adjacent violators)."""
    pools: list[tuple[float, list[int]]] = []  # mean, counts
    for count in sorted(costs):
        mean, members = costs[count], [count]
        while pools and pools[-1][0] > mean:
            other, earlier = pools.pop()
            mean = (mean * len(members) + other * len(earlier)) / (len(members) + len(earlier))
            members = [*earlier, *members]
        pools.append((mean, members))
    return {count: mean for mean, members in pools for count in members}


def steady(costs: Mapping[int, float], rate: float, num_tokens: int, modules: int, num_prefix: int) -> list[int]:
    """Kept tokens after each module at a constant rate, raised to the next efficient count."""
    targets = [max(num_tokens - rate * (module + 1), num_prefix + 1) for module in range(modules)]
    good = efficient(costs)
    return [next(count for count in good if count >= target) for target in targets]


def solve(
    costs: Mapping[int, float], saving: float, num_tokens: int, modules: int, num_prefix: int
) -> list[int] | None:
    """Kept tokens after each module that save so many seconds, at the lowest rate, or None if nothing does.

    `costs` are the seconds of a block, and of the pruning before it, by its tokens; num_tokens is among them.
    """
    for quarter in range(int(4 * highest_rate(num_tokens, modules, num_prefix)) + 1):
        keep = steady(costs, quarter / 4, num_tokens, modules, num_prefix)
        if saved(costs, keep, num_tokens) >= saving:
            return keep
    return None


def highest_rate(num_tokens: int, modules: int, num_prefix: int) -> float:
    """The rate that keeps one patch in the end."""
    return (num_tokens - num_prefix - 1) / modules


def default_rates(model: Any) -> list[int]:
    """A quarter, a half, three quarters and nine tenths of the highest rate there is."""
    patches = model.cropr.config.grid[0] * model.cropr.config.grid[1]
    most = (patches - 4) // model.cropr.num_used
    return sorted({max(round(most * share), 1) for share in (0.25, 0.5, 0.75, 0.9)})


def filled(costs: Mapping[int, float], step: int) -> dict[int, float]:
    """The costs, and on the lines between them those of every multiple of `step`."""
    known = sorted(costs)
    found = dict(costs)
    for low, high in itertools.pairwise(known):
        for count in range(low - low % step + step, high, step):
            share = (count - low) / (high - low)
            found[count] = (1 - share) * costs[low] + share * costs[high]
    return found


def saved(costs: Mapping[int, float], keep: Sequence[int], num_tokens: int) -> float:
    """Seconds that a schedule saves."""
    return sum(costs[num_tokens] - costs[count] for count in keep)


def plan(forward: float, rounds: int | None) -> tuple[int, int, int]:
    """For a model that takes so many seconds: token counts to measure, rounds, and rounds of the chosen schedule.

    A curve and all trials take 45 seconds each, or as long as eight counts and three rounds do.
    """
    average = _AVERAGE * forward
    counts = min(max(int(SECONDS / (average * ((rounds or ROUNDS) + 1))), 8), 50)
    checks = 2 * (rounds or ROUNDS)
    if rounds is None:
        rounds = fitting(average * counts)
        checks = min(max(int(SECONDS / (_TRIALS * 1.7 * forward)) - 1, LEAST_ROUNDS), checks)
    return counts, rounds, checks


@torch.inference_mode()
def tune(
    model: Any,
    images: Tensor,
    *,
    speedup: float | None = None,
    latency_ms: float | None = None,
    rounds: int | None = None,
    show: bool = False,
) -> Tuned:
    """Choose how many tokens are kept after each block, for a speed on this device, and measure it.

    The model is timed with several numbers of tokens after its first block, which gives the latency curve of all blocks
    together. `solve` chooses a schedule, which is timed against no pruning; where it falls short, it chooses again.

    Args:
        model: pruned by `apply`, on the device and in the precision to tune for; it is not changed.
        images: (B, C, H, W), a batch of the size to tune for.
        speedup, latency_ms: what to reach; exactly one. Latency is that of a forward of the batch.
        rounds: timings of every count; the median is used. Default 3 to 9, and fewer counts of a slow model: about a
            minute in all.
        show: whether to say how long it takes, and how far it is.

    Raises:
        TypeError: the model is not pruned.
        ValueError: not exactly one goal, one that is out of range, or one that no schedule reaches.
    """
    stack = require_pruned(model, "cropr.tune")
    if (speedup is None) == (latency_ms is None):
        raise ValueError("cropr.tune: give exactly one of speedup and latency_ms")
    if (speedup is not None and not speedup >= 1) or (latency_ms is not None and not latency_ms > 0):
        raise ValueError(f"cropr.tune: speedup must be >= 1 and latency_ms > 0, got {speedup}, {latency_ms}")
    fast, modules = deployed_copy(model, cuda_graphs=None), stack.num_used
    prefix, depth = stack.spec.num_prefix, len(stack.spec.blocks)
    tokens = pruned_run(fast, lambda: fast(images), PruningOptions())[1].num_tokens

    def run(keep: Sequence[int], batch: Tensor = images) -> Callable[[], Any]:
        config = replace(stack.config, schedule=Schedule(keep=keep))
        config.counts(tokens, depth, prefix)

        def call() -> Any:
            fast.cropr.config = config
            return fast(batch)

        return call

    device, unpruned = images.device, [tokens] * modules
    forward = min(seconds_of(run(unpruned), device) for _ in range(2))  # the first warms up
    several, rounds, checks = plan(forward, rounds)
    step = 4 * math.ceil(tokens / (4 * several))
    counts = [count for count in range(step, tokens, step) if count > prefix]
    if show:
        work = f"{len(counts) + 2} schedules, {rounds} rounds, and the chosen one up to {_TRIALS} times"
        announce("tune", work, forward * (_AVERAGE * (len(counts) + 2) * (rounds + 1) + _TRIALS * 1.7 * (checks + 1)))
    hold_graphs(fast, len(counts) + 2 + 2 * _TRIALS)
    gentle = [tokens - module - 1 for module in range(modules)] if tokens > modules + prefix else [tokens] * modules
    calls = {count: run([count] * modules) for count in [*counts, tokens]} | {"gentle": run(gentle)}
    timings = time_interleaved(calls, device, rounds, show=show, label="latency curve")
    times = {count: timing.seconds for count, timing in timings.items()}
    whole = times[tokens]
    overhead = max((times["gentle"] - whole) / modules, 0.0)  # of pruning, a module; one is in every count's time
    costs = {count: (times[count] - whole + (modules - 1) * overhead) / modules for count in counts}
    curve = monotone(costs | {tokens: 0.0})
    costs = filled(curve, 4)
    goal = whole / speedup if speedup is not None else (latency_ms or 0.0) / 1e3
    saving, tried, here = whole - goal, [], f"at batch {len(images)} on {images.device}"
    for _ in range(_TRIALS):  # the measurement says how far the curve was off
        keep = solve(costs, saving, tokens, modules, prefix)
        if keep is None:
            break
        ends = {"unpruned": run(unpruned), "pruned": run(keep)}
        both = time_interleaved(ends, device, checks, show=show, label="chosen schedule")
        again = {name: timing.seconds for name, timing in both.items()}
        spread = max(timing.spread for timing in both.values())
        tried.append((again["unpruned"] / again["pruned"], keep, again, spread))
        short = again["pruned"] - (again["unpruned"] / speedup if speedup is not None else goal)
        if short <= 0.02 * again["pruned"]:
            break
        saving += short
    if not tried:
        steepest = steady(costs, highest_rate(tokens, modules, prefix), tokens, modules, prefix)
        most = whole / (whole - saved(costs, steepest, tokens))
        raise ValueError(
            f"cropr.tune: no schedule takes {1e3 * goal:.3g} ms {here}: unpruned takes {1e3 * whole:.3g} ms, and the "
            f"highest rate is about {most:.2f} times as fast"
        )
    reached = short <= 0.02 * again["pruned"]
    measured, keep, again, spread = tried[-1] if reached else max(tried, key=lambda trial: trial[0])
    predicted = whole / (whole - saved(costs, keep, tokens))
    if keep[-1] < tokens and measured < 1.05:
        warnings.warn(f"cropr.tune: pruning will not pay {here}: {measured:.2f} times as fast", stacklevel=2)
    elif not reached:
        warnings.warn(
            f"cropr.tune: the goal was not reached {here}: {measured:.2f} times as fast, {1e3 * again['pruned']:.3g} "
            "ms. On a shared device times are noisy: try again, or with more rounds",
            stacklevel=2,
        )
    flops = []
    for one in (unpruned, keep):
        with flop_counter() as counter:
            run(one, images[:1])()
        flops.append(counter.get_total_flops())
    milliseconds = {count: 1e3 * (curve[count] - curve[tokens]) for count in sorted(curve)}
    ends_ms = 1e3 * again["unpruned"], 1e3 * again["pruned"]
    return Tuned(keep, predicted, measured, *ends_ms, milliseconds, flops[0] / flops[1], spread)


def save_tuned(path: str | Path, tuned: Tuned, about: Mapping[str, Any] | None = None) -> None:
    """Write a schedule as JSON: `apply` takes the path as its `keep`."""
    write_text(path, json.dumps({**(about or {}), **tuned._asdict()}, indent=1) + "\n")
