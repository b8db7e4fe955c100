"""The number of tokens that each image loses: as many as cost less than a threshold.

A constant rate takes equally many tokens from a photo of a plane in the sky and from one of a
crowded market. Here a module merges the candidates of an image whose cost is below the module's
threshold. Thresholds are found without labels, on photos that go through the pruned model together:
at each module the quota times the number of photos cheapest merges of them all take place, and the
cost of the last is the threshold. Quotas are lower in the first modules at low rates, and such that
the mean counts take the FLOPs of the constant rate. So a rate is a mean over photos, and a photo
does not depend on those beside it.

A candidate of size s and standardised score z, with cosine n to its target, costs

    c (mean of c over the image's candidates)^0.5,  c = max(1 - n, 0) exp(COST_WEIGHT z) s^0.5

The second factor keeps more of images whose merges are dear. Measured: docs/comparison.md.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

# An image has this multiple of the rate of candidates in a module, and may lose them all
MOST = 4
# Of scores, as in `merging`, where each image has its own counts
COST_WEIGHT = 0.4
EARLY = 3  # modules of a lower quota
_EARLY_SHARE = 0.6  # of the quota of later ones, at low rates; at high ones quotas are equal


class Budget(Protocol):
    """The choice of the candidates that merge."""

    @property
    def rate(self) -> float:
        """R, tokens that an image loses in a module on average."""

    def choose(self, module: int, costs: Tensor) -> Tensor:
        """Choose the candidates that merge.

        Args:
            module: the index of the module.
            costs: (B, C), inf where an image has fewer candidates.

        Returns:
            (B, C) bool, False where the cost is inf.
        """


def costs_of_images(costs: Tensor) -> Tensor:
    """Multiply costs (B, C), inf where there is no candidate, by the root of their image's mean.

    NaN instead of inf in images without a candidate, or whose candidates cost nothing.
    """
    exists = costs < math.inf
    mean = costs.where(exists, 0.0).sum(1, keepdim=True) / exists.sum(1, keepdim=True)
    return costs * mean.sqrt()


def quotas(rate: float, counts: Sequence[float], num_tokens: int, linear: float) -> list[float]:
    """The merges of each module, whose counts of tokens take the FLOPs of constant ones.

    Args:
        rate: R.
        counts: tokens after each module at the constant rate.
        num_tokens: N.
        linear: FLOPs of a block that are linear in its n tokens, of those that are n^2, for n = 1.
    """
    share_merged = 1 - counts[-1] / num_tokens
    early = min(1.0, max(_EARLY_SHARE, 2 * share_merged - 0.3))  # measured: docs/comparison.md
    shares = [early if module < EARLY else 1.0 for module in range(len(counts))]
    goal = sum(linear * count + count**2 for count in counts)
    low, high = 0.0, 2.0 / _EARLY_SHARE
    for _ in range(40):
        factor = (low + high) / 2
        merged = itertools.accumulate(share * factor * rate for share in shares)
        remaining = [max(num_tokens - total, 0.0) for total in merged]
        too_many = sum(linear * count + count**2 for count in remaining) > goal
        low, high = (factor, high) if too_many else (low, factor)
    return [share * low * rate for share in shares]


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
        """The budget of a rate, between two rates the geometric mean of their costs by distance,
        which grow faster than rates; None above the highest."""
        zeros = (0.0,) * len(self.costs[0])
        rows = [(0.0, zeros), *zip(self.rates, self.costs)]
        for (low, low_costs), (high, high_costs) in itertools.pairwise(rows):
            if rate <= high:
                share = (rate - low) / (high - low)
                costs = tuple(
                    a ** (1 - share) * b**share if a > 0 else share * b
                    for a, b in zip(low_costs, high_costs)
                )
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
        return costs_of_images(costs) <= self.costs[module]


class TotalBudget:
    """Merge the cheapest of a batch, the quota times the number of images, and note what the last
    costs.

    Args:
        rate: R.
        quotas: merges of an image on average, one a module.
    """

    def __init__(self, rate: float, quotas: Sequence[float]):
        self.rate = rate
        self.quotas = quotas
        self.costs: list[float] = []  # one a module

    def choose(self, module: int, costs: Tensor) -> Tensor:
        count = round(self.quotas[module] * len(costs))
        costs = costs_of_images(costs)
        finite = costs.flatten().sort().values
        count = min(count, int(finite.isfinite().sum()))
        threshold = finite[count - 1] if count else finite.new_tensor(0.0)
        self.costs.append(float(threshold))
        return costs <= threshold
