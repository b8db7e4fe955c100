"""The definition of every op in plain PyTorch: the oracle of the tests, never dispatched to.

Shapes: B images, N tokens in, K kept, R = N - K pruned, D width, M queries, P prefix tokens.
"""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype sums run in: float64 for float64 inputs, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fold_queries(queries: Tensor) -> Tensor:
    """Fold M queries into the one vector that gives the same scores.

    The score is linear in the queries: sum_m (q_m . x) = (sum_m q_m) . x.

    Args:
        queries: (M, D) or (D,), any float dtype.

    Returns:
        (D,), float32 (float64 for float64 queries).
    """
    wide = queries.to(accumulation_dtype(queries.dtype))
    return wide.sum(0) if wide.ndim == 2 else wide


def scores(x: Tensor, query: Tensor) -> Tensor:
    """Score every token: x . sum_m query_m, (B, N) float32 (paper section 3.1, before the softmax, unscaled)."""
    acc = accumulation_dtype(x.dtype)
    return (x.detach().to(acc) @ fold_queries(query.detach()).to(acc)).float()


def select(scores: Tensor, num_keep: int, num_prefix: int = 0, priority: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keep the first num_prefix positions, then the highest scores; ties go to the lower position.

    With priority (B, N), int8 or bool, positive tokens stay before all others, and negative ones leave before all
    others, of these the higher positions first.
    """
    ranked = scores.clone()
    ranked[:, :num_prefix] = float("nan")  # sorts above everything; stable, so the prefix comes first
    if priority is not None:
        classes = priority.sign().float() if priority.dtype != torch.bool else priority.float()
        classes[:, :num_prefix] = 2
        ranked = torch.where(classes < 0, torch.zeros_like(ranked), ranked)
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    if priority is not None:
        order = order.gather(1, classes.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
    return order[:, :num_keep].sort(dim=1).values, order[:, num_keep:].sort(dim=1).values


def weigh(scores: Tensor, sizes: Tensor, size_weight: float, num_prefix: int = 0) -> Tensor:
    """scores + size_weight * standard deviation * log(sizes), all (B, N); the deviation is that over the patches."""
    if not size_weight or scores.shape[1] == num_prefix:
        return scores
    spread = scores[:, num_prefix:].std(1, correction=0, keepdim=True)
    spread = torch.where(spread.isfinite(), spread, torch.zeros_like(spread))  # NaN or infinite scores have none
    return scores + size_weight * spread * sizes.log()


def gather(x: Tensor, idx: Tensor) -> Tensor:
    """Take rows by position: out[b, i] = x[b, idx[b, i]]."""
    return x.gather(1, idx.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def prune(
    x: Tensor, query: Tensor, num_keep: int, num_prefix: int = 0, priority: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split the tokens into the num_keep that stay and the others, with their positions."""
    return split(x, scores(x, query), num_keep, num_prefix, priority)


def split(
    x: Tensor, scores: Tensor, num_keep: int, num_prefix: int = 0, priority: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prune by scores (B, N) that are known already."""
    kept_idx, pruned_idx = select(scores, num_keep, num_prefix, priority)
    return gather(x, kept_idx), kept_idx, gather(x, pruned_idx), pruned_idx


def restore(kept: Tensor, kept_idx: Tensor, pruned: Tensor, pruned_idx: Tensor) -> Tensor:
    """Put every row back at its position: the inverse of prune."""
    rows, positions = torch.cat([kept, pruned], 1), torch.cat([kept_idx, pruned_idx], 1)
    return torch.empty_like(rows).scatter(1, positions.unsqueeze(-1).expand_as(rows), rows)


def merge(
    x: Tensor,
    safe_idx: Tensor,
    candidate_idx: Tensor,
    sizes: Tensor,
    num_keep: int,
    features: Tensor | None = None,
    num_prefix: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Keep num_keep tokens; the candidates most like a safe one leave and go into it, never into the first num_prefix.

        kept[k] = (sizes[k] x[k] + sum_r sizes[r] x[r]) / (sizes[k] + sum_r sizes[r]), over all r that go into k

    Similarity is the cosine of the features (of x without them); NaN is the lowest. Equals go to the lower position,
    and of equal candidates the higher position leaves. With num_keep = S all candidates leave.

    Args:
        x: (B, N, D).
        safe_idx, candidate_idx: (B, S) and (B, C) as from select, S + C = N.
        sizes: (B, N) float32, positive: how many tokens each token stands for.
        features: (B, N, any width), or None.

    Returns:
        The kept tokens (B, K, D), their positions in x, those of the tokens that left, (B, N - K), the sizes (B, K) of
        the kept tokens, and for every token of x the row of kept in which it now is, (B, N) int64. Gradient for x,
        through the means; the choice has none.
    """
    kept_idx, pruned_idx, target = _settle(
        x if features is None else features, safe_idx, candidate_idx, num_keep, num_prefix
    )
    rows, weight = x.to(accumulation_dtype(x.dtype)), sizes.detach().to(accumulation_dtype(x.dtype)).unsqueeze(-1)
    kept_sizes = sizes.detach().gather(1, kept_idx).scatter_add(1, target, sizes.detach().gather(1, pruned_idx))
    mass = rows * weight
    rows_of_target = target.unsqueeze(-1).expand(-1, -1, x.shape[2])
    sums = gather(mass, kept_idx).scatter_add(1, rows_of_target, gather(mass, pruned_idx))
    alone = kept_sizes == sizes.gather(1, kept_idx)
    means = torch.where(alone.unsqueeze(-1), gather(rows, kept_idx), sums / kept_sizes.to(rows.dtype).unsqueeze(-1))
    dest = torch.empty_like(torch.cat([safe_idx, candidate_idx], 1))
    dest.scatter_(1, kept_idx, torch.arange(num_keep, device=x.device).expand_as(kept_idx))
    dest.scatter_(1, pruned_idx, target)
    return means.to(x.dtype), kept_idx, pruned_idx, kept_sizes, dest


def _settle(
    features: Tensor, safe_idx: Tensor, candidate_idx: Tensor, num_keep: int, num_prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions that stay and that leave, ascending, and the index in the former that each of the latter goes to."""
    count = safe_idx.shape[1] + candidate_idx.shape[1] - num_keep
    if count == 0:
        return torch.cat([safe_idx, candidate_idx], 1).sort(1).values, candidate_idx[:, :0], candidate_idx[:, :0]
    wide = features.detach().to(accumulation_dtype(features.dtype))
    safe, candidates = gather(wide, safe_idx[:, num_prefix:]), gather(wide, candidate_idx)
    lengths = candidates.norm(dim=-1).unsqueeze(2) * safe.norm(dim=-1).unsqueeze(1)
    similarity = candidates @ safe.transpose(1, 2) / lengths
    similarity = torch.where(similarity.isnan(), torch.full_like(similarity, -torch.inf), similarity)
    nearest = num_prefix + similarity.argmax(-1)
    order = similarity.max(-1).values.flip(1).sort(dim=1, descending=True, stable=True).indices
    order = candidate_idx.shape[1] - 1 - order  # the most similar first, of equals the higher position
    leaving, staying = order[:, :count].sort(1).values, order[:, count:]
    kept_idx = torch.cat([safe_idx, candidate_idx.gather(1, staying)], 1).sort(1).values
    target = torch.searchsorted(kept_idx, safe_idx.gather(1, nearest.gather(1, leaving)))
    return kept_idx, candidate_idx.gather(1, leaving), target


def attend(x: Tensor, queries: Tensor, scale: float) -> Tensor:
    """Cross-attention of queries (M, D) over x (B, N, D), keys = values = x, one head; x is read as detached."""
    acc = accumulation_dtype(x.dtype)
    tokens = x.detach().to(acc)
    logits = scale * (queries.to(acc) @ tokens.transpose(1, 2))
    return (logits.softmax(-1) @ tokens).to(x.dtype)


def attend_scores(x: Tensor, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The attention together with the scores that prune would compute from the same tokens and queries."""
    return attend(x, queries, scale), scores(x, queries)


# The residual stream: x (B, N, D) stays where it is, idx (B, K) names the tokens still alive; None: all of them.


def _rows(x: Tensor, idx: Tensor | None) -> Tensor:
    return (x if idx is None else gather(x, idx)).to(accumulation_dtype(x.dtype))


def gather_norm(x: Tensor, idx: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of the rows at idx, (B, K, D)."""
    rows = _rows(x, idx)
    affine = [None if part is None else part.to(rows.dtype) for part in (weight, bias)]
    return torch.nn.functional.layer_norm(rows, rows.shape[-1:], affine[0], affine[1], eps).to(x.dtype)


def add_(x: Tensor, idx: Tensor | None, update: Tensor, gamma: Tensor | None) -> None:
    """x[b, idx[b, i]] += gamma * update[b, i], in place, rounded once."""
    rows, step = _rows(x, idx), update.to(accumulation_dtype(x.dtype))
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
) -> Tensor:
    """add_, then the LayerNorm of the rows it wrote."""
    add_(x, idx, update, gamma)
    return gather_norm(x, idx, weight, bias, eps)


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
) -> tuple[Tensor, Tensor]:
    """add_, then the positions in x of the num_keep rows that stay and of those that leave, ascending, int64.

    With sizes (B, N) scores are weighed (`weigh`) by those of the rows: what has absorbed others had better stay.
    priority (B, N) is that of `select`, by position in x.
    """
    add_(x, idx, update, gamma)
    values = scores(x if idx is None else gather(x, idx), query)
    if sizes is not None:
        values = weigh(values, sizes if idx is None else sizes.gather(1, idx), size_weight, num_prefix)
    if priority is not None and idx is not None:
        priority = priority.gather(1, idx)
    kept, pruned = select(values, num_keep, num_prefix, priority)
    return (kept, pruned) if idx is None else (idx.gather(1, kept), idx.gather(1, pruned))


def merge_(
    x: Tensor,
    safe_idx: Tensor,
    candidate_idx: Tensor,
    sizes: Tensor,
    parent: Tensor,
    num_keep: int,
    num_prefix: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """merge where the tokens are: the kept rows of x (B, N, D) become the means.

    sizes (B, N) changes where tokens stay; parent (B, N), int64, receives where one leaves the position it went to.
    Rows of x in neither list (they left earlier) are not looked at, and the rows of those that leave stay as they are.

    Returns:
        Positions that stay and that leave, ascending, and the sizes (B, K) of those that stay.
    """
    both = torch.cat([safe_idx, candidate_idx], 1).sort(1).values
    safe, candidates = torch.searchsorted(both, safe_idx), torch.searchsorted(both, candidate_idx)
    kept, kept_at, pruned_at, kept_sizes, dest = merge(
        gather(x, both), safe, candidates, sizes.gather(1, both), num_keep, None, num_prefix
    )
    kept_idx, pruned_idx = both.gather(1, kept_at), both.gather(1, pruned_at)
    x.scatter_(1, kept_idx.unsqueeze(-1).expand_as(kept), kept)
    sizes.scatter_(1, kept_idx, kept_sizes)
    parent.scatter_(1, pruned_idx, kept_idx.gather(1, dest.gather(1, pruned_at)))
    return kept_idx, pruned_idx, kept_sizes


def rotate_(x: Tensor, table: Tensor, idx: Tensor | None, num_prefix: int = 0, half: bool = False) -> None:
    """Rotary positions, in place, on queries or keys x (B, K, H, C); the first num_prefix tokens have none.

    table (patches, 2 C) holds sines, then cosines; token i of image b is patch idx[b, i] - num_prefix (i - num_prefix
    without idx). Channels pair up as (0, 1), (2, 3), ..., or with `half` as (0, C / 2), (1, C / 2 + 1), ...
    """
    patches = x[:, num_prefix:].to(accumulation_dtype(x.dtype))
    angles = table[: patches.shape[1]] if idx is None else table[idx[:, num_prefix:] - num_prefix]
    sin, cos = angles.to(patches.dtype).unsqueeze(-2).chunk(2, dim=-1)
    if half:
        low, high = patches.chunk(2, dim=-1)
        turned = torch.cat([-high, low], dim=-1)
    else:
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
    x[:, num_prefix:] = (patches * cos + turned * sin).to(x.dtype)
