"""Tokens through pruned blocks: the functional form of Cropr, for training, export and blocks nobody fused.

Positions travel with the tokens, so that rotary tables, Last Layer Fusion and maps find each token again.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..models.blocks import FusedBlock, rope_at
from .masks import Masks
from .merging import Merge, weigh

Departures = Callable[[int, Tensor], None]


class Left(NamedTuple):
    """Tokens that left (B, R, D), as they were then, their positions, and those of the tokens that stayed."""

    tokens: Tensor
    idx: Tensor
    kept_idx: Tensor


class Streamed(NamedTuple):
    """What leaves the last block."""

    tokens: Tensor  # (B, K, D), or (B, N, D) in original order with LLF
    aux: list[Tensor]
    rows: Tensor | None  # (B, N), where tokens merged: the row of those kept last in which each token is
    left: Left | None  # where it was asked for, and tokens left
    positions: Tensor | None  # (B, K), of the tokens; None: all, in order


class Stream:
    """What travels with the tokens of one batch: positions, sizes, rotary rows, those that left, predictions.

    Whoever runs the blocks calls `enter` before each of them and `leave` behind it. The arguments are those of
    `run_blocks`.
    """

    def __init__(
        self,
        modules: Any,
        counts: Sequence[int],
        depth: int,
        *,
        num_prefix: int,
        llf: bool,
        rope: Tensor | None = None,
        training: bool = False,
        departures: Departures | None = None,
        how: Merge | None = None,
        collect: bool = False,
        masks: Masks | None = None,
    ):
        self.masks = masks
        self.modules, self.counts, self.last, self.num_prefix, self.llf = modules, counts, depth - 1, num_prefix, llf
        self.training, self.departures, self.how, self.collect = training, departures, how, collect
        self.table = rope
        self.rope = rope.unsqueeze(1) if rope is not None and rope.ndim == 3 else rope  # rows of the tokens alive
        self.positions: Tensor | None = None  # of the tokens alive; None: all, in order
        self.sizes: Tensor | None = None
        self.rows: Tensor | None = None
        self.gone: list[tuple[Tensor, Tensor]] = []
        self.aux: list[Tensor] = []

    def enter(self, layer: int, x: Tensor) -> Tensor:
        """The tokens that a block shall see: all of them in the last one with LLF."""
        if not (self.llf and layer == self.last and self.positions is not None):
            return x
        x = torch.ops.cropr.restore(x, self.positions, *(torch.cat(parts, 1) for parts in zip(*self.gone)))
        self.rope = self.table.unsqueeze(1) if self.table is not None and self.table.ndim == 3 else self.table
        self.sizes, self.gone, self.positions = None, [], None
        return x

    def leave(self, layer: int, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """The tokens that are left of those a block gave (B, N, D); keys (B, N, C) are what merging compares."""
        if layer >= len(self.modules):
            return x
        module, count, prefix = self.modules[layer], self.counts[layer], self.num_prefix
        prediction, scores = None, None
        if self.training:
            absent = None if self.masks is None else self.masks.log_sizes(self.positions)
            prediction, scores = module.predict(x, absent)
        if prediction is not None:
            self.aux.append(prediction)
        if count == x.shape[1]:
            return x
        before, priority = self.positions, None if self.masks is None else self.masks.priority
        if priority is not None and before is not None:
            priority = priority.gather(1, before)
        if self.how is None:
            x, kept_idx, pruned, pruned_idx = module(x, count, prefix, scores, priority)
        else:
            x, kept_idx, pruned, pruned_idx = self._merge(self.how, x, module, count, scores, keys, priority)
        left = pruned_idx if before is None else before.gather(1, pruned_idx)
        self.positions = kept_idx if before is None else before.gather(1, kept_idx)
        if self.llf or self.collect:
            self.gone.append((pruned, left))
        if self.departures is not None:
            self.departures(layer, left)
        if self.table is not None:
            self.rope = rope_at(self.table, self.positions, prefix)
        return x

    def log_sizes(self) -> Tensor | None:
        """What attention adds to the logits of each token alive, (B, K); None where that is nothing."""
        if self.masks is not None and self.masks.padding is not None:
            return self.masks.log_sizes(self.positions)
        return None if self.sizes is None or self.how is None or not self.how.proportional else self.sizes.log()

    def _merge(
        self,
        how: Merge,
        x: Tensor,
        module: Any,
        count: int,
        scores: Tensor | None,
        keys: Tensor | None,
        priority: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        before, prefix = x, self.num_prefix
        scores = torch.ops.cropr.scores(x, module.query()) if scores is None else scores
        if self.sizes is None:
            self.sizes = x.new_ones(x.shape[:2], dtype=torch.float32)
        else:
            scores = weigh(scores, self.sizes, how.size_weight, prefix)
        split = torch.ops.cropr.select(scores, how.num_safe(x.shape[1], count, prefix), prefix, priority)
        x, kept_idx, pruned_idx, self.sizes, dest = torch.ops.cropr.merge(x, *split, self.sizes, count, keys, prefix)
        self.rows = dest if self.rows is None else dest.gather(1, self.rows)
        pruned = torch.ops.cropr.gather(before, pruned_idx) if self.llf or self.collect else None
        return x, kept_idx, pruned, pruned_idx

    def left(self) -> Left | None:
        """The tokens that left, where they were collected and any did."""
        if not self.gone or self.positions is None:
            return None
        tokens, positions = (torch.cat(parts, 1) for parts in zip(*self.gone))
        return Left(tokens, positions, self.positions)


def run_blocks(
    blocks: Any,
    modules: Any,
    counts: Sequence[int],
    x: Tensor,
    *,
    num_prefix: int,
    llf: bool,
    rope: Tensor | None = None,
    training: bool = False,
    recompute: bool = False,
    departures: Departures | None = None,
    merge: Merge | None = None,
    collect: bool = False,
    masks: Masks | None = None,
    apart: Sequence[FusedBlock] = (),
) -> Streamed:
    """Run x (B, N, D) through the blocks, pruning to counts[l] tokens after block l.

    With LLF every pruned token, as it was when it left, returns to its position before the last block.

    Args:
        blocks: a sequence of modules, called as block(x), or block(x, rope=...) where there is a rotary table.
        modules: a sequence of Cropr modules, one per count; block l is followed by module l.
        counts: kept tokens after each module.
        num_prefix: P, first tokens that are never pruned.
        rope: (patches, C), rows by patch position; (B, patches, C) where each image has a table of its own.
        training: also compute the auxiliary predictions.
        recompute: keep no activations of a block for backward, run it again instead.
        departures: called as departures(block, positions (B, R)) whenever tokens leave.
        merge: how tokens that leave merge into those that stay.
        collect: also return the tokens that left; with LLF there are none.
        masks: tokens that stay or leave whatever their score, and those that no other may see.
        apart: the blocks taken apart, where there is padding or tokens merge.

    Returns:
        The tokens after the last block and the auxiliary predictions, one per module that has them.
    """
    stream = Stream(
        modules,
        counts,
        len(blocks),
        num_prefix=num_prefix,
        llf=llf,
        rope=rope,
        training=training,
        departures=departures,
        how=merge,
        collect=collect,
        masks=masks,
    )
    compares = merge is not None and merge.similarity == "keys"
    for layer, block in enumerate(blocks):
        x, keys, log_sizes = stream.enter(layer, x), None, stream.log_sizes()
        if log_sizes is None and not compares:
            kwargs: dict[str, Any] = {} if stream.rope is None else {"rope": stream.rope}
            x = checkpoint(block, x, use_reentrant=False, **kwargs) if recompute else block(x, **kwargs)
        else:
            parts = (x, stream.rope, num_prefix, log_sizes)  # a block whose attention weighs tokens
            run = apart[layer].sized
            x, keys = (
                checkpoint(run, *parts, keys=compares, use_reentrant=False) if recompute else run(*parts, keys=compares)
            )
        x = stream.leave(layer, x, keys)
    return Streamed(x, stream.aux, stream.rows, stream.left(), stream.positions)
