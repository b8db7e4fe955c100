"""The definition of every op in plain PyTorch: the oracle of the tests, and the form that
transforms of torch.func see.

Arguments are documented in `functional`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .score_weights import cost_scales, size_adjusted_scores


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums run in: float64 for float64 inputs, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fold_queries(queries: Tensor) -> Tensor:
    """Sum queries (M, D) to one vector (D,): sum_m (q_m . x) = (sum_m q_m) . x."""
    wide = queries.to(accumulation_dtype(queries.dtype))
    return wide.sum(0) if wide.ndim == 2 else wide


def scores(x: Tensor, query: Tensor) -> Tensor:
    """x . sum_m query_m."""
    acc = accumulation_dtype(x.dtype)
    return (x.detach().to(acc) @ fold_queries(query.detach()).to(acc)).float()


def select(
    scores: Tensor, num_keep: int, num_prefix: int = 0, priority: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The prefix, then positive priorities, then the highest scores, then lower positions."""
    ranked = scores.clone()
    # Sorts above everything; stable, so the prefix comes first
    ranked[:, :num_prefix] = float("nan")
    if priority is not None:
        classes = priority.sign().float() if priority.dtype != torch.bool else priority.float()
        classes[:, :num_prefix] = 2
        ranked = torch.where(classes < 0, torch.zeros_like(ranked), ranked)
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    if priority is not None:
        order = order.gather(
            1, classes.gather(1, order).sort(dim=1, descending=True, stable=True).indices
        )
    return order[:, :num_keep].sort(dim=1).values, order[:, num_keep:].sort(dim=1).values


