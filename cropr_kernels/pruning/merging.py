"""Merging instead of dropping: pruned tokens go into kept ones.

A merged token stands for `size` tokens: attention weighs it more, it is less likely to be pruned,
and its patches are where it is. Patches of one color of a checkerboard are kept before others, the
two colors in turn, so that those that may be pruned have neighbors to merge into. The defaults are
measured: docs/benchmarks.md.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..utils.numbers import number

# Attention weighs a token by this power of its size; measured: docs/benchmarks.md
SIZE_EXPONENT = 0.9
# Candidates cost exp(COST_WEIGHT * standardised score); measured: docs/benchmarks.md
COST_WEIGHT = 0.25


@dataclass(frozen=True)
class Merge:
    """Merging of each pruned token into the kept one that it is most like, by the cosine of the
    tokens.

    The kept token becomes their mean, weighted by sizes and scaled to the norm that it had.

    Args:
        candidates: >= 1. To prune R tokens, the candidates * R with the lowest scores may be
            pruned, those of one color first; of these the R that are most like a target go, a token
            that is sure to be kept, the lower their scores the sooner: redundant tokens go before
            others. 1: no such choice.
        size_weight: >= 0. Scores rise by size_weight * their standard deviation * log(size), so
            that a token that has absorbed others tends to be kept.

    Raises:
        ValueError: an option is no number, or out of range.
    """

    candidates: float = 3.0
    size_weight: float = 2.0

    def __post_init__(self) -> None:
        candidates = number(
            "Merge: candidates",
            self.candidates,
            "that is finite and >= 1",
            lambda x: 1 <= x < math.inf,
        )
        weight = number(
            "Merge: size_weight",
            self.size_weight,
            "that is finite and >= 0",
            lambda x: 0 <= x < math.inf,
        )
        object.__setattr__(self, "candidates", candidates)
        object.__setattr__(self, "size_weight", weight)

    def num_targets(self, num_tokens: int, num_keep: int, num_prefix: int) -> int:
        """Targets, tokens sure to be kept, if num_keep of num_tokens are: at least one patch, and
        half of them.

        The half only bounds the choice; if more than half must go, all kept tokens are targets.
        """
        non_candidates = num_tokens - math.floor(self.candidates * (num_tokens - num_keep))
        half = num_prefix + (num_tokens - num_prefix + 1) // 2
        return cast(int, torch.sym_min(num_keep, torch.sym_max(non_candidates, half)))


def checkerboard(x: Tensor, grid: tuple[int, int], num_prefix: int) -> tuple[Tensor, Tensor]:
    """Priorities (B, N) int8 of tokens x (B, N, D) on a patch grid that keep one color first, and
    the other one."""
    cells = torch.arange(grid[0] * grid[1], device=x.device)
    dark = (cells // grid[1] + cells % grid[1]) % 2
    dark = torch.nn.functional.pad(dark.to(torch.int8), (num_prefix, 0)).repeat(x.shape[0], 1)
    return dark, 1 - dark


def log_sizes(sizes: Tensor) -> Tensor:
    """The term of the attention logits for tokens of these sizes."""
    return sizes.log() * SIZE_EXPONENT


def resolve_parents(parent: Tensor, merges: int) -> Tensor:
    """Follow parents, (B, N) positions, over a number of merges: a token's parent may itself have
    merged later."""
    hops = 1
    while hops < merges:
        parent = parent.gather(1, parent)
        hops *= 2
    return parent
