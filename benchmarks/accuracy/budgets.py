"""Networks whose images keep different numbers of tokens, by any budget."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import cropr_kernels as cropr
from benchmarks.accuracy.equal_flops import Forward
from benchmarks.models.deployment import pruned
from cropr_kernels.models.vit import ViT
from cropr_kernels.pruning.budget import Budget, ThresholdBudget, TotalBudget, quotas
from cropr_kernels.pruning.costs import ImageFlops, matrix_elements
from cropr_kernels.pruning.deployment import deployed_copy
from cropr_kernels.pruning.maps import counts_by_block
from cropr_kernels.pruning.model import modules_of, run
from cropr_kernels.pruning.state import PruningOptions
from cropr_kernels.thresholds import NUM_IMAGES

TOGETHER = 32  # images of "batch of 32"
CAPACITY = f"capacity of {TOGETHER}"
HEADROOM = 1.05  # rows of a batch, over the mean of as many calibration photos
METHODS = ("constant", "thresholds", "same quotas", f"batch of {TOGETHER}", CAPACITY)


class EqualCounts:
    """Merge the cheapest of each image, the quota of each.

    Args:
        rate: R.
        quotas: merges of an image, one a module.
    """

    def __init__(self, rate: float, quotas: Sequence[float]):
        self.rate = rate
        self.totals = [0, *(round(total) for total in itertools.accumulate(quotas))]

    def choose(self, module: int, costs: Tensor) -> Tensor:
        count = self.totals[module + 1] - self.totals[module]
        rank = costs.argsort(dim=1, stable=True).argsort(dim=1)
        return (rank < count) & costs.isfinite()


class Network:
    """A calibrated network on the engine, with any budget.

    Args:
        base: the plain model.
        calibration: photos (B, C, H, W).
    """

    def __init__(self, base: ViT, calibration: Tensor):
        source = cropr.calibrate(pruned(base, rate=8, merge=True), calibration)
        self.model: Any = deployed_copy(source)
        self.flops = ImageFlops(self.model, calibration[:1])
        self.unpruned = self.flops.unpruned
        self.calibration = calibration[:NUM_IMAGES]

    def constant_flops(self, rate: int) -> float:
        """FLOPs of an image at the constant rate."""
        return self(self.calibration[:1], "constant", rate).flops.mean().item()

    def budget(self, method: str, rate: float) -> Budget | None:
        """The budget of a method at a mean rate; None: the counts are constant."""
        modules = modules_of(self.model)
        if method == "constant":
            return None
        if method in ("thresholds", CAPACITY):
            return self._threshold_budget(rate)
        spec = modules.spec
        height, width = modules.config.grid
        tokens = spec.num_prefix + height * width
        # Between two whole rates the schedule is that of the lower one, less the rest
        counts = cropr.Schedule(rate=int(rate)).counts(tokens, len(spec.blocks), spec.num_prefix)
        rest = rate - int(rate)
        exact = [count - rest * (module + 1) for module, count in enumerate(counts)]
        linear = 2 * matrix_elements(spec.blocks[-1]) / (4 * spec.dim)
        make = EqualCounts if method == "same quotas" else TotalBudget
        return make(rate, quotas(rate, exact, tokens, linear))

    def _threshold_budget(self, rate: float) -> Budget:
        """Above the highest calibrated rate thresholds grow as between the last two.

        Raises:
            ValueError: the network has no thresholds.
        """
        thresholds = modules_of(self.model).thresholds
        if thresholds is None or len(thresholds.rates) < 2:
            raise ValueError("adaptive: the network has no thresholds")
        budget = thresholds.at(rate)
        if budget is not None:
            return budget
        share = (rate - thresholds.rates[-1]) / (thresholds.rates[-1] - thresholds.rates[-2])
        last_two = zip(*thresholds.costs[-2:])
        return ThresholdBudget(rate, tuple(b * (b / a) ** share for a, b in last_two))

    def __call__(self, images: Tensor, method: str, rate: float) -> Forward:
        if method == "constant":
            cropr.set_rate(self.model, int(rate))
        result, counts = self._run(images, method, rate)
        if method != CAPACITY:
            return result
        _, calibrated_counts = self._run(self.calibration, method, rate)
        return self.padded(result, counts, HEADROOM * calibrated_counts.mean(0))

    def _run(self, images: Tensor, method: str, rate: float) -> tuple[Forward, Tensor]:
        """Run without padding; also the tokens of each image in each block, (B, blocks) float64."""
        parts = [
            self._forward(batch, self.budget(method, rate)) for batch in images.split(TOGETHER)
        ]
        log_probs, tokens, flops, counts = (torch.cat(values) for values in zip(*parts))
        return Forward(log_probs, tokens, flops), counts

    def padded(self, result: Forward, counts: Tensor, capacity: Tensor) -> Forward:
        """The run with FLOPs of batches whose rows are padded.

        Args:
            result: without padding.
            counts: tokens of each image in each block, (B, blocks) float64.
            capacity: tokens of an image in each block, (blocks,) float64.
        """
        batches = counts.split(TOGETHER)
        most = capacity.clamp_max(counts[0, 0].item())
        weights = torch.tensor(self.flops.weights, dtype=torch.float64)
        padding = []
        for batch in batches:
            missing = most - batch.mean(0)
            fits = bool((missing >= -1e-9).all())
            padding.append((2 * missing * weights).sum() * fits)
        lengths = torch.tensor([len(batch) for batch in batches])
        extra = torch.stack(padding).repeat_interleave(lengths)
        overflows = sum(not bool(value) for value in padding) / len(padding)
        return result._replace(flops=result.flops + extra, overflows=overflows)

    def _forward(self, batch: Tensor, budget: Budget | None) -> tuple[Tensor, ...]:
        """Log-probabilities, tokens, FLOPs and counts of a batch."""
        options = PruningOptions(engine=True, budget=budget, equal_counts=budget is None)
        tokens, state = run(self.model, lambda: self.model.forward_features(batch), options)
        log_probs = self.model.forward_head(tokens).log_softmax(1)
        return log_probs, tokens, self.flops(state), counts_by_block(state).double()
