"""Merging instead of dropping: pruned tokens go into kept ones.

A token then stands for `size` tokens: attention weighs it more, it is less likely to be pruned, and its patches are all
where it is. Patches of one colour of a checkerboard are safe before others, of either colour in turn, so that those
that may be pruned have neighbours to merge into. Choices and their defaults are measured: docs/benchmarks.md.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE_EXPONENT = 0.9  # attention weighs a token by this power of its size; measured: docs/benchmarks.md
COST_WEIGHT = 0.25  # candidates cost exp(COST_WEIGHT * standardised score); measured: docs/benchmarks.md


@dataclass(frozen=True)
class Merge:
    """How pruned tokens are merged into kept ones: each into the one it is most like, by the cosine of the tokens.

    The latter becomes their mean, weighted by sizes and scaled to the norm that it had.

    Args:
        candidates: >= 1. To prune R tokens, the candidates * R with the lowest scores may be pruned, those of one
            colour first, and those of them are that are most like a token that is sure to be kept, the lower their
            scores the sooner: what is redundant goes before what is not. 1: no such choice.
        size_weight: >= 0. Scores rise by size_weight * their standard deviation * log(size): a token that has absorbed
            others had better be kept.

    Raises:
        ValueError: an option is out of range.
    """

    candidates: float = 3.0
    size_weight: float = 2.0

    def __post_init__(self) -> None:
        for name, least in (("candidates", 1), ("size_weight", 0)):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise ValueError(f"Merge: {name} must be finite and >= {least}, got {value}")

    def num_safe(self, count: int, num_keep: int, num_prefix: int) -> int:
        """Of `count` tokens, how many are sure to be kept where num_keep are: at least one patch, and half of them.

        The half only bounds the choice; where more than half must go, the rest is safe.
        """
        wanted = count - int(self.candidates * (count - num_keep))
        return min(num_keep, max(wanted, num_prefix + (count - num_prefix + 1) // 2))


def checkerboard(x: Tensor, grid: tuple[int, int], num_prefix: int) -> tuple[Tensor, Tensor]:
    """Priorities (B, N) int8 of tokens x (B, N, D) on a patch grid: one colour is kept first, and the other one."""
    cells = torch.arange(grid[0] * grid[1], device=x.device)
    dark = (cells // grid[1] + cells % grid[1]) % 2
    dark = torch.nn.functional.pad(dark.to(torch.int8), (num_prefix, 0)).repeat(x.shape[0], 1)
    return dark, 1 - dark


def log_sizes(sizes: Tensor) -> Tensor:
    """What is added to the logits of the attention for tokens of these sizes."""
    return sizes.log() * SIZE_EXPONENT


def resolve_parents(parent: Tensor, merges: int) -> Tensor:
    """Where each token is after so many merges, (B, N): it went to parent[b, n], which may have moved on from there."""
    hops = 1
    while hops < merges:
        parent, hops = parent.gather(1, parent), 2 * hops
    return parent