def gather(x: Tensor, idx: Tensor) -> Tensor:
    """out[b, i] = x[b, idx[b, i]]."""
    return x.gather(1, idx.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def prune(
    x: Tensor, query: Tensor, num_keep: int, num_prefix: int = 0, priority: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split by the scores of the query."""
    return split(x, scores(x, query), num_keep, num_prefix, priority)


def split(
    x: Tensor, scores: Tensor, num_keep: int, num_prefix: int = 0, priority: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows and positions of the num_keep tokens that select keeps, and of the others."""
    kept_idx, pruned_idx = select(scores, num_keep, num_prefix, priority)
    return gather(x, kept_idx), kept_idx, gather(x, pruned_idx), pruned_idx


def restore(kept: Tensor, kept_idx: Tensor, pruned: Tensor, pruned_idx: Tensor) -> Tensor:
    """out[b, kept_idx[b, i]] = kept[b, i], and the same for pruned."""
    rows = torch.cat([kept, pruned], 1)
    positions = torch.cat([kept_idx, pruned_idx], 1)
    return torch.empty_like(rows).scatter(1, positions.unsqueeze(-1).expand_as(rows), rows)


def merge(
    x: Tensor,
    target_idx: Tensor,
    candidate_idx: Tensor,
    sizes: Tensor,
    num_keep: int,
    num_prefix: int = 0,
    cost_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mean[k] = (sizes[k] x[k] + sum_r sizes[r] x[r]) / (sizes[k] + sum_r sizes[r]), over all r
    merged into k.

    kept[k] = mean[k] |x[k]| / |mean[k]|; the factor is 1 where |mean[k]| is 0 or infinite, or the
    factor not finite.
    """
    kept_idx, pruned_idx, target = _choose_targets(
        x, target_idx, candidate_idx, num_keep, num_prefix, cost_scale
    )
    kept, kept_sizes = combine(x, sizes, kept_idx, pruned_idx, target)
    dest = torch.empty_like(torch.cat([target_idx, candidate_idx], 1))
    dest.scatter_(1, kept_idx, torch.arange(num_keep, device=x.device).expand_as(kept_idx))
    dest.scatter_(1, pruned_idx, target)
    return kept, kept_idx, pruned_idx, kept_sizes, dest


def combine(
    x: Tensor, sizes: Tensor, kept_idx: Tensor, pruned_idx: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows (B, K, D) and sizes (B, K) of the kept tokens after each pruned one is merged into the
    kept row of its target (B, R)."""
    rows = x.to(accumulation_dtype(x.dtype))
    weight = sizes.detach().to(rows.dtype).unsqueeze(-1)
    kept_sizes = (
        sizes.detach()
        .gather(1, kept_idx)
        .scatter_add(1, target, sizes.detach().gather(1, pruned_idx))
    )
    mass = rows * weight
    rows_of_target = target.unsqueeze(-1).expand(-1, -1, x.shape[2])
    sums = gather(mass, kept_idx).scatter_add(1, rows_of_target, gather(mass, pruned_idx))
    unmerged = kept_sizes == sizes.gather(1, kept_idx)
    kept_rows = gather(rows, kept_idx)
    means = sums / kept_sizes.to(rows.dtype).unsqueeze(-1)
    norm, mean_norm, _ = norms(kept_rows, means)
    kept = torch.where(unmerged.unsqueeze(-1), kept_rows, means * (norm / mean_norm))
    return kept.to(x.dtype), kept_sizes


def norms(targets: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """|target| and |mean| of rows (B, K, D), and a mask of valid merge factors |target| / |mean|:
    (B, K, 1).

    Elsewhere both norms are 1. Gradients are finite everywhere: that of a norm of 0 is 0.
    """
    square, mean_square = (rows.square().sum(-1, keepdim=True) for rows in (targets, means))
    fits = (
        (mean_square > 0)
        & (mean_square < torch.inf)
        & (square.sqrt() / mean_square.sqrt() < torch.inf)
    )
    ones = torch.ones_like(square)
    square, mean_square = torch.where(fits, square, ones), torch.where(fits, mean_square, ones)
    nonzero = square > 0
    return (
        torch.where(nonzero, torch.where(nonzero, square, ones).sqrt(), square),
        mean_square.sqrt(),
        fits,
    )


def _choose_targets(
    features: Tensor,
    target_idx: Tensor,
    candidate_idx: Tensor,
    num_keep: int,
    num_prefix: int,
    cost_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions kept and pruned, ascending, and the kept row each pruned token is merged into."""
    count = target_idx.shape[1] + candidate_idx.shape[1] - num_keep
    if count == 0:
        return (
            torch.cat([target_idx, candidate_idx], 1).sort(1).values,
            candidate_idx[:, :0],
            candidate_idx[:, :0],
        )
    best, nearest = find_nearest(features, target_idx, candidate_idx, num_prefix)
    cost = merge_costs(best, candidate_idx, cost_scale)
    order = cost.flip(1).sort(dim=1, stable=True).indices
    # The lowest cost first, of equals the higher position
    order = candidate_idx.shape[1] - 1 - order
    chosen = order[:, :count].sort(1).values
    kept_idx = torch.cat([target_idx, candidate_idx.gather(1, order[:, count:])], 1).sort(1).values
    target = torch.searchsorted(kept_idx, target_idx.gather(1, nearest.gather(1, chosen)))
    return kept_idx, candidate_idx.gather(1, chosen), target


def merge_costs(best: Tensor, candidate_idx: Tensor, cost_scale: Tensor | None) -> Tensor:
    """max(1 - best, 0) * cost_scale of candidates (B, C), NaN as infinity."""
    cost = (1 - best).clamp_min(0)
    if cost_scale is not None:
        cost = cost * cost_scale.detach().gather(1, candidate_idx)
    return torch.where(cost.isnan(), torch.full_like(cost, torch.inf), cost)


def find_nearest(
    features: Tensor, target_idx: Tensor, candidate_idx: Tensor, num_prefix: int
) -> tuple[Tensor, Tensor]:
    """Highest cosine of each candidate with a target, and that target's index in target_idx."""
    wide = features.detach().to(accumulation_dtype(features.dtype))
    targets = gather(wide, target_idx[:, num_prefix:])
    candidates = gather(wide, candidate_idx)
    lengths = candidates.norm(dim=-1).unsqueeze(2) * targets.norm(dim=-1).unsqueeze(1)
    similarity = candidates @ targets.transpose(1, 2) / lengths
    similarity = torch.where(
        similarity.isnan(), torch.full_like(similarity, -torch.inf), similarity
    )
    return similarity.max(-1).values, num_prefix + similarity.argmax(-1)


def parent_offsets(
    x: Tensor, kept_idx: Tensor, pruned_idx: Tensor, num_prefix: int = 0
) -> tuple[Tensor, Tensor]:
    """x[pruned] - x[parent], and the position of the parent, the most similar kept token."""
    if pruned_idx.shape[1] == 0:
        return gather(x, pruned_idx), pruned_idx.clone()
    parent_idx = kept_idx.gather(1, find_nearest(x, kept_idx, pruned_idx, num_prefix)[1])
    rows = x.to(accumulation_dtype(x.dtype))
    return (gather(rows, pruned_idx) - gather(rows, parent_idx)).to(x.dtype), parent_idx


def add_parents(x: Tensor, parent: Tensor) -> Tensor:
    """out[b, n] = x[b, n] + x[b, parent[b, n]] + ..., up to the token that is its own parent."""
    rows = x.to(accumulation_dtype(x.dtype))
    for hop in hops(parent, parent.shape[1]):
        rows = rows + gather(torch.cat([rows, torch.zeros_like(rows[:, :1])], 1), hop)
    return rows.to(x.dtype)


def hops(parent: Tensor, count: int) -> Iterator[Tensor]:
    """Yield ancestors 1, 2, 4, ... steps away, (B, N), or N = count past the last: pointer
    doubling."""
    ends = parent == torch.arange(count, device=parent.device)
    hop = torch.where(ends, torch.full_like(parent, count), parent)
    for _ in range(max(count - 1, 0).bit_length()):
        yield hop
        hop = torch.cat([hop, torch.full_like(hop[:, :1], count)], 1).gather(1, hop)


def attend(x: Tensor, queries: Tensor, scale: float) -> Tensor:
    """softmax(scale * queries x^T) x."""
    acc = accumulation_dtype(x.dtype)
    tokens = x.detach().to(acc)
    logits = scale * (queries.to(acc) @ tokens.transpose(1, 2))
    return (logits.softmax(-1) @ tokens).to(x.dtype)


def attend_scores(x: Tensor, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """attend, and scores of the same tokens."""
    return attend(x, queries, scale), scores(x, queries)


def attend_backward(grad_out: Tensor, x: Tensor, queries: Tensor, scale: float) -> Tensor:
    """The gradient of attend with respect to the queries."""
    with torch.enable_grad():
        learned = queries.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(attend(x, learned, scale), learned, grad_out)
    return gradient


# The residual buffer: no row of x (B, N, D) moves, idx (B, K) names the active tokens; None: all of
# them.


def _rows(x: Tensor, idx: Tensor | None) -> Tensor:
    return (x if idx is None else gather(x, idx)).to(accumulation_dtype(x.dtype))


def gather_norm(
    x: Tensor,
    idx: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool = False,
) -> Tensor:
    """LayerNorm of x[b, idx[b, i]], or with rms RMSNorm."""
    rows = _rows(x, idx)
    scale, shift = (None if vector is None else vector.to(rows.dtype) for vector in (weight, bias))
    if not rms:
        return torch.nn.functional.layer_norm(rows, rows.shape[-1:], scale, shift, eps).to(x.dtype)
    normed = torch.nn.functional.rms_norm(rows, rows.shape[-1:], scale, eps)
    return (normed if shift is None else normed + shift).to(x.dtype)


def add_(x: Tensor, idx: Tensor | None, update: Tensor, gamma: Tensor | None) -> None:
    """x[b, idx[b, i]] += gamma * update[b, i], rounded once."""
    rows = _rows(x, idx)
    step = update.to(accumulation_dtype(x.dtype))
    rows = (rows + (step if gamma is None else step * gamma.to(step.dtype))).to(x.dtype)
    if idx is None:
        x.copy_(rows)
    else:
        x.scatter_(1, idx.unsqueeze(-1).expand_as(rows), rows)


def add_norm_(
    x: Tensor,
    idx: Tensor | None,
    update: Tensor,
    gamma: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool = False,
) -> Tensor:
    """add_, then gather_norm of the rows it wrote."""
    add_(x, idx, update, gamma)
    return gather_norm(x, idx, weight, bias, eps, rms)


def add_select_(
    x: Tensor,
    idx: Tensor | None,
    update: Tensor,
    gamma: Tensor | None,
    query: Tensor,
    num_keep: int,
    num_prefix: int = 0,
    sizes: Tensor | None = None,
    size_weight: float = 0.0,
    priority: Tensor | None = None,
    cost_scale: Tensor | None = None,
    cost_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """add_, then select by the size-adjusted scores of the new rows; positions in x."""
    add_(x, idx, update, gamma)
    values = unadjusted = scores(x if idx is None else gather(x, idx), query)
    if sizes is not None:
        values = size_adjusted_scores(
            values, sizes if idx is None else sizes.gather(1, idx), size_weight, num_prefix
        )
    if cost_scale is not None:
        active_scale = cost_scales(unadjusted, values, cost_weight, num_prefix)[:, num_prefix:]
        if idx is None:
            cost_scale[:, num_prefix:] = active_scale
        else:
            cost_scale.scatter_(1, idx[:, num_prefix:], active_scale)
    if priority is not None and idx is not None:
        priority = priority.gather(1, idx)
    kept, pruned = select(values, num_keep, num_prefix, priority)
    return (kept, pruned) if idx is None else (idx.gather(1, kept), idx.gather(1, pruned))


def merge_(
    x: Tensor,
    target_idx: Tensor,
    candidate_idx: Tensor,
    sizes: Tensor,
    parent: Tensor,
    num_keep: int,
    num_prefix: int = 0,
    offsets: bool = False,
    cost_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """merge of the rows at target_idx and candidate_idx, written back to x, sizes and parent."""
    active = torch.cat([target_idx, candidate_idx], 1).sort(1).values
    targets = torch.searchsorted(active, target_idx)
    candidates = torch.searchsorted(active, candidate_idx)
    cost_scale = None if cost_scale is None else cost_scale.gather(1, active)
    kept, kept_rows, pruned_rows, kept_sizes, dest = merge(
        gather(x, active),
        targets,
        candidates,
        sizes.gather(1, active),
        num_keep,
        num_prefix,
        cost_scale,
    )
    kept_idx, pruned_idx = active.gather(1, kept_rows), active.gather(1, pruned_rows)
    x.scatter_(1, kept_idx.unsqueeze(-1).expand_as(kept), kept)
    sizes.scatter_(1, kept_idx, kept_sizes)
    parent.scatter_(1, pruned_idx, kept_idx.gather(1, dest.gather(1, pruned_rows)))
    if offsets:
        subtract_parents(x, pruned_idx, parent)
    return kept_idx, pruned_idx, kept_sizes


def parent_offsets_(
    x: Tensor, kept_idx: Tensor, pruned_idx: Tensor, parent: Tensor, num_prefix: int = 0
) -> None:
    """parent_offsets, written to the pruned rows of x; the parents are written to parent."""
    _, parent_idx = parent_offsets(x, kept_idx, pruned_idx, num_prefix)
    parent.scatter_(1, pruned_idx, parent_idx)
    subtract_parents(x, pruned_idx, parent)


def subtract_parents(x: Tensor, pruned_idx: Tensor, parent: Tensor) -> None:
    """x[b, p] -= x[b, parent[b, p]] for every pruned position, rounded once."""
    rows = _rows(x, pruned_idx) - _rows(x, parent.gather(1, pruned_idx))
    x.scatter_(1, pruned_idx.unsqueeze(-1).expand_as(rows), rows.to(x.dtype))


def rotate_(
    x: Tensor, table: Tensor, idx: Tensor | None, num_prefix: int = 0, half: bool = False
) -> None:
    """(a, b) -> (a cos - b sin, b cos + a sin) per pair of channels, by its row of the table."""
    patches = x[:, num_prefix:].to(accumulation_dtype(x.dtype))
    angles = table[: patches.shape[1]] if idx is None else table[idx[:, num_prefix:] - num_prefix]
    sin, cos = angles.to(patches.dtype).unsqueeze(-2).chunk(2, dim=-1)
    if half:
        low, high = patches.chunk(2, dim=-1)
        rotated = torch.cat([-high, low], dim=-1)
    else:
        rotated = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
    x[:, num_prefix:] = (patches * cos + rotated * sin).to(x.dtype)
