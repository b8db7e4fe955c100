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
    kept_idx, pruned_idx = select(scores(x, query), num_keep, num_prefix)
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
