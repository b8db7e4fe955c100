"""Drop and merge in standard operators of static shapes, for files that other runtimes execute.

They select as `strategies` does, except that the runtime decides between equal scores. A layer has
one TopK for dropping and two for merging, and sorts nothing: complements of positions are counted.
Tokens move once a layer, by one Gather of rows.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.decompositions import static_size
from ..utils.tensorrt import MAX_TOP
from .config import PruningConfig
from .merging import COST_WEIGHT, SIZE_EXPONENT
from .module import Scorer
from .strategies import DropStrategy, MergeStrategy, Priorities, PruningStrategy, Reduction

# Standardised scores stay below these offsets, which 16-bit floats hold
_PREFIX_OFFSET = 30000.0
_COLOR_OFFSET = 1024.0
_TINY = 1e-30  # keeps quotients of zeros finite


class Batch:
    """Constants of a batch of B images, made once: with a dynamic B each costs several nodes.

    Args:
        x: (B, N, D), all tokens.
        num_prefix: P.
    """

    def __init__(self, x: Tensor, num_prefix: int):
        batch, count, _ = x.shape
        self.positions = torch.arange(count, device=x.device).repeat(batch, 1)  # (B, N)
        self.ones = torch.ones_like(self.positions, dtype=torch.float32)
        self.zeros = torch.zeros_like(self.ones)
        self.offsets = torch.full_like(self.ones, _PREFIX_OFFSET)
        offset = torch.zeros(count, device=x.device)
        offset[:num_prefix] = _PREFIX_OFFSET
        self.prefix_offset = offset.repeat(batch, 1)  # (B, N)
        self.is_single = isinstance(batch, int) and batch == 1
        self.image = torch.arange(batch, device=x.device).unsqueeze(1)  # (B, 1)

    def flat(self, idx: Tensor, count: int) -> Tensor:
        """Positions (B, K) in images of `count` tokens as rows of all images."""
        return idx if self.is_single else idx + self.image * count

    def rows(self, x: Tensor, idx: Tensor) -> Tensor:
        """out[b, i] = x[b, idx[b, i]] for x (B, N, D) and idx (B, K)."""
        return F.embedding(self.flat(idx, x.shape[1]), x.flatten(0, 1))

    def replace_rows(self, x: Tensor, idx: Tensor, values: Tensor) -> Tensor:
        """x (B, N, D) with values (B, R, D) at idx (B, R); of repeated positions any."""
        table = x.flatten(0, 1).clone()
        table[self.flat(idx, x.shape[1]).flatten()] = values.flatten(0, 1)  # OpenVINO's converter
        return table.view(x.shape)  # knows index_put in place only

    def complement(self, idx: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The positions in [0, count) that idx (B, R) does not hold, ascending, and the index of
        each position among them, from 1 on; 0 for those that idx holds.

        Counts in float32, exact below 2^24: TensorRT's CumSum takes no integers.
        """
        size = static_size(idx, 1)
        if size == 0:
            return self.positions[:, :count], self.positions[:, :count] + 1
        remaining = self.ones[:, :count].scatter(1, idx, self.zeros[:, :size])
        rank = (remaining.cumsum(1) * remaining).long()
        # Slot 0 collects what idx holds
        slots = self.positions[:, : count - size + 1]
        return slots.scatter(1, rank, self.positions[:, :count])[:, 1:], rank


def _scores(x: Tensor, query: Tensor) -> Tensor:
    """x . query, (B, N): runtimes are faster at a matrix of one row than at one of one column."""
    return (query.view(1, 1, -1) @ x.transpose(1, 2)).squeeze(1)


