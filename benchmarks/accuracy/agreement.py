"""How far a network without labels or training agrees with the unpruned one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cropr_kernels as cropr
from benchmarks.baselines.network import Reduced
from benchmarks.models.deployment import pruned


def calibrated(base: Any, images: Tensor, rate: int = 8) -> Any:
    """The base pruned by queries that are calibrated on these images."""
    return cropr.calibrate(pruned(base, rate=rate), images)


def log_probabilities(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(50)]).log_softmax(1)


def answers(model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (B, classes), and the normed tokens (B, N, D) at all positions, None where some are dropped."""
    logits, wholes = [], []
    for batch in images.split(50):
        if isinstance(model, Reduced):
            features = model.run(batch)
            tokens, whole = features.tokens, features.whole()
        else:
            tokens = model.forward_features(batch)
            whole = tokens if tokens.shape[1] == model.num_prefix_tokens + model.grid**2 else None
        logits.append(getattr(model, "backbone", model).forward_head(tokens))
        wholes.append(whole)
    complete = [whole for whole in wholes if whole is not None]
    return torch.cat(logits).log_softmax(1), torch.cat(complete) if len(complete) == len(wholes) else None


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The squared error of tokens (B, N, D), over the variance of those expected in each channel."""
    spread = (expected - expected.mean((0, 1))).square().sum()
    return ((got - expected).square().sum() / spread).item()


def percent_equal(a: Tensor, b: Tensor) -> float:
    return 100 * (a == b).double().mean().item()


def agreement(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """Of log-probabilities (B, classes): how often the first choice is the same, in percent, and the mean KL."""
    divergence = (expected.exp() * (expected - got)).sum(1).mean().item()
    return percent_equal(got.argmax(1), expected.argmax(1)), divergence
