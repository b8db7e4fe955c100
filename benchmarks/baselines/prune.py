"""Baselines of `cropr::prune`: the split by sequences of PyTorch ops, and a check of results."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cropr_kernels  # noqa: F401  (registers the ops)

PREFIX = 1
Split = tuple[Tensor, Tensor, Tensor, Tensor]


def cropr_prune(x: Tensor, query: Tensor, keep: int) -> Split:
    return torch.ops.cropr.prune(x, query, keep, PREFIX)


def published(x: Tensor, query: Tensor, keep: int) -> Split:
    """The published sequence: logits of every query, their sum, a full sort, a gather of all."""
    scores = (query @ x.transpose(1, 2)).sum(1)
    scores[:, :PREFIX] = float("inf")
    order = scores.argsort(dim=1, descending=True)
    moved = x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return moved[:, :keep], order[:, :keep], moved[:, keep:], order[:, keep:]


def sort_and_index_select(x: Tensor, query: Tensor, keep: int) -> Split:
    """The same with PyTorch's fastest gather: rows of the flattened batch."""
    batch, n, dim = x.shape
    scores = x @ query.sum(0)
    scores[:, :PREFIX] = float("inf")
    order = scores.argsort(dim=1, descending=True)
    rows = (order + n * torch.arange(batch, device=x.device).unsqueeze(1)).view(-1)
    moved = x.reshape(batch * n, dim).index_select(0, rows).view(batch, n, dim)
    return moved[:, :keep], order[:, :keep], moved[:, keep:], order[:, keep:]


def topk_and_index_select(x: Tensor, query: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Kept tokens only: top-k instead of a sort, without the tokens for Last Layer Fusion."""
    batch, n, dim = x.shape
    scores = x @ query.sum(0)
    scores[:, :PREFIX] = float("inf")
    order = scores.topk(keep, dim=1).indices
    rows = (order + n * torch.arange(batch, device=x.device).unsqueeze(1)).view(-1)
    return x.reshape(batch * n, dim).index_select(0, rows).view(batch, keep, dim), order


def copy(x: Tensor, query: Tensor, keep: int) -> Tensor:
    """Lower bound of the time: read x once, write it once."""
    return x.clone()


PRUNE: dict[str, Callable[..., Any]] = {
    "prune": cropr_prune,
    "copy of x": copy,
    "published": published,
    "sort + index_select": sort_and_index_select,
}


def check(x: Tensor, query: Tensor, keep: int) -> None:
    """Refuse to time a wrong result: exact rows, exact order, a selection that float64 agrees with.

    Raises:
        RuntimeError: the result is wrong.
    """
    kept, kept_idx, pruned, pruned_idx = cropr_prune(x, query, keep)
    if not torch.equal(torch.ops.cropr.restore(kept, kept_idx, pruned, pruned_idx), x):
        raise RuntimeError("prune then restore does not give x back")
    scores = x.double() @ query.double().sum(0)
    slack = scores.abs().max() * 1e-5
    lowest = scores.gather(1, kept_idx[:, PREFIX:]).min(1).values
    highest = scores.gather(1, pruned_idx).max(1).values
    if not bool((lowest + slack >= highest).all()):
        raise RuntimeError("a pruned token scores higher than a kept one")
    for baseline in (published, sort_and_index_select):
        agreeing = (
            torch.isin(baseline(x.float(), query.float(), keep)[1][0], kept_idx[0]).double().mean()
        )
        if agreeing < 0.99:
            raise RuntimeError(f"{baseline.__name__} keeps other tokens: only {agreeing:.3f} agree")
