"""Tokens through pruned blocks: the functional form of Cropr, for training, export and blocks nobody fused.

Positions travel with the tokens, so that rotary tables, Last Layer Fusion and maps find each token again.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .blocks import FusedBlock, rope_at
from .merging import Merge, weigh

Departures = Callable[[int, Tensor], None]


class Merging(NamedTuple):
    """How tokens merge, and the blocks, taken apart so that their attention can weigh them."""

    how: Merge
    blocks: Sequence[FusedBlock]


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
    merging: Merging | None = None,
    collect: bool = False,
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
        merging: tokens that leave merge into those that stay.
        collect: also return the tokens that left; with LLF there are none.

    Returns:
        The tokens after the last block and the auxiliary predictions, one per module that has them.
    """
    full_rope, positions = rope, None
    gone: list[Tensor] = []
    gone_positions: list[Tensor] = []
    aux: list[Tensor] = []
    sizes: Tensor | None = None
    rows: Tensor | None = None
    last = len(blocks) - 1
    if rope is not None and rope.ndim == 3:
        rope = rope.unsqueeze(1)
    for layer, block in enumerate(blocks):
        if llf and layer == last and positions is not None:
            x = torch.ops.cropr.restore(x, positions, torch.cat(gone, 1), torch.cat(gone_positions, 1))
            rope = full_rope if full_rope is None or full_rope.ndim == 2 else full_rope.unsqueeze(1)
            sizes, gone, gone_positions, positions = None, [], [], None
        keys = None
        if merging is None or (sizes is None and merging.how.similarity == "tokens"):
            kwargs: dict[str, Any] = {} if rope is None else {"rope": rope}
            x = checkpoint(block, x, use_reentrant=False, **kwargs) if recompute else block(x, **kwargs)
        else:
            x, keys = _sized_block(merging, layer, x, rope, num_prefix, sizes, recompute)
        if layer >= len(modules):
            continue
        prediction, scores = modules[layer].predict(x) if training else (None, None)
        if prediction is not None:
            aux.append(prediction)
        if counts[layer] == x.shape[1]:
            continue
        if merging is None:
            x, kept_idx, pruned, pruned_idx = modules[layer](x, counts[layer], num_prefix, scores)
        else:
            scores = torch.ops.cropr.scores(x, modules[layer].query()) if scores is None else scores
            how, before = merging.how, x
            if sizes is None:
                sizes = x.new_ones(x.shape[:2], dtype=torch.float32)
            else:
                scores = weigh(scores, sizes, how.size_weight, num_prefix)
            split = torch.ops.cropr.select(scores, how.num_safe(x.shape[1], counts[layer], num_prefix), num_prefix)
            x, kept_idx, pruned_idx, sizes, dest = torch.ops.cropr.merge(
                x, *split, sizes, counts[layer], keys, num_prefix
            )
            rows = dest if rows is None else dest.gather(1, rows)
            pruned = torch.ops.cropr.gather(before, pruned_idx) if llf or collect else None
        left = pruned_idx if positions is None else positions.gather(1, pruned_idx)
        positions = kept_idx if positions is None else positions.gather(1, kept_idx)
        if llf or collect:
            gone.append(pruned)
            gone_positions.append(left)
        if departures is not None:
            departures(layer, left)
        if full_rope is not None:
            rope = rope_at(full_rope, positions, num_prefix)
    left = Left(torch.cat(gone, 1), torch.cat(gone_positions, 1), positions) if gone and positions is not None else None
    return Streamed(x, aux, rows, left)


def _sized_block(
    merging: Merging,
    layer: int,
    x: Tensor,
    rope: Tensor | None,
    num_prefix: int,
    sizes: Tensor | None,
    recompute: bool,
) -> tuple[Tensor, Tensor | None]:
    """A block whose attention weighs tokens by their sizes; and its keys, where merging compares them."""
    log_sizes = None if sizes is None or not merging.how.proportional else sizes.log()
    run, keys = merging.blocks[layer].sized, merging.how.similarity == "keys"
    if recompute:
        return checkpoint(run, x, rope, num_prefix, log_sizes, keys=keys, use_reentrant=False)
    return run(x, rope, num_prefix, log_sizes, keys=keys)
