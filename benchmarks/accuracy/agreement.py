"""Agreement of a network with the unpruned one: measured without labels or training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cropr_kernels as cropr
from benchmarks.baselines.network import Reduced
from benchmarks.models.deployment import pruned
from cropr_kernels.models.vit import ViT


def calibrated(base: ViT, images: Tensor, rate: int = 8) -> Any:
    """Prune a copy of the base, with queries calibrated on these images."""
    return cropr.calibrate(pruned(base, rate=rate), images)


def log_probabilities(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(50)]).log_softmax(1)


def outputs(model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (B, classes), and normed tokens (B, N, D), None if some are dropped."""
    logits: list[Tensor] = []
    full_tokens: list[Tensor | None] = []
    for batch in images.split(50):
        if isinstance(model, Reduced):
            features = model.run(batch)
            tokens = features.tokens
            full = features.full()
        else:
            tokens = model.forward_features(batch)
            full = tokens if tokens.shape[1] == model.num_prefix_tokens + model.grid**2 else None
        logits.append(getattr(model, "backbone", model).forward_head(tokens))
        full_tokens.append(full)
    complete = [full for full in full_tokens if full is not None]
    covers_all = len(complete) == len(full_tokens)
    return torch.cat(logits).log_softmax(1), torch.cat(complete) if covers_all else None


def relative_error(tokens: Tensor, expected: Tensor) -> float:
    """Squared error of tokens (B, N, D), relative to the variance of each channel."""
    spread = (expected - expected.mean((0, 1))).square().sum()
    return ((tokens - expected).square().sum() / spread).item()


def percent_equal(a: Tensor, b: Tensor) -> float:
    return 100 * (a == b).double().mean().item()


def agreement(log_probs: Tensor, expected: Tensor) -> tuple[float, float]:
    """Top-1 agreement in percent, and mean KL divergence, of log-probabilities (B, classes)."""
    divergence = (expected.exp() * (expected - log_probs)).sum(1).mean().item()
    return percent_equal(log_probs.argmax(1), expected.argmax(1)), divergence
