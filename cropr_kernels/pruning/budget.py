"""The number of tokens that each image loses: as many as cost less than a threshold.

A constant rate takes equally many tokens from a photo of a plane in the sky and from one of a
crowded market. Here a module merges the candidates of an image whose cost, as `merge` has it, is
below the module's threshold. Thresholds are found without labels, on photos that go through the
pruned model together: at each module the rate times the number of photos cheapest merges of them
all take place, and the cost of the last is the threshold. So rates are means over photos, and a
photo does not depend on those beside it.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

# An image loses at most this multiple of the rate in a module; its candidates are as many
MOST = 3


class Budget(Protocol):
    """The choice of the candidates that merge."""

    rate: float  # R, tokens that an image loses in a module on average

    def choose(self, module: int, costs: Tensor) -> Tensor:
        """Choose the candidates that merge.

        Args:
            module: the index of the module.
            costs: (B, C), inf where an image has fewer candidates.

        Returns:
            (B, C) bool, False where the cost is inf.
        """


def num_candidates(rate: float) -> int:
    """Candidates of an image in a module at a rate: it can merge as many."""
    return math.ceil(MOST * rate)


@dataclass(frozen=True)
class Thresholds:
    """The highest cost at which a token merges, by rate and module.

    Args:
        num_tokens: of the images that they were found on; others get a constant rate.
        rates: ascending, positive.
        costs: one row a rate, one cost a module.

    Raises:
        ValueError: rates do not ascend, or costs are not of their number.
    """

    num_tokens: int
    rates: tuple[float, ...]
    costs: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if len(self.rates) != len(self.costs) or len({len(row) for row in self.costs}) != 1:
            raise ValueError(
                f"Thresholds: costs must be one row a rate of equal length, got {len(self.costs)} "
                f"rows of lengths {sorted({len(row) for row in self.costs})} for "
                f"{len(self.rates)} rates"
            )
        if any(low >= high for low, high in itertools.pairwise((0.0, *self.rates))):
            raise ValueError(f"Thresholds: rates must ascend from above 0, got {self.rates}")

    @property
    def num_modules(self) -> int:
        return len(self.costs[0])

    def at(self, rate: float) -> "ThresholdBudget | None":
        """The budget of a rate, between two rates linearly; None above the highest."""
        if rate > self.rates[-1]:
            return None
        zeros = (0.0,) * len(self.costs[0])
        rows = [(0.0, zeros), *zip(self.rates, self.costs)]
        for (low, low_costs), (high, high_costs) in itertools.pairwise(rows):
            if rate <= high:
                share = (rate - low) / (high - low)
                costs = tuple((1 - share) * a + share * b for a, b in zip(low_costs, high_costs))
                return ThresholdBudget(rate, costs)
        return None

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any] | None) -> "Thresholds | None":
        """Read what `dataclasses.asdict` made, from a file."""
        if saved is None:
            return None
        costs = tuple(tuple(row) for row in saved["costs"])
        return cls(saved["num_tokens"], tuple(saved["rates"]), costs)


@dataclass(frozen=True)
class ThresholdBudget:
    """Merge what costs at most the threshold of the module."""

    rate: float
    costs: Sequence[float]  # one a module

    def choose(self, module: int, costs: Tensor) -> Tensor:
        return costs <= self.costs[module]


class TotalBudget:
    """Merge the cheapest of a batch, the rate times the number of images, and note what the last
    costs."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.costs: list[float] = []  # one a module

    def choose(self, module: int, costs: Tensor) -> Tensor:
        count = round(self.rate * len(costs))
        finite = costs.flatten().sort().values
        count = min(count, int(finite.isfinite().sum()))
        threshold = finite[count - 1] if count else finite.new_tensor(0.0)
        self.costs.append(float(threshold))
        return costs <= threshold
