"""Counts of tokens after each block: at equal FLOPs, as published, and as a latency curve chooses."""

import itertools
from collections.abc import Callable, Mapping, Sequence

Lost = Callable[[int], float]  # how much is lost by block l, from 1, in any unit

# DiffRate (Chen et al. 2023, arXiv 2305.17997), compression_rate.json of its code: by network and published GFLOPs what
# is left after each of 12 blocks of 197 tokens. It prunes, then merges what is left of a block between attention and
# MLP; these are the numbers after both.
DIFFRATE = {
    ("DeiT-Ti", "0.7"): (197, 196, 192, 158, 133, 103, 88, 72, 64, 58, 49, 3),
    ("DeiT-Ti", "0.8"): (197, 196, 190, 172, 154, 125, 107, 96, 84, 78, 70, 3),
    ("DeiT-Ti", "1.0"): (197, 197, 196, 190, 186, 154, 148, 156, 145, 135, 125, 21),
    ("DeiT-S", "2.7"): (197, 188, 170, 147, 131, 119, 109, 96, 76, 54, 45, 3),
    ("DeiT-B", "10.4"): (197, 190, 184, 164, 145, 131, 107, 94, 74, 31, 21, 3),
}


def block_flops(seen: Sequence[int], dim: int) -> int:
    """Multiply-adds of blocks of this width, each with its number of tokens: projections, MLP and attention."""
    return sum(12 * n * dim**2 + 2 * n**2 * dim for n in seen)


def diffrate(published: Sequence[int]) -> list[int]:
    """Counts for modules behind the blocks: the last block has none, and tokens that have left do not come back."""
    return list(itertools.accumulate(published[:-1], min))


def even(layer: int) -> float:
    """As much is lost in each block."""
    return float(layer)


def late(layer: int) -> float:
    """What is lost by block l grows as l^1.3."""
    return float(layer**1.3)


def later(layer: int) -> float:
    """What is lost in block l, R_l, grows as l^1.3."""
    return sum(float(block**1.3) for block in range(1, layer + 1))


def fitted(
    lost: Callable[[int], float], goal: float, tokens: int, dim: int, modules: int, prefix: int = 1
) -> list[int]:
    """Counts that fall by a multiple of `lost`, the one at which all blocks take `goal` multiply-adds.

    The first block sees all tokens. One patch stays at least.

    Raises:
        ValueError: even with one patch left after the last module the blocks take more.
    """

    def counts(scale: float) -> list[int]:
        return [max(round(tokens - scale * lost(layer + 1)), prefix + 1) for layer in range(modules)]

    low, high = 0.0, float(tokens) / lost(1)
    if block_flops([tokens, *counts(high)], dim) > goal:
        raise ValueError(f"fitted: {modules} modules cannot lower {tokens} tokens to {goal:.3g} multiply-adds")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if block_flops([tokens, *counts(middle)], dim) > goal else (low, middle)
    return min(counts(low), counts(high), key=lambda found: abs(block_flops([tokens, *found], dim) - goal))


def once(after: int, kept: int, tokens: int, modules: int) -> list[int]:
    """All tokens up to a block, and from then on so many."""
    return [tokens] * (after - 1) + [kept] * (modules - after + 1)


def fitted_once(after: int, goal: float, tokens: int, dim: int, modules: int, prefix: int = 1) -> list[int]:
    """The counts of `once` whose multiply-adds are nearest to the goal."""
    every = (once(after, kept, tokens, modules) for kept in range(prefix + 1, tokens + 1))
    return min(every, key=lambda found: abs(block_flops([tokens, *found], dim) - goal))


def utilities(latency: Mapping[int, float], accuracy: Mapping[int, float], alpha: float = 0.5) -> dict[int, float]:
    """Of each number of tokens: alpha times the share of the latency that it saves, the rest times its accuracy.

    Both are relative to their maximum over all numbers. It is the utility of Pruning One More Token (Eliopoulos et al.
    2025, arXiv 2407.05941), with the alpha of its code.
    """
    slowest, best = max(latency.values()), max(accuracy.values())
    return {n: alpha * (1 - latency[n] / slowest) + (1 - alpha) * accuracy[n] / best for n in latency}


def one_more_token(latency: Mapping[int, float], accuracy: Mapping[int, float], alpha: float = 0.5) -> int:
    """The number of tokens of the highest utility, the largest of several."""
    found = utilities(latency, accuracy, alpha)
    return max(sorted(found, reverse=True), key=found.__getitem__)
