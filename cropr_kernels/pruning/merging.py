"""Merging instead of dropping: pruned tokens go into kept ones.

A token then stands for `size` tokens: attention weighs it so, it is less likely to be pruned, and its patches are all
where it is. Choices and their defaults are measured: docs/benchmarks.md.
"""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Merge:
    """How pruned tokens are merged into kept ones: each into the one it is most like, by the cosine of the tokens.

    The latter becomes their mean, weighted by sizes and scaled to the norm that it had.

    Args:
        candidates: >= 1. To prune R tokens, the candidates * R with the lowest scores may be pruned, and those of them
            are that are most like a token that is sure to be kept: what is redundant goes before what is not. 1: no
            such choice, the lowest scores are pruned.
        size_weight: >= 0. Scores rise by size_weight * their standard deviation * log(size): a token that has absorbed
            others had better be kept.

    Raises:
        ValueError: an option is out of range.
    """

    candidates: float = 1.5
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


def resolve_parents(parent: Tensor, merges: int) -> Tensor:
    """Where each token is after so many merges, (B, N): it went to parent[b, n], which may have moved on from there."""
    hops = 1
    while hops < merges:
        parent, hops = parent.gather(1, parent), 2 * hops
    return parent
