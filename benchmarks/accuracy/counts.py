"""Token counts after each block: at equal FLOPs, as published, and as chosen by a latency curve."""

import itertools
from collections.abc import Callable, Mapping, Sequence

Profile = Callable[[int], float]  # block l, from 1 -> tokens lost after it, in any unit

# DiffRate (Chen et al. 2023, arXiv 2305.17997), compression_rate.json of its code: by network and
# published GFLOPs the number of tokens, of 197, after each of 12 blocks. Between attention and MLP
# it prunes tokens, then merges others; these are the numbers after both.
DIFFRATE = {
    ("DeiT-Ti", "0.7"): (197, 196, 192, 158, 133, 103, 88, 72, 64, 58, 49, 3),
    ("DeiT-Ti", "0.8"): (197, 196, 190, 172, 154, 125, 107, 96, 84, 78, 70, 3),
    ("DeiT-Ti", "1.0"): (197, 197, 196, 190, 186, 154, 148, 156, 145, 135, 125, 21),
    ("DeiT-S", "2.7"): (197, 188, 170, 147, 131, 119, 109, 96, 76, 54, 45, 3),
    ("DeiT-B", "10.4"): (197, 190, 184, 164, 145, 131, 107, 94, 74, 31, 21, 3),
}


def block_flops(counts: Sequence[int], dim: int) -> int:
    """Multiply-adds of projections, MLP and attention, of one block for each token count."""
    return sum(12 * n * dim**2 + 2 * n**2 * dim for n in counts)


def diffrate(published: Sequence[int]) -> list[int]:
    """Counts for modules after every block but the last; pruned tokens do not return."""
    return list(itertools.accumulate(published[:-1], min))


def constant_rate(layer: int) -> float:
    """Each block loses the same number of tokens."""
    return float(layer)


def rising_total(layer: int) -> float:
    """The tokens lost after block l, in total, grow as l^1.3."""
    return float(layer**1.3)


def rising_rate(layer: int) -> float:
    """R_l, the tokens lost in block l, grows as l^1.3."""
    return sum(float(block**1.3) for block in range(1, layer + 1))


def fitted(
    profile: Profile, goal: float, tokens: int, dim: int, modules: int, prefix: int = 1
) -> list[int]:
    """Counts that fall by a multiple of `profile`, fitted to `goal` multiply-adds of all blocks.

    The first block sees all tokens. At least one patch stays.

    Raises:
        ValueError: with one patch left after the last module the blocks still take more.
    """

    def counts(scale: float) -> list[int]:
        return [
            max(round(tokens - scale * profile(layer + 1)), prefix + 1) for layer in range(modules)
        ]

    low = 0.0
    high = float(tokens) / profile(1)
    if block_flops([tokens, *counts(high)], dim) > goal:
        raise ValueError(
            f"fitted: {modules} modules cannot lower {tokens} tokens to {goal:.3g} multiply-adds"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if block_flops([tokens, *counts(middle)], dim) > goal else (low, middle)
        )
    return min(
        counts(low), counts(high), key=lambda fit: abs(block_flops([tokens, *fit], dim) - goal)
    )


def reduce_once(block: int, kept: int, tokens: int, modules: int) -> list[int]:
    """Counts that fall once: all tokens before `block`, `kept` tokens after it."""
    return [tokens] * (block - 1) + [kept] * (modules - block + 1)


def fitted_once(
    block: int, goal: float, tokens: int, dim: int, modules: int, prefix: int = 1
) -> list[int]:
    """Counts of `reduce_once` whose multiply-adds are nearest to the goal."""
    candidates = (
        reduce_once(block, kept, tokens, modules) for kept in range(prefix + 1, tokens + 1)
    )
    return min(candidates, key=lambda counts: abs(block_flops([tokens, *counts], dim) - goal))


def utilities(
    latency: Mapping[int, float], accuracy: Mapping[int, float], alpha: float = 0.5
) -> dict[int, float]:
    """Utility by number of tokens: alpha * latency saved + (1 - alpha) * accuracy.

    Both are relative to their maximum over all numbers. This is the utility of Pruning One More
    Token (Eliopoulos et al. 2025, arXiv 2407.05941), with the alpha of its code.
    """
    slowest = max(latency.values())
    best = max(accuracy.values())
    return {
        n: alpha * (1 - latency[n] / slowest) + (1 - alpha) * accuracy[n] / best for n in latency
    }


def one_more_token(
    latency: Mapping[int, float], accuracy: Mapping[int, float], alpha: float = 0.5
) -> int:
    """Number of tokens with the highest utility; the largest of several."""
    utility = utilities(latency, accuracy, alpha)
    return max(sorted(utility, reverse=True), key=utility.__getitem__)
