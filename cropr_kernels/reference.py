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


def select(scores: Tensor, num_keep: int, num_prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Keep the first num_prefix positions, then the highest scores; ties go to the lower position."""
    ranked = scores.clone()
    ranked[:, :num_prefix] = float("nan")  # sorts above everything; stable, so the prefix comes first
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    return order[:, :num_keep].sort(dim=1).values, order[:, num_keep:].sort(dim=1).values


def gather(x: Tensor, idx: Tensor) -> Tensor:
    """Take rows by position: out[b, i] = x[b, idx[b, i]]."""
    return x.gather(1, idx.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def prune(x: Tensor, query: Tensor, num_keep: int, num_prefix: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split the tokens into the num_keep that stay and the others, with their positions."""
    return split(x, scores(x, query), num_keep, num_prefix)


def split(x: Tensor, scores: Tensor, num_keep: int, num_prefix: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prune by scores (B, N) that are known already."""
    kept_idx, pruned_idx = select(scores, num_keep, num_prefix)
    return gather(x, kept_idx), kept_idx, gather(x, pruned_idx), pruned_idx


def restore(kept: Tensor, kept_idx: Tensor, pruned: Tensor, pruned_idx: Tensor) -> Tensor:
    """Put every row back at its position: the inverse of prune."""
    rows, positions = torch.cat([kept, pruned], 1), torch.cat([kept_idx, pruned_idx], 1)
    return torch.empty_like(rows).scatter(1, positions.unsqueeze(-1).expand_as(rows), rows)


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
    tickets: Tensor,
    num_keep: int,
    num_prefix: int = 0,
) -> Tensor:
    """add_, then the positions in x of the num_keep rows that stay, ascending: (B, K'), int64."""
    add_(x, idx, update, gamma)
    kept, _ = select(scores(x if idx is None else gather(x, idx), query), num_keep, num_prefix)
    return kept if idx is None else idx.gather(1, kept)


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
