"""A schedule for a latency, from the latency curve of a model on this device: time against the number of tokens.

Matrix kernels work in tiles, so time falls with the number of tokens in steps, and one token fewer can be slower. A
count is efficient if no larger one is as fast. The schedule prunes at a constant rate, the lowest that meets the goal,
with every count raised to the next efficient one: more tokens, and never slower. The curve is made monotone first
(isotonic regression), which pools noise and keeps steps.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .pruning.api import deployed_copy
from .pruning.model import require_pruned
from .pruning.model import run as pruned_run
from .pruning.state import PruningOptions
from .schedule import Schedule
from .utils.io import write_text
from .utils.timing import medians


class Tuned(NamedTuple):
    """A schedule, and how fast it is."""

    keep: list[int]  # kept tokens after each module: cropr.apply(model, keep=...)
    predicted: float  # speed-up over the unpruned model, from the latency curve
    measured: float  # the same, measured afterwards
    unpruned_ms: float  # a forward, measured in turns with the pruned one
    pruned_ms: float
    latency_curve: dict[int, float]  # tokens -> milliseconds of a block with pruning, minus that of one with all tokens


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
    most = (patches - 4) // len(model.cropr)
    return sorted({max(round(most * share), 1) for share in (0.25, 0.5, 0.75, 0.9)})


def saved(costs: Mapping[int, float], keep: Sequence[int], num_tokens: int) -> float:
    """Seconds that a schedule saves."""
    return sum(costs[num_tokens] - costs[count] for count in keep)


@torch.inference_mode()
def tune(
    model: Any,
    images: Tensor,
    *,
    speedup: float | None = None,
    latency_ms: float | None = None,
    rounds: int = 9,
    show: bool = False,
) -> Tuned:
    """Choose how many tokens are kept after each block, for a speed on this device, and measure it.

    The model is timed with several numbers of tokens after its first block, which gives the latency curve of all blocks
    together. `solve` chooses a schedule, which is timed against no pruning; where it falls short, it chooses again.

    Args:
        model: pruned by `apply`, on the device and in the precision to tune for; it is not changed.
        images: (B, C, H, W), a batch of the size to tune for.
        speedup, latency_ms: what to reach; exactly one. Latency is that of a forward of the batch.
        rounds: timings of every count; the median is used.
        show: whether to show a progress bar (tqdm).

    Raises:
        TypeError: the model is not pruned.
        ValueError: not exactly one goal, one that is out of range, or one that no schedule reaches.
    """
    stack = require_pruned(model, "cropr.tune")
    if (speedup is None) == (latency_ms is None):
        raise ValueError("cropr.tune: give exactly one of speedup and latency_ms")
    if (speedup is not None and not speedup >= 1) or (latency_ms is not None and not latency_ms > 0):
        raise ValueError(f"cropr.tune: speedup must be >= 1 and latency_ms > 0, got {speedup}, {latency_ms}")
    fast, modules, prefix, depth = deployed_copy(model), len(stack), stack.spec.num_prefix, len(stack.spec.blocks)
    tokens = pruned_run(fast, lambda: fast(images), PruningOptions())[1].num_tokens

    def run(keep: Sequence[int]) -> Callable[[], Any]:
        config = replace(stack.config, schedule=Schedule(keep=keep))
        config.counts(tokens, depth, prefix)

        def call() -> Any:
            fast.cropr.config = config
            return fast(images)

        return call

    step = 4
    while tokens / step > 50:
        step *= 2
    counts = [count for count in range(step, tokens, step) if count > prefix]
    gentle = [tokens - module - 1 for module in range(modules)] if tokens > modules + prefix else [tokens] * modules
    calls = {count: run([count] * modules) for count in [*counts, tokens]} | {"gentle": run(gentle)}
    times = medians(calls, images.device, rounds, show)
    whole = times[tokens]
    overhead = max((times["gentle"] - whole) / modules, 0.0)  # of pruning, a module; one is in every count's time
    costs = {count: (times[count] - whole + (modules - 1) * overhead) / modules for count in counts}
    costs = monotone(costs | {tokens: 0.0})
    goal = whole / speedup if speedup is not None else (latency_ms or 0.0) / 1e3
    saving, tried, here = whole - goal, [], f"at batch {len(images)} on {images.device}"
    for _ in range(5):  # the measurement says how far the curve was off
        keep = solve(costs, saving, tokens, modules, prefix)
        if keep is None:
            break
        ends = {"unpruned": run([tokens] * modules), "pruned": run(keep)}
        again = medians(ends, images.device, 2 * rounds, False)
        tried.append((again["unpruned"] / again["pruned"], keep, again))
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
    measured, keep, again = tried[-1] if reached else max(tried, key=lambda trial: trial[0])
    predicted = whole / (whole - saved(costs, keep, tokens))
    if keep[-1] < tokens and measured < 1.05:
        warnings.warn(f"cropr.tune: pruning will not pay {here}: {measured:.2f} times as fast", stacklevel=2)
    elif not reached:
        warnings.warn(
            f"cropr.tune: the goal was not reached {here}: {measured:.2f} times as fast, {1e3 * again['pruned']:.3g} "
            "ms. On a shared device times are noisy: try again, or with more rounds",
            stacklevel=2,
        )
    milliseconds = {count: 1e3 * (costs[count] - costs[tokens]) for count in sorted(costs)}
    return Tuned(keep, predicted, measured, 1e3 * again["unpruned"], 1e3 * again["pruned"], milliseconds)


def save_tuned(path: str | Path, tuned: Tuned, about: Mapping[str, Any] | None = None) -> None:
    """Write a schedule as JSON: `apply` takes the path as its `keep`."""
    write_text(path, json.dumps({**(about or {}), **tuned._asdict()}, indent=1) + "\n")
