"""Choice of the image tokens that a language model sees."""

import math

import torch
from torch import Tensor

from ..ops.reference import size_adjusted_scores
from ..pruning.merging import Merge
from ..utils.numbers import integer, number

Keep = int | float  # tokens an image, or their share


def checked_keep(keep: Keep) -> Keep:
    """Return `keep`; raise ValueError if it is no count >= 1 and no share in (0, 1]."""
    if isinstance(keep, float):
        return number("cropr.prune_image_tokens: keep", keep, "in (0, 1]", lambda x: 0 < x <= 1)
    return integer("cropr.prune_image_tokens: keep", keep, 1)


def num_kept(keep: Keep, num_tokens: int) -> int:
    """Count the kept tokens of an image of `num_tokens`."""
    if isinstance(keep, float):
        return math.ceil(keep * num_tokens)
    return min(keep, num_tokens)


def choose(rows: Tensor, count: int, query: Tensor | None, sizes: Tensor | None = None) -> Tensor:
    """Choose one of the image tokens rows (N, D) in each of `count` equal runs: that with the
    highest product with the query (D,), or without a query that in the middle.

    So chosen tokens are spread over the image; measured: docs/vlm.md. Scores rise with sizes (N,)
    as inside a network.

    Returns:
        Their indices (count,), ascending. Of equal scores the first is chosen, NaN last.
    """
    num_tokens = len(rows)
    if query is None or count == num_tokens:
        return _middles(rows, count)
    scores = scores_of(rows, query)
    if sizes is not None:
        weight = Merge().size_weight
        scores = size_adjusted_scores(scores.unsqueeze(0), sizes.unsqueeze(0), weight)[0]
        scores = scores.nan_to_num(nan=float("-inf"))
    run = torch.arange(num_tokens, device=rows.device) * count // num_tokens
    order = scores.argsort(descending=True, stable=True)
    by_run = order[run[order].argsort(stable=True)]
    return by_run[torch.searchsorted(run, torch.arange(count, device=rows.device))]


def choose_highest(rows: Tensor, count: int, query: Tensor | None) -> Tensor:
    """Choose the `count` of rows (N, D) with the highest product with the query, in order; evenly
    spaced ones without a query."""
    if query is None or count == len(rows):
        return _middles(rows, count)
    return scores_of(rows, query).argsort(descending=True, stable=True)[:count].sort().values


def scores_of(rows: Tensor, query: Tensor) -> Tensor:
    """The products of rows (N, D) with a query (D,), float32; -inf for NaN."""
    scores = rows.detach().float() @ query.to(rows.device, torch.float32)
    return scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))


def _middles(rows: Tensor, count: int) -> Tensor:
    index = torch.arange(count, device=rows.device)
    num_tokens = len(rows)
    return (index * num_tokens + num_tokens // 2).div(count, rounding_mode="floor")
