"""The definitions of the ragged ops in plain PyTorch: those of `reference`, image by image.

Arguments are documented in `ragged`.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference


def images(starts: Tensor, num_candidates: int, num_prefix: int) -> Iterator[tuple[int, ...]]:
    """Yield of each image its index, where it begins and ends in the rows, and its number of
    candidates."""
    ends = starts.tolist()
    for b, (begin, end) in enumerate(itertools.pairwise(ends)):
        yield b, begin, end, min(num_candidates, (end - begin - num_prefix) // 2)


def ragged_add_select_(
    x: Tensor,
    rows: Tensor,
    starts: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    query: Tensor,
    num_candidates: int,
    num_prefix: int = 0,
    sizes: Tensor | None = None,
    size_weight: float = 0.0,
    priority: Tensor | None = None,
    cost_scale: Tensor | None = None,
    cost_weight: float = 0.0,
) -> Tensor:
    """add_select_ of each image; its targets, then its candidates, as rows of x.view(B * N, D)."""
    order = torch.empty_like(rows)
    for b, begin, end, count in images(starts, num_candidates, num_prefix):
        first = b * x.shape[1]
        targets, candidates = reference.add_select_(
            x[b : b + 1],
            rows[None, begin:end] - first,
            update[None, begin:end],
            gamma,
            query,
            end - begin - count,
            num_prefix,
            None if sizes is None else sizes[b : b + 1],
            size_weight,
            None if priority is None else priority[b : b + 1],
            None if cost_scale is None else cost_scale[b : b + 1],
            cost_weight,
        )
        order[begin:end] = first + torch.cat([targets, candidates], 1)[0]
    return order


def ragged_nearest(
    x: Tensor,
    order: Tensor,
    starts: Tensor,
    num_candidates: int,
    num_prefix: int = 0,
    cost_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cost of merging each candidate into its nearest target, and the row of that target."""
    shape = x.shape[0], num_candidates
    costs = x.new_full(shape, torch.inf, dtype=reference.accumulation_dtype(x.dtype))
    nearest = order.new_full(shape, -1)
    for b, begin, end, count in images(starts, num_candidates, num_prefix):
        if not count:
            continue
        positions = order[None, begin:end] - b * x.shape[1]
        targets, candidates = positions.split([end - begin - count, count], 1)
        best, index = reference.find_nearest(x[b : b + 1], targets, candidates, num_prefix)
        scale = None if cost_scale is None else cost_scale[b : b + 1]
        costs[b, :count] = reference.merge_costs(best, candidates, scale)[0]
        nearest[b, :count] = order[begin + index[0]]
    return costs, nearest


def ragged_merge_(
    x: Tensor,
    order: Tensor,
    starts: Tensor,
    prune: Tensor,
    nearest: Tensor,
    sizes: Tensor,
    parent: Tensor,
    num_kept: int,
    num_prefix: int = 0,
    offsets: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """merge_ of each image by a given choice: the rows that are left, their starts and sizes."""
    rows, counts = [order[:0]], [0]
    for b, begin, end, count in images(starts, prune.shape[1], num_prefix):
        first = b * x.shape[1]
        targets, candidates = (order[begin:end] - first).split([end - begin - count, count])
        chosen = prune[b, :count]
        kept = torch.cat([targets, candidates[~chosen]]).sort().values
        pruned = candidates[chosen]
        target = nearest[b, :count][chosen] - first
        kept_index = torch.searchsorted(kept, target)
        merged, merged_sizes = reference.combine(
            x[b : b + 1], sizes[b : b + 1], kept[None], pruned[None], kept_index[None]
        )
        x[b, kept] = merged[0]
        sizes[b, kept] = merged_sizes[0]
        parent[b, pruned] = target
        if offsets:
            reference.subtract_parents(x[b : b + 1], pruned[None], parent[b : b + 1])
        rows.append(first + kept)
        counts.append(len(kept))
    left = torch.cat(rows)
    return left, torch.tensor(counts, device=x.device).cumsum(0), sizes.flatten()[left]


def attend_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    log_sizes: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T + log_sizes) v within each image, in float32 or float64."""
    dtype = q.dtype
    acc = torch.promote_types(dtype, torch.float32)
    q, k, v = (heads.transpose(0, 1).to(acc) for heads in (q, k, v))  # (H, T, C)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    bounds = starts.tolist()
    parts = [q.new_empty(q.shape[0], 0, q.shape[2])]
    for begin, end in itertools.pairwise(bounds):
        logits = scale * q[:, begin:end] @ k[:, begin:end].transpose(1, 2)
        if log_sizes is not None:
            logits = logits + log_sizes[begin:end].to(acc)
        parts.append(logits.softmax(-1) @ v[:, begin:end])
    return torch.cat(parts, 1).transpose(0, 1).to(dtype).contiguous()
