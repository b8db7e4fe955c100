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
    """Choose `count` of the image tokens rows (N, D): those with the highest product with the query
    (D,), or evenly spaced ones without a query. Scores rise with sizes (N,) as inside a network.

    Returns:
        Their indices (count,), ascending. Of equal scores the first are chosen, NaN last.
    """
    num_tokens = len(rows)
    if query is None or count == num_tokens:
        index = torch.arange(count, device=rows.device)
        return (index * num_tokens + num_tokens // 2).div(count, rounding_mode="floor")
    scores = rows.detach().float() @ query.to(rows.device, torch.float32)
    if sizes is not None:
        weight = Merge().size_weight
        scores = size_adjusted_scores(scores.unsqueeze(0), sizes.unsqueeze(0), weight)[0]
    scores = scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    return scores.argsort(descending=True, stable=True)[:count].sort().values