class PortableDrop(DropStrategy):
    """`DropStrategy` in standard operators."""

    batch: Batch | None = None

    def _reduce(
        self,
        module: Scorer,
        x: Tensor,
        num_keep: int,
        scores: Tensor | None,
        priority: Tensor | None,
        keep_pruned: bool,
    ) -> Reduction:
        batch = self.batch = self.batch or Batch(x, self.num_prefix)
        wide = x.float()
        kept_idx, pruned_idx = self._select(batch, _scores(wide, module.query()), num_keep)
        kept, pruned = batch.rows(x, kept_idx), batch.rows(x, pruned_idx)
        if not self.tracks_parents:
            return Reduction(kept, kept_idx, pruned_idx, pruned, None, None)
        norms = _norms(wide)
        _, parent_idx = _nearest(batch, wide, norms, pruned_idx, self.num_prefix)
        offset = pruned - batch.rows(x, parent_idx)
        return Reduction(kept, kept_idx, pruned_idx, pruned, offset, parent_idx)

    def _select(self, batch: Batch, scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
        """Positions kept and pruned, in any order but for the prefix, by scores (B, N)."""
        prefix = self.num_prefix
        count = static_size(scores, 1)
        patches = scores[:, prefix:]
        if num_keep - prefix > MAX_TOP:
            pruned_idx = patches.topk(count - num_keep, dim=1, largest=False).indices + prefix
            return batch.complement(pruned_idx, count)[0], pruned_idx
        kept_idx = batch.positions[:, :prefix]
        if num_keep > prefix:
            top = patches.topk(num_keep - prefix, dim=1).indices + prefix
            kept_idx = torch.cat([kept_idx, top], 1)
        return kept_idx, batch.complement(kept_idx, count)[0]


def _norms(x: Tensor) -> Tensor:
    """Norms of the rows of x (B, N, D), (B, N): not ReduceL2, which onnxruntime's tools do not
    know."""
    return (x * x).sum(-1).clamp_min(_TINY).sqrt()


def _nearest(
    batch: Batch, x: Tensor, norms: Tensor, idx: Tensor, num_prefix: int
) -> tuple[Tensor, Tensor]:
    """The highest cosine of each row of x (B, N, D) at idx (B, C) with rows that are neither in idx
    nor of the prefix, and the positions of these, both (B, C)."""
    count, size = x.shape[1], idx.shape[1]
    offset = batch.prefix_offset[:, :count].scatter(1, idx, batch.offsets[:, :size])
    # Not rows @ x^T: static quantization rounds x^T, the other input of the scores
    products = x @ batch.rows(x, idx).transpose(1, 2)
    similarity = products / norms.unsqueeze(2) - offset.unsqueeze(2)
    nearest = similarity.argmax(1, keepdim=True)
    # Not ReduceMax, which onnxruntime's tools do not know
    best = similarity.gather(1, nearest).squeeze(1)
    return best / norms.gather(1, idx), nearest.squeeze(1)


class PortableMerge(MergeStrategy):
    """`MergeStrategy` in standard operators.

    Its scores are standardised, z + size_weight log(size), which ranks alike.
    """

    batch: Batch | None = None
    log_size: Tensor | None = None  # (B, K), of the active tokens; None: all are of size 1
    color: Tensor  # (B, K), _COLOR_OFFSET for dark patches

    def _next_priority(self) -> Tensor | None:
        self.num_reductions += 1
        return None  # colors move with the tokens

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
        count = static_size(x, 1)
        wide = x.float()
        if self.batch is None:
            self.color = cast(Tensor, self.priorities[0]).to(wide.dtype) * _COLOR_OFFSET
        batch = self.batch = self.batch or Batch(x, prefix)
        values = _scores(wide, module.query())[:, prefix:]
        standard = F.layer_norm(values, values.shape[1:], eps=_TINY)
        standard = F.pad(standard, (prefix, 0), value=_PREFIX_OFFSET)
        if self.log_size is not None:
            standard = standard + self.merge.size_weight * self.log_size
        dark_first = self.num_reductions % 2 == 1
        ranked = standard + self.color if dark_first else standard - self.color
        num_candidates = count - self.merge.num_targets(count, num_keep, prefix)
        candidate_idx = ranked.topk(num_candidates, dim=1, largest=False).indices
        norms = _norms(wide)
        best, nearest = _nearest(batch, wide, norms, candidate_idx, prefix)
        cost = (1 - best) * (COST_WEIGHT * standard.gather(1, candidate_idx)).exp()
        chosen = cost.topk(count - num_keep, dim=1, largest=False).indices
        pruned_idx, target = candidate_idx.gather(1, chosen), nearest.gather(1, chosen)
        kept_idx, rank = batch.complement(pruned_idx, count)
        # All that merge into one target compute its row, (B, R, D), alike
        weights = (target.unsqueeze(2) == target.unsqueeze(1)).to(wide.dtype)
        sums = batch.rows(wide, target)
        if self.sizes is None:
            self.sizes = torch.ones_like(self.color)
            size = self.sizes[:, :1]
        else:
            weights = weights * self.sizes.gather(1, pruned_idx).unsqueeze(1)
            size = self.sizes.gather(1, target)
            sums = sums * size.unsqueeze(2)
        sums = sums + weights @ batch.rows(wide, pruned_idx)
        merged = (sums * (norms.gather(1, target) / _norms(sums)).unsqueeze(2)).to(x.dtype)
        kept = batch.rows(batch.replace_rows(x, target, merged), kept_idx)
        sizes = self.sizes.scatter(1, target, size + weights.sum(2))
        self.sizes = sizes.gather(1, kept_idx)
        self.log_size = self.sizes.log()
        self.color = self.color.gather(1, kept_idx)
        row_idx = rank.scatter(1, pruned_idx, rank.gather(1, target)) - 1
        self.row_idx = row_idx if self.row_idx is None else row_idx.gather(1, self.row_idx)
        pruned = batch.rows(x, pruned_idx)
        if not self.tracks_parents:
            return Reduction(kept, kept_idx, pruned_idx, pruned, None, None)
        return Reduction(kept, kept_idx, pruned_idx, pruned, pruned - merged, target)

    def log_sizes(self) -> Tensor | None:
        return None if self.log_size is None else self.log_size * SIZE_EXPONENT


def make_portable_strategy(
    config: PruningConfig, num_prefix: int, priorities: Priorities, tracks_parents: bool
) -> PruningStrategy:
    """`make_strategy` in standard operators; masks are not supported."""
    if config.merge is None:
        return PortableDrop(num_prefix, priorities, tracks_parents)
    return PortableMerge(config.merge, num_prefix, priorities, tracks_parents)
