"""The ops of a deployed model in standard PyTorch operators: TopK with a constant count, and
gathers.

For ONNX, and for programs that run without this package. They select and order as the ops do,
except for NaN and equal scores, of which PyTorch's top-k keeps any (ONNX's keeps the lower
position, as the ops do).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .reference import accumulation_dtype, fold_queries, hops, norms


def _ascending(positions: Tensor) -> Tensor:
    """Sort positions as float32, exact below 2^24: not every runtime has a top-k of integers."""
    count = positions.shape[1]
    return (
        positions
        if count <= 1
        else positions.float().topk(count, dim=1, largest=False).values.long()
    )


def scores(x: Tensor, query: Tensor) -> Tensor:
    return x.float() @ fold_queries(query).float()


def select(
    scores: Tensor, num_keep: int, num_prefix: int = 0, priority: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    batch, n = scores.shape
    positions = torch.arange(n, device=scores.device).expand(batch, -1)
    if num_keep in (num_prefix, n):
        return positions[:, :num_keep], positions[:, num_keep:]
    patches = scores[:, num_prefix:]
    count = num_keep - num_prefix
    if priority is not None:
        order = patches.topk(n - num_prefix, dim=1).indices
        # Of each token in that order
        rank = order.float().topk(n - num_prefix, dim=1, largest=False).indices
        # The scores of negative ones do not matter
        classes = priority[:, num_prefix:].float().sign()
        patches = classes * n - torch.where(classes < 0, n + positions[:, : n - num_prefix], rank)
    kept = _ascending(patches.topk(count, dim=1).indices) + num_prefix
    # If the pruned positions are not used, this second sort is removed from the program.
    pruned = _ascending(patches.topk(n - num_prefix, dim=1).indices[:, count:]) + num_prefix
    return torch.cat([positions[:, :num_prefix], kept], 1), pruned


def gather(x: Tensor, idx: Tensor) -> Tensor:
    batch, n, dim = x.shape
    first = torch.arange(batch, device=x.device).unsqueeze(1) * n
    return (
        x.reshape(-1, dim).index_select(0, (idx + first).reshape(-1)).view(batch, idx.shape[1], dim)
    )


def split(
    x: Tensor, scores: Tensor, num_keep: int, num_prefix: int = 0, priority: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept_idx, pruned_idx = select(scores, num_keep, num_prefix, priority)
    return gather(x, kept_idx), kept_idx, gather(x, pruned_idx), pruned_idx


def prune(
    x: Tensor, query: Tensor, num_keep: int, num_prefix: int = 0, priority: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return split(x, scores(x, query), num_keep, num_prefix, priority)


def restore(kept: Tensor, kept_idx: Tensor, pruned: Tensor, pruned_idx: Tensor) -> Tensor:
    rows = torch.cat([kept, pruned], 1)
    positions = torch.cat([kept_idx, pruned_idx], 1)
    order = positions.float().topk(positions.shape[1], dim=1, largest=False).indices
    return gather(rows, order)


def merge(
    x: Tensor,
    target_idx: Tensor,
    candidate_idx: Tensor,
    sizes: Tensor,
    num_keep: int,
    num_prefix: int = 0,
    cost_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, n, _ = x.shape
    num_targets = target_idx.shape[1]
    num_candidates = candidate_idx.shape[1]
    num_prune = num_targets + num_candidates - num_keep
    positions = torch.arange(n, device=x.device).expand(batch, -1)
    if num_prune == 0:
        return x, positions, positions[:, :0], sizes, positions
    best, nearest = _find_nearest(x, target_idx, candidate_idx, num_prefix)
    gain = -(1 - best).clamp_min(0)
    gain = gain if cost_scale is None else gain * cost_scale.gather(1, candidate_idx)
    # Of equal candidates the higher position is pruned: the order is reversed, as the top keeps the
    # lower.
    chosen = _ascending(num_candidates - 1 - gain.flip(1).topk(num_prune, dim=1).indices)
    pruned_idx = candidate_idx.gather(1, chosen)
    target = target_idx.gather(1, nearest.gather(1, chosen))  # position that each is merged into
    is_pruned = (pruned_idx.unsqueeze(2) == positions.unsqueeze(1)).any(1)  # (B, N)
    row = (~is_pruned).long().cumsum(1) - 1  # of the kept tokens
    kept_idx = _ascending(
        (is_pruned.float() * n + positions).topk(num_keep, dim=1, largest=False).indices
    )
    merges_into = (target.unsqueeze(2) == kept_idx.unsqueeze(1)).to(torch.float32)  # (B, R, K)
    weight = sizes.gather(1, pruned_idx)
    kept_sizes = sizes.gather(1, kept_idx)
    gained = (merges_into * weight.unsqueeze(2)).sum(1)
    kept, pruned = gather(x, kept_idx), gather(x, pruned_idx).float()
    sums = kept.float() * kept_sizes.unsqueeze(2) + merges_into.transpose(1, 2) @ (
        pruned * weight.unsqueeze(2)
    )
    means = sums / (kept_sizes + gained).unsqueeze(2)
    norm, mean_norm, _ = norms(kept.float(), means)
    kept = torch.where((gained == 0).unsqueeze(2), kept, (means * (norm / mean_norm)).to(x.dtype))
    # Pruned tokens are in the row of their target.
    dest_of_pruned = (pruned_idx.unsqueeze(2) == positions.unsqueeze(1)).long() * row.gather(
        1, target
    ).unsqueeze(2)
    dest = torch.where(is_pruned, dest_of_pruned.sum(1), row)
    return kept, kept_idx, pruned_idx, kept_sizes + gained, dest


def _find_nearest(
    features: Tensor, target_idx: Tensor, candidate_idx: Tensor, num_prefix: int
) -> tuple[Tensor, Tensor]:
    """Highest cosine of each candidate with a target, and that target's index in target_idx."""
    wide = features.float()
    targets = gather(wide, target_idx[:, num_prefix:])
    candidates = gather(wide, candidate_idx)
    lengths = candidates.norm(dim=-1).unsqueeze(2) * targets.norm(dim=-1).unsqueeze(1)
    best, nearest = (candidates @ targets.transpose(1, 2) / lengths).max(-1)
    return best, nearest + num_prefix


def parent_offsets(
    x: Tensor, kept_idx: Tensor, pruned_idx: Tensor, num_prefix: int = 0
) -> tuple[Tensor, Tensor]:
    if pruned_idx.shape[1] == 0:
        return gather(x, pruned_idx), pruned_idx
    parent_idx = kept_idx.gather(1, _find_nearest(x, kept_idx, pruned_idx, num_prefix)[1])
    return gather(x, pruned_idx) - gather(x, parent_idx), parent_idx


def add_parents(x: Tensor, parent: Tensor) -> Tensor:
    rows = x.to(accumulation_dtype(x.dtype))
    for hop in hops(parent):
        rows = rows + gather(torch.cat([rows, torch.zeros_like(rows[:, :1])], 1), hop)
    return rows.to(x.dtype)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Map each op to its decomposition, for `ExportedProgram.run_decompositions`."""
    functions = (scores, select, prune, split, gather, restore, merge, parent_offsets, add_parents)
    return {getattr(torch.ops.cropr, function.__name__).default: function for function in functions}
