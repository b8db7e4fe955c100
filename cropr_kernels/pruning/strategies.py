"""The two ways to reduce the tokens after a block, drop and merge, each in two forms.

`reduce` copies the kept tokens and is differentiable: `PruningState` uses it. `reduce_` works on
the engine's buffer, in which no token moves. A strategy belongs to one forward.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.score_weights import cost_scales, size_adjusted_scores
from .config import PruningConfig
from .merging import COST_WEIGHT, Merge, log_sizes, resolve_parents
from .module import Scorer

ops = torch.ops.cropr
Priorities = tuple[Tensor | None, Tensor | None]  # (B, N) int8 by position, of every second module


class Reduction(NamedTuple):
    """The tokens of one module, kept and pruned. Indices are positions (B, K) and (B, R)."""

    kept: Tensor  # (B, K, D)
    kept_idx: Tensor
    pruned_idx: Tensor
    pruned: Tensor | None  # (B, R, D), as they were pruned; None if merging need not copy them
    offset: Tensor | None  # (B, R, D), from their parents; None unless parents are tracked
    parent_idx: Tensor | None  # (B, R)

    def at(self, positions: Tensor) -> "Reduction":
        """Replace indices into the active tokens by their positions (B, N)."""
        return self._replace(
            kept_idx=positions.gather(1, self.kept_idx),
            pruned_idx=positions.gather(1, self.pruned_idx),
            parent_idx=None if self.parent_idx is None else positions.gather(1, self.parent_idx),
        )


class PruningStrategy(ABC):
    """Reduction of the active tokens, module after module.

    Args:
        num_prefix: P, first tokens that are always kept.
        priorities: of the batch.
        tracks_parents: note the parent of each pruned token.
    """

    # (B, N) positions, in place: where a merged token is, or the parent of a pruned one
    parent: Tensor
    row_idx: Tensor | None = None  # (B, N): the row of the kept tokens that each token merged into

    def __init__(self, num_prefix: int, priorities: Priorities, tracks_parents: bool):
        self.num_prefix = num_prefix
        self.priorities = priorities
        self.tracks_parents = tracks_parents
        self.num_reductions = 0

    def reduce(
        self,
        module: Scorer,
        x: Tensor,
        positions: Tensor | None,
        num_keep: int,
        scores: Tensor | None,
        keep_pruned: bool,
    ) -> Reduction:
        """Keep num_keep of the active tokens x (B, N, D).

        Args:
            module: scores the tokens.
            x: (B, N, D).
            positions: (B, N) of x; None: all tokens, in order.
            num_keep: K.
            scores: (B, N), if they are known.
            keep_pruned: return the pruned tokens too.
        """
        priority = self._next_priority()
        if positions is None:
            return self._reduce(module, x, num_keep, scores, priority, keep_pruned)
        if priority is not None:
            priority = priority.gather(1, positions)
        return self._reduce(module, x, num_keep, scores, priority, keep_pruned).at(positions)

    def _next_priority(self) -> Tensor | None:
        priority = self.priorities[self.num_reductions % 2]
        self.num_reductions += 1
        return priority

    @abstractmethod
    def _reduce(
        self,
        module: Scorer,
        x: Tensor,
        num_keep: int,
        scores: Tensor | None,
        priority: Tensor | None,
        keep_pruned: bool,
    ) -> Reduction:
        """`reduce` with indices into x."""

    def prepare_(self, x: Tensor) -> None:
        """Allocate what `reduce_` keeps by position, for all tokens x (B, N, D) of a batch."""
        if self.tracks_parents:
            self.parent = _positions_of(x)

    @abstractmethod
    def reduce_(
        self,
        x: Tensor,
        idx: Tensor | None,
        update: Tensor,
        gamma: Tensor | None,
        query: Tensor,
        num_keep: int,
    ) -> Tensor:
        """Add the update of the block's MLP to x[idx] and return the positions kept, (B, num_keep).

        Args:
            x: (B, N, D), all tokens, in place.
            idx: (B, K), positions of the active tokens; None: all.
            update: (B, K, D).
            gamma: (D,), LayerScale's factor, if any.
            query: (D,).
            num_keep: tokens to keep.
        """

    def log_sizes(self) -> Tensor | None:
        """The attention logits of the sizes of the active tokens, (B, K); None if all count
        alike."""
        return None


class DropStrategy(PruningStrategy):
    """Pruned tokens are lost, or wait for Last Layer Fusion."""

    def _reduce(
        self,
        module: Scorer,
        x: Tensor,
        num_keep: int,
        scores: Tensor | None,
        priority: Tensor | None,
        keep_pruned: bool,
    ) -> Reduction:
        kept, kept_idx, pruned, pruned_idx = module(x, num_keep, self.num_prefix, scores, priority)
        if not self.tracks_parents:
            return Reduction(kept, kept_idx, pruned_idx, pruned, None, None)
        offset, parent_idx = ops.parent_offsets(x, kept_idx, pruned_idx, self.num_prefix)
        return Reduction(kept, kept_idx, pruned_idx, pruned, offset, parent_idx)

    def reduce_(
        self,
        x: Tensor,
        idx: Tensor | None,
        update: Tensor,
        gamma: Tensor | None,
        query: Tensor,
        num_keep: int,
    ) -> Tensor:
        prefix = self.num_prefix
        priority = self._next_priority()
        kept_idx, pruned_idx = ops.add_select_(
            x, idx, update, gamma, query, num_keep, prefix, priority=priority
        )
        if self.tracks_parents:
            ops.parent_offsets_(x, kept_idx, pruned_idx, self.parent, prefix)
        return kept_idx


class MergeStrategy(PruningStrategy):
    """Pruned tokens merge into kept ones, which grow."""

    def __init__(self, merge: Merge, num_prefix: int, priorities: Priorities, tracks_parents: bool):
        super().__init__(num_prefix, priorities, tracks_parents)
        self.merge = merge
        self.sizes: Tensor | None = None  # (B, K) float32, of the active tokens; None: all are 1

    def _reduce(
        self,
        module: Scorer,
        x: Tensor,
        num_keep: int,
        scores: Tensor | None,
        priority: Tensor | None,
        keep_pruned: bool,
    ) -> Reduction:
        prefix = self.num_prefix
        if scores is None:
            scores = ops.scores(x, module.query())
        adjusted = scores
        if self.sizes is None:
            self.sizes = x.new_ones(x.shape[:2], dtype=torch.float32)
        else:
            adjusted = size_adjusted_scores(scores, self.sizes, self.merge.size_weight, prefix)
        num_targets = self.merge.num_targets(x.shape[1], num_keep, prefix)
        target_idx, candidate_idx = ops.select(adjusted, num_targets, prefix, priority)
        cost_scale = cost_scales(scores, adjusted, COST_WEIGHT, prefix)
        kept, kept_idx, pruned_idx, self.sizes, row_idx = ops.merge(
            x,
            target_idx,
            candidate_idx,
            self.sizes,
            num_keep,
            num_prefix=prefix,
            cost_scale=cost_scale,
        )
        self.row_idx = row_idx if self.row_idx is None else row_idx.gather(1, self.row_idx)
        pruned = ops.gather(x, pruned_idx) if keep_pruned or self.tracks_parents else None
        if not self.tracks_parents:
            return Reduction(kept, kept_idx, pruned_idx, pruned, None, None)
        parent_row = row_idx.gather(1, pruned_idx)
        offset = pruned - ops.gather(kept, parent_row)
        return Reduction(kept, kept_idx, pruned_idx, pruned, offset, kept_idx.gather(1, parent_row))

    def prepare_(self, x: Tensor) -> None:
        self.parent = _positions_of(x)
        self.sizes_by_position = x.new_ones(x.shape[:2], dtype=torch.float32)
        self.cost_scale = torch.ones_like(self.sizes_by_position)

    def reduce_(
        self,
        x: Tensor,
        idx: Tensor | None,
        update: Tensor,
        gamma: Tensor | None,
        query: Tensor,
        num_keep: int,
    ) -> Tensor:
        prefix = self.num_prefix
        # At first every size is one
        size_weight = self.merge.size_weight if self.num_reductions else 0.0
        priority = self._next_priority()
        num_targets = self.merge.num_targets(update.shape[1], num_keep, prefix)
        weights = (self.sizes_by_position, size_weight, priority, self.cost_scale, COST_WEIGHT)
        target_idx, candidate_idx = ops.add_select_(
            x, idx, update, gamma, query, num_targets, prefix, *weights
        )
        kept_idx, _, self.sizes = ops.merge_(
            x,
            target_idx,
            candidate_idx,
            self.sizes_by_position,
            self.parent,
            num_keep,
            prefix,
            self.tracks_parents,
            self.cost_scale,
        )
        return kept_idx

    def log_sizes(self) -> Tensor | None:
        return None if self.sizes is None else log_sizes(self.sizes)

    def final_positions(self) -> Tensor:
        """The position at which each token is after `reduce_`, (B, N)."""
        return resolve_parents(self.parent, self.num_reductions)


def make_strategy(
    config: PruningConfig, num_prefix: int, priorities: Priorities, tracks_parents: bool
) -> PruningStrategy:
    """Make the strategy that a model's configuration asks for."""
    if config.merge is None:
        return DropStrategy(num_prefix, priorities, tracks_parents)
    return MergeStrategy(config.merge, num_prefix, priorities, tracks_parents)


def _positions_of(x: Tensor) -> Tensor:
    """The position of each token of x (B, N, D), (B, N) int64."""
    return torch.arange(x.shape[1], device=x.device).repeat(x.shape[0], 1)
