"""Pruning schedules: how many tokens are kept after each block.

A schedule gives the list of kept counts, one per Cropr module, for a number of tokens and a depth. Modules sit
after every block but the last; with Last Layer Fusion after every block but the last two, since what the module
before the last block drops would come straight back (paper section 3.2).
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


def num_modules(depth: int, llf: bool) -> int:
    """Return how many Cropr modules a network of `depth` blocks holds; ValueError if it is too shallow for one."""
    last, how = (2, "with") if llf else (1, "without")
    if depth <= last:
        raise ValueError(f"schedule: depth must be at least {last + 1} {how} LLF, got {depth}")
    return depth - last


def _check(counts: list[int], num_tokens: int, num_prefix: int, what: str) -> list[int]:
    for module, (before, count) in enumerate(zip([num_tokens, *counts], counts)):
        if not num_prefix + 1 <= count <= before:
            raise ValueError(
                f"schedule: {what} keeps {count} of {before} tokens in module {module}; it must keep at least one "
                f"patch beside the {num_prefix} prefix tokens and at most the {before} there are"
            )
    return counts


def rate(num_tokens: int, depth: int, rate: int, num_prefix: int = 1, llf: bool = False) -> list[int]:
    """Drop `rate` tokens in every module, and P mod 4 more in the first, so that counts stay multiples of 4.

    ViT-L/16 at 224 px with rate 8: 197 -> 188, 180, ..., 20. Rate 0 drops nothing.

    Args:
        num_tokens: tokens that enter the network, prefix included.
        depth: blocks of the network.
        rate: R, tokens dropped per module, >= 0.
        num_prefix: P, tokens that are never dropped (class token, registers).
        llf: whether Last Layer Fusion follows.

    Returns:
        Kept tokens after each module, prefix included.

    Raises:
        ValueError: the network is too shallow, the option is out of range, or a module would keep less than one patch
            or more tokens than there are.
    """
    if rate < 0:
        raise ValueError(f"schedule: rate must be >= 0, got {rate}")
    first = num_tokens - rate - (num_prefix % 4 if rate else 0)
    counts = [first - rate * module for module in range(num_modules(depth, llf))]
    return _check(counts, num_tokens, num_prefix, f"rate {rate}")


def keep(num_tokens: int, depth: int, keep: Sequence[int], num_prefix: int = 1, llf: bool = False) -> list[int]:
    """Keep exactly the counts in `keep`, one per module, never rising; an equal count drops nothing in its module.

    Other arguments, result and errors are those of `rate`.
    """
    modules = num_modules(depth, llf)
    if len(keep) != modules:
        raise ValueError(f"schedule: keep must list {modules} counts for {depth} blocks (llf={llf}), got {len(keep)}")
    return _check(list(keep), num_tokens, num_prefix, f"keep {list(keep)}")


def ratio(num_tokens: int, depth: int, ratio: float, num_prefix: int = 1, llf: bool = False) -> list[int]:
    """Keep the share `ratio`, in (0, 1], of the patches each module receives, rounded up.

    Other arguments, result and errors are those of `rate`.
    """
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"schedule: ratio must be in (0, 1], got {ratio}")
    patches, counts = num_tokens - num_prefix, []
    for _ in range(num_modules(depth, llf)):
        patches = math.ceil(ratio * patches)
        counts.append(num_prefix + patches)
    return _check(counts, num_tokens, num_prefix, f"ratio {ratio}")


def const(num_tokens: int, depth: int, const: Sequence[int], num_prefix: int = 1, llf: bool = False) -> list[int]:
    """Prune once: const = (after, count) keeps `count` tokens after the first `after` blocks, and from then on.

    Other arguments, result and errors are those of `rate`.
    """
    modules = num_modules(depth, llf)
    if len(const) != 2 or not 1 <= const[0] <= modules:
        raise ValueError(
            f"schedule: const must be (after, count), after in [1, {modules}] for {depth} blocks (llf={llf}), "
            f"got {tuple(const)}"
        )
    after, count = const
    counts = [num_tokens] * (after - 1) + [count] * (modules - after + 1)
    return _check(counts, num_tokens, num_prefix, f"const {tuple(const)}")


_KINDS: dict[str, Callable[..., list[int]]] = {"rate": rate, "keep": keep, "ratio": ratio, "const": const}


@dataclass(frozen=True)
class Bound:
    """A schedule with its option filled in, such as rate=8: a value, equal and hashed by what it holds."""

    kind: str
    value: Any
    share: float = 1.0  # of what it would prune

    def __call__(self, num_tokens: int, depth: int, num_prefix: int, llf: bool) -> list[int]:
        if self.kind == "rate":  # a smaller rate keeps counts at multiples of 4 more often
            return rate(num_tokens, depth, round(self.share * self.value), num_prefix, llf)
        counts = _KINDS[self.kind](num_tokens, depth, self.value, num_prefix, llf)
        return [num_tokens - int(self.share * (num_tokens - count)) for count in counts]

    def at(self, share: float) -> "Bound":
        """The same schedule, pruning only this share of it; ValueError where it is outside [0, 1]."""
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"schedule: share must be in [0, 1], got {share}")
        return replace(self, share=share)

    def __str__(self) -> str:
        return f"{self.kind}={self.value}" + ("" if self.share == 1.0 else f", {self.share:.0%} of it")


def resolve(**options: Any) -> Bound:
    """Turn exactly one of rate=, keep=, ratio= and const= into a schedule; the others must be None.

    keep may be the path of a file that `cropr tune` wrote.

    Raises:
        ValueError: none or several are given, or the file holds no schedule.
        FileNotFoundError: there is no such file.
    """
    given = {kind: value for kind, value in options.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"schedule: give exactly one of rate, keep, ratio and const, got {', '.join(given) or 'none'}")
    [(kind, value)] = given.items()
    if kind == "keep" and isinstance(value, str | Path):
        path = Path(value)
        try:
            value = json.loads(path.read_text())["keep"]
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"schedule: {path} holds no schedule: {error}") from error
        if not (isinstance(value, list) and all(isinstance(count, int) for count in value)):
            raise ValueError(f"schedule: keep in {path} must be a list of integers, got {value}")
    return Bound(kind, tuple(value) if isinstance(value, Sequence) else value)
