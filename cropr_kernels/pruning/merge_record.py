"""The merges of one batch whose images keep different numbers of tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from .merging import resolve_parents


class _Merge(NamedTuple):
    """One merge of a batch."""

    layer: int  # the block that it follows
    counts: Tensor  # (B,), tokens of each image afterwards
    parent: Tensor  # (B, N) then


class MergeRecord:
    """What maps, costs and the caller need of the merges of a batch.

    Args:
        x: (B, N, D), the tokens.
    """

    def __init__(self, x: Tensor):
        self.positions = torch.arange(x.shape[1], device=x.device)
        # (B, N), the position that each token merged into; its own while it is active
        self.parent = self.positions.repeat(x.shape[0], 1)
        self.merges: list[_Merge] = []

    def add(self, layer: int, counts: Tensor) -> None:
        """Note the merge after a block, which left `counts` (B,) tokens."""
        self.merges.append(_Merge(layer, counts, self.parent.clone()))

    def final_positions(self) -> Tensor:
        """The position at which each token is, (B, N)."""
        return resolve_parents(self.parent, len(self.merges))

    def rows(self, count: int) -> Tensor:
        """The token, counted in order of position, that holds each one after the first `count`
        merges, (B, N)."""
        parent = self.merges[count - 1].parent if count else self.positions.expand_as(self.parent)
        row = (parent == self.positions).cumsum(1) - 1
        return row.gather(1, resolve_parents(parent, count))

    def num_blocks(self, depth: int) -> Tensor:
        """The number of blocks that each token went through, (B, N)."""
        blocks = torch.full_like(self.parent, depth)
        for layer, _, parent in reversed(self.merges):
            blocks = blocks.masked_fill(parent != self.positions, layer + 1)
        return blocks
