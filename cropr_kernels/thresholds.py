"""Thresholds of merging: each image keeps as many tokens as it needs (`pruning.budget`)."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from .pruning.budget import Thresholds, TotalBudget, quotas
from .pruning.costs import matrix_elements
from .pruning.deployment import deployed_copy
from .pruning.model import CroprModules, modules_of, run
from .pruning.state import PruningOptions
from .schedule import Schedule

NUM_IMAGES = 128  # that thresholds are found on
# Of the highest rate, at which they are found. Above 0.7 images with their own counts agree less
# with the unpruned model than with equal ones: docs/comparison.md
_SHARES = (0.25, 0.5, 0.7)


def fit_thresholds(
    model: nn.Module, images: Tensor, kwargs: Mapping[str, object]
) -> Thresholds | None:
    """Find the thresholds of a pruned model at several rates; None if its images keep equally many
    tokens: none merge, or the engine does not run it.

    Args:
        model: pruned by `apply`, with its queries.
        images: (images, C, H, W), which go through it together.
        kwargs: further arguments of the model.
    """
    if modules_of(model).config.merge is None or not len(images):
        return None
    deployed = deployed_copy(model)
    modules = modules_of(deployed)
    if modules.engine is None:
        return None
    costs: dict[int, tuple[float, ...]] = {}
    num_tokens = 0
    for rate in _rates(modules.num_used, modules.config.grid):
        budget = TotalBudget(rate, _quotas(modules, rate))
        options = PruningOptions(engine=True, budget=budget)
        _, state = run(deployed, lambda: modules.spec.run(images, **kwargs), options)
        if state.record is None:  # its blocks take arguments that the engine does not
            return None
        num_tokens = state.num_tokens
        costs[rate] = tuple(budget.costs)
    return Thresholds(num_tokens, tuple(costs), tuple(costs.values())) if costs else None


def _quotas(modules: CroprModules, rate: int) -> list[float]:
    """The merges of each module at a rate."""
    spec = modules.spec
    num_tokens = spec.num_prefix + modules.config.grid[0] * modules.config.grid[1]
    schedule = replace(modules.config, schedule=Schedule(rate=rate))
    counts = schedule.counts(num_tokens, len(spec.blocks), spec.num_prefix)
    linear = 2 * matrix_elements(spec.blocks[-1]) / (4 * spec.dim)
    return quotas(rate, counts, num_tokens, linear)


def _rates(num_modules: int, grid: tuple[int, int]) -> list[int]:
    """The rates at which thresholds are found."""
    highest = (grid[0] * grid[1] - 4) // num_modules
    return sorted({max(round(highest * share), 1) for share in _SHARES if highest > 0})


class Sample:
    """The first images of one size, up to `NUM_IMAGES`."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.count = 0

    def add(self, images: Tensor) -> None:
        if self.batches and images.shape[1:] != self.batches[0].shape[1:]:
            return
        room = NUM_IMAGES - self.count
        if room > 0:
            self.batches.append(images[:room])
            self.count += len(self.batches[-1])

    def images(self) -> Tensor:
        return torch.cat(self.batches)
