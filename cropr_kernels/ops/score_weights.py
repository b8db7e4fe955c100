"""Scores of merged tokens and what pruning them costs, from scores and sizes."""

import torch
from torch import Tensor


def _mean_and_spread(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each row, (B, 1); of equal values the latter is zero."""
    distance = values - values[:, :1]
    mean = distance.mean(1, keepdim=True)
    return values[:, :1] + mean, (distance - mean).square().mean(1, keepdim=True).sqrt()


def size_adjusted_scores(
    scores: Tensor, sizes: Tensor, size_weight: float, num_prefix: int = 0
) -> Tensor:
    """scores + size_weight * standard deviation over the patches * log(sizes), all (B, N)."""
    if not size_weight or scores.shape[1] == num_prefix:
        return scores
    _, spread = _mean_and_spread(scores[:, num_prefix:])
    # NaN or infinite scores have none
    spread = torch.where(spread.isfinite(), spread, torch.zeros_like(spread))
    return scores + size_weight * spread * sizes.log()


def cost_scales(
    scores: Tensor, adjusted: Tensor, cost_weight: float, num_prefix: int = 0
) -> Tensor:
    """exp(cost_weight * (adjusted - mean) / standard deviation), all (B, N): factors on the cost of
    pruning.

    Mean and deviation are those of the scores over the patches; without a finite deviation the
    scales are 1. Exponents are limited to 60, so that scales are finite and positive.
    """
    if scores.shape[1] == num_prefix:
        return torch.ones_like(adjusted)
    mean, spread = _mean_and_spread(scores[:, num_prefix:])
    scales = (cost_weight * ((adjusted - mean) / spread)).clamp(-60.0, 60.0).exp()
    return torch.where((spread > 0) & spread.isfinite(), scales, torch.ones_like(scales))
