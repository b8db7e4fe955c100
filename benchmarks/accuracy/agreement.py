"""How far a network without labels or training agrees with the unpruned one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cropr_kernels as cropr
from benchmarks.models.deployment import pruned


def calibrated(base: Any, images: Tensor, rate: int = 8) -> Any:
    """The base pruned by queries that are calibrated on these images."""
    return cropr.calibrate(pruned(base, rate=rate), images)


def log_probabilities(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(50)]).log_softmax(1)


def percent_equal(a: Tensor, b: Tensor) -> float:
    return 100 * (a == b).double().mean().item()


def agreement(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """Of log-probabilities (B, classes): how often the first choice is the same, in percent, and the mean KL."""
    divergence = (expected.exp() * (expected - got)).sum(1).mean().item()
    return percent_equal(got.argmax(1), expected.argmax(1)), divergence
