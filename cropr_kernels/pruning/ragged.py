"""The engine for images that each keep as many tokens as they need: their rows stand packed.

    x (B, N, D) holds every token at its position, as in `engine`; rows (T,) names the active ones
    in x.view(B * N, D), image after image, and starts (B + 1,) where each image begins.

Linear layers and norms see T rows. Attention is within each image. Blocks before the first merge,
and those after the fusion, have equally many tokens of each image and run as in `engine`.

T differs from batch to batch, and libraries prepare a kernel for each T that they have not seen, as
launches are recorded for each. So rows that no image has round T up, by at most 3 or 1/64.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.adapters import BlockParts
from ..models.blocks import Segments
from ..models.norms import NormParameters, norm_parameters
from ..models.rotary import Rotary
from .budget import COST_WEIGHT, Budget, num_candidates
from .merge_record import MergeRecord
from .merging import Merge, log_sizes
from .state import PruningState
from .strategies import Priorities

ops = torch.ops.cropr


class ActiveRows(NamedTuple):
    """The active tokens of a batch."""

    rows: Tensor  # (T,), ascending
    starts: Tensor  # (B + 1,); with padding (B + 2,): it attends to itself
    longest: int  # tokens of an image, or of the padding, at most
    sizes: Tensor  # (T,) float32
    num_padding: int = 0  # rows of no image, the last of T

    @property
    def idx(self) -> Tensor:
        """The rows as the positions (1, T) in a batch of one image."""
        return self.rows.unsqueeze(0)

    def without_padding(self) -> tuple[Tensor, Tensor]:
        """Rows and starts of the images."""
        if not self.num_padding:
            return self.rows, self.starts
        return self.rows[: -self.num_padding], self.starts[:-1]

    def pad(self, free_rows: Tensor) -> "ActiveRows":
        """Round T up with the first of some rows that no image has."""
        count = len(self.rows)
        padding = padded_count(count) - count
        if not padding:
            return self
        rows = torch.cat([self.rows, free_rows[:padding]])
        starts = F.pad(self.starts, (0, 1), value=len(rows))
        sizes = F.pad(self.sizes, (0, padding), value=1.0)
        return ActiveRows(rows, starts, max(self.longest, padding), sizes, padding)


def padded_count(count: int) -> int:
    """Round a number of rows up, by at most 3 or 1/64 of it."""
    multiple = 1 << max((count // 64).bit_length() - 1, 2)
    return -(-count // multiple) * multiple


class RaggedBatch(NamedTuple):
    """The images that enter the first block."""

    x: Tensor  # (B, N, D), contiguous; it changes in place
    active: ActiveRows | None  # their tokens; None: all
    priorities: Priorities
    rotary: Rotary | None  # for x (B, N, D), if all are active
    rotary_rows: Rotary | None  # for rows of x.view(B * N, D), modulo the length of its table

    @classmethod
    def of(cls, state: PruningState, x: Tensor, rotary: Rotary | None) -> "RaggedBatch":
        """Images of one size, x (B, N, D)."""
        rows = None if rotary is None else rotary.with_prefix()
        return cls(x.contiguous(), None, state.choose_priorities(x, None), rotary, rows)

    def all_rows(self) -> ActiveRows:
        """The rows of the tokens that enter the first block."""
        num_images, num_tokens, _ = self.x.shape
        device = self.x.device
        starts = torch.arange(num_images + 1, device=device) * num_tokens
        rows = torch.arange(num_images * num_tokens, device=device)
        return ActiveRows(rows, starts, num_tokens, self.x.new_ones(len(rows), dtype=torch.float32))

    def attend(self, parts: BlockParts, h: Tensor, active: ActiveRows | None) -> Tensor:
        """Run the attention of a block on h, (B, N, D), or the active rows (1, T, D)."""
        attention = getattr(parts.block, parts.attn)
        if active is None:
            return parts.attend(attention, h, self.rotary, None)
        rotary = self.rotary_rows
        if rotary is not None:
            rotary = rotary._replace(idx=active.idx % rotary.length)
        segments = Segments(active.starts, active.longest)
        return parts.attend(attention, h, rotary, log_sizes(active.sizes).unsqueeze(0), segments)


class _Merger:
    """Merges the tokens of one batch, module after module.

    Args:
        state: of this forward.
        merge: the options of merging.
        budget: how many merge.
        batch: the images.
        free_rows: that no image has.
    """

    def __init__(
        self,
        state: PruningState,
        merge: Merge,
        budget: Budget,
        batch: RaggedBatch,
        free_rows: Tensor,
    ):
        self.state = state
        self.size_weight = merge.size_weight
        self.budget = budget
        self.x = batch.x
        self.priorities = batch.priorities
        self.free_rows = free_rows
        self.sizes = self.x.new_ones(self.x.shape[:2], dtype=torch.float32)
        self.cost_scale = torch.ones_like(self.sizes)
        self.record = MergeRecord(self.x)

    def merge_(
        self, module: int, active: ActiveRows, update: Tensor, gamma: Tensor | None
    ) -> ActiveRows:
        """Add the update (T, D) of the block's MLP to the active rows, and merge."""
        images_rows, images_starts = active.without_padding()
        prefix = self.state.num_prefix
        num_merges = len(self.record.merges)
        limit = min(num_candidates(self.budget.rate), self.x.shape[1])
        order = ops.ragged_add_select_(
            self.x,
            images_rows,
            images_starts,
            update[: len(images_rows)],
            gamma,
            self.state.modules.scorer(module).query(),
            limit,
            prefix,
            self.sizes,
            self.size_weight if num_merges else 0.0,
            self.priorities[num_merges % 2],
            self.cost_scale,
            COST_WEIGHT,
        )
        costs, nearest = ops.ragged_nearest(
            self.x, order, images_starts, limit, prefix, self.cost_scale * self.sizes.sqrt()
        )
        merges = self.budget.choose(module, costs)
        counts = images_starts.diff() - merges.sum(1)
        lengths = counts.tolist()  # the one wait for the device
        rows, starts, sizes = ops.ragged_merge_(
            self.x,
            order,
            images_starts,
            merges,
            nearest,
            self.sizes,
            self.record.parent,
            sum(lengths),
            prefix,
            self.state.config.tracks_parents,
        )
        self.record.add(module, counts)
        return ActiveRows(rows, starts, max(lengths), sizes).pad(self.free_rows)


