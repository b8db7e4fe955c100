"""Other methods on the evidence of `adaptive`, at the mean FLOPs of the constant rate of merging.

python -m benchmarks.accuracy.adaptive_rivals --data FOLDER [--seeds 0 1 2] [--rates 4 8 12 15]
[--methods ...]

Photos, seeds and goals are those of `adaptive`; what a method calibrates it finds on the photos
that thresholds are found on, in the reduced network itself. Images go through the network one by
one. An interrupted run resumes.

Methods, in their adaptive form where they have one:
  ATM                 a threshold of each layer
  AdaMerge            counts by the image's similarity, against its mean over calibration photos
  ATS                 equally many samples in each block, of which a token may take several
  Token Transforming  equal counts, after blocks 4, 7 and 10
  dropping            equal counts, by calibrated queries
  dropping by thresholds
"""

from typing import Any

import torch
from torch import Tensor

import cropr_kernels as cropr
from benchmarks.accuracy.agreement import calibrated, log_probabilities
from benchmarks.accuracy.equal_flops import Forward, compare, parse_options
from benchmarks.baselines.adaptive import AdaMerge, AdaptiveATM, ImageByImage, ThresholdDrop
from benchmarks.baselines.network import Reducer
from benchmarks.baselines.selection import ATS
from benchmarks.baselines.transforming import TokenTransforming
from benchmarks.models.deployment import deploy, pruned
from cropr_kernels.models.vit import ViT
from cropr_kernels.pruning.costs import ImageFlops, matrix_elements
from cropr_kernels.thresholds import NUM_IMAGES

# Method -> rate to begin with, over R of the constant rate
START = {
    "ATM": 1.05,
    "AdaMerge": 0.96,
    "ATS": 0.45,
    "Token Transforming": 1.0,
    "dropping": 1.0,
    "dropping by thresholds": 1.2,
}
METHODS = tuple(START)
STAGES = 3  # of Token Transforming: after blocks 4, 7 and 10 of 12


class Rivals:
    """Every method on the photos of one seed.

    Args:
        base: the plain model.
        calibration: photos (B, C, H, W).
    """

    def __init__(self, base: ViT, calibration: Tensor):
        self.base = base
        self.calibration = calibration[:NUM_IMAGES]
        self.unpruned = ImageFlops(pruned(base, rate=8), calibration[:1]).unpruned
        self.tokens = base.num_prefix_tokens + base.grid**2
        self.dropping = calibrated(base, calibration)

    def constant_flops(self, rate: int) -> float:
        """FLOPs of an image at the constant rate, in the blocks' matrices and attention."""
        counts = cropr.Schedule(rate=rate).counts(
            self.tokens, len(self.base.blocks), self.base.num_prefix_tokens
        )
        weights = matrix_elements(self.base.blocks[0])
        attention = 4 * self.base.embed_dim
        saved = sum(
            2 * weights * (self.tokens - count) + attention * (self.tokens**2 - count**2)
            for count in counts
        )
        return self.unpruned - saved

    def network(self, method: str, rate: float) -> ImageByImage:
        """A method at a rate: the higher, the fewer FLOPs."""
        blocks: Any = self.base.blocks
        patches = self.base.grid**2
        prefix = self.base.num_prefix_tokens
        places = range(len(blocks) - 1)
        if method == "AdaMerge":
            merging = [AdaMerge(block.norm1) for block in blocks]
            return ImageByImage(self.base, merging, [], before=True)
        if method == "ATM":
            return ImageByImage(self.base, [AdaptiveATM() for _ in places], [])
        if method == "ATS":
            samples = prefix + round(8 * patches / rate)
            return ImageByImage(
                self.base, [ATS(trim=True) for _ in places], [samples for _ in places]
            )
        if method == "Token Transforming":
            stages = [len(blocks) * stage // (STAGES + 1) for stage in range(1, STAGES + 1)]
            kept = [sum(stage <= place for stage in stages) for place in places]
            counts = [
                prefix + round(patches * (1 - rate / 42) ** reductions) for reductions in kept
            ]
            reducers: list[Reducer | None] = [
                TokenTransforming() if place in stages else None for place in places
            ]
            return ImageByImage(self.base, reducers, counts)
        queries = [module.query() for module in self.dropping.cropr]
        return ImageByImage(self.base, [ThresholdDrop(query) for query in queries], [])

    def __call__(self, images: Tensor, method: str, rate: float) -> Forward:
        if method == "dropping":
            fast = cropr.set_rate(deploy(self.dropping, self.base), int(rate))
            flops = torch.full((len(images),), self.constant_flops(int(rate)), dtype=torch.float64)
            return Forward(log_probabilities(fast, images), None, flops)
        network = self.network(method, rate)
        network.fit(self.calibration, rate)
        logits, tokens, saved = network(images)
        complete = [x for x in tokens if x is not None]
        return Forward(
            logits.log_softmax(1),
            torch.cat(complete) if len(complete) == len(tokens) else None,
            self.unpruned - saved,
        )


def main() -> None:
    compare(parse_options(__doc__, METHODS, "adaptive_rivals.json"), Rivals, START)


if __name__ == "__main__":
    main()
