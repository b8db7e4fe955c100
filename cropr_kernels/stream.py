"""Tokens through pruned blocks: the functional form of Cropr, for training, export and blocks nobody fused.

Positions travel with the tokens, so that rotary tables, Last Layer Fusion and maps find each token again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Departures = Callable[[int, Tensor], None]


def rope_at(rope: Tensor, positions: Tensor, num_prefix: int) -> Tensor:
    """Rows of a rotary table (patches, C) for the patches at `positions` (B, K): (B, 1, K - P, C)."""
    return rope[positions[:, num_prefix:] - num_prefix].unsqueeze(1)


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
) -> tuple[Tensor, list[Tensor]]:
    """Run x (B, N, D) through the blocks, pruning to counts[l] tokens after block l.

    With LLF every pruned token, as it was when it left, returns to its position before the last block.

    Args:
        blocks: a sequence of modules, called as block(x), or block(x, rope=...) where there is a rotary table.
        modules: a sequence of Cropr modules, one per count; block l is followed by module l.
        counts: kept tokens after each module.
        num_prefix: P, first tokens that are never pruned.
        rope: (patches, C), rows by patch position.
        training: also compute the auxiliary predictions.
        recompute: keep no activations of a block for backward, run it again instead.
        departures: called as departures(block, positions (B, R)) whenever tokens leave.

    Returns:
        The tokens after the last block, (B, K, D), or (B, N, D) in original order with LLF, and the auxiliary
        predictions, one per module that has them.
    """
    full_rope, positions = rope, None
    gone: list[Tensor] = []
    gone_positions: list[Tensor] = []
    aux: list[Tensor] = []
    last = len(blocks) - 1
    for layer, block in enumerate(blocks):
        if llf and layer == last and positions is not None:
            x = torch.ops.cropr.restore(x, positions, torch.cat(gone, 1), torch.cat(gone_positions, 1))
            rope = full_rope
        kwargs: dict[str, Any] = {} if rope is None else {"rope": rope}
        x = checkpoint(block, x, use_reentrant=False, **kwargs) if recompute else block(x, **kwargs)
        if layer >= len(modules):
            continue
        prediction, scores = modules[layer].predict(x) if training else (None, None)
        if prediction is not None:
            aux.append(prediction)
        if counts[layer] == x.shape[1]:
            continue
        x, kept_idx, pruned, pruned_idx = modules[layer](x, counts[layer], num_prefix, scores)
        left = pruned_idx if positions is None else positions.gather(1, pruned_idx)
        positions = kept_idx if positions is None else positions.gather(1, kept_idx)
        if llf:
            gone.append(pruned)
            gone_positions.append(left)
        if departures is not None:
            departures(layer, left)
        if full_rope is not None:
            rope = rope_at(full_rope, positions, num_prefix)
    return x, aux