def run_ragged(
    state: PruningState,
    blocks: list[BlockParts],
    batch: RaggedBatch,
    merge: Merge,
    budget: Budget,
) -> Tensor:
    """Run images through all blocks, and leave the record of their merges in `state`.

    Args:
        state: of this forward, before its first block; without masks.
        blocks: as the engine runs them.
        batch: B >= 1 images.
        merge: the options of merging.
        budget: how many tokens merge.

    Returns:
        (B, N, D), every token at its position: a merged one is the one that it went into, with
        Last Layer Fusion it has its own value; (B, P, D), the prefix, if the model reads no more.
    """
    num_rows = batch.x.shape[0] * batch.x.shape[1]
    num_free = num_rows // 64 + 3
    packed = F.pad(batch.x.flatten(0, 1), (0, 0, 0, num_free)).unsqueeze(0)
    x = packed[0, :num_rows].view(batch.x.shape)
    batch = batch._replace(x=x)
    free_rows = torch.arange(num_rows, num_rows + num_free, device=x.device)
    merger = _Merger(state, merge, budget, batch, free_rows)
    active = batch.active
    first_norm = norm_parameters(getattr(blocks[0].block, blocks[0].norm1), x.dtype)
    h = _normalize(x, active, first_norm)
    for layer, parts in enumerate(blocks):
        block = parts.block
        gamma1, gamma2 = parts.scales(block)
        norm2 = norm_parameters(getattr(block, parts.norm2), x.dtype)
        update = batch.attend(parts, h, active)
        target, idx = (x, None) if active is None else (packed, active.idx)
        h = ops.add_norm_(target, idx, update, gamma1, *norm2)
        update = parts.run_mlp(block, h)
        if layer == state.last_layer:
            ops.add_(target, idx, update, gamma2)
            break
        next_norm = norm_parameters(
            getattr(blocks[layer + 1].block, blocks[layer + 1].norm1), x.dtype
        )
        if layer < len(state.counts):
            all_or_active = batch.all_rows() if active is None else active
            active = merger.merge_(layer, all_or_active, update.flatten(0, 1), gamma2)
            h = ops.gather_norm(packed, active.idx, *next_norm)
        elif layer == state.fused_after:
            ops.add_(target, idx, update, gamma2)
            if state.config.tracks_parents:
                x = ops.add_parents(x, merger.record.parent)
                packed = x.view(1, -1, x.shape[-1])
            active = batch.active
            h = _normalize(x, active, next_norm)
        else:
            h = ops.add_norm_(target, idx, update, gamma2, *next_norm)
    state.record = merger.record
    if active is batch.active:
        return x
    if state.config.tracks_parents:  # no block sees the tokens that are restored
        return ops.add_parents(x, merger.record.parent)
    if state.options.full or not state.num_prefix:
        return ops.gather(x, merger.record.final_positions())
    return x[:, : state.num_prefix]


def _normalize(x: Tensor, active: ActiveRows | None, norm: NormParameters) -> Tensor:
    """Normalize the tokens of x (B, N, D), or its active rows as (1, T, D)."""
    if active is None:
        return ops.gather_norm(x, None, *norm)
    return ops.gather_norm(x.view(1, -1, x.shape[-1]), active.idx, *norm)
