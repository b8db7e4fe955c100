"""FLOPs of each image of a batch whose images keep different numbers of tokens."""

import torch
from torch import Tensor, nn

from ..utils.flops import flop_counter
from .maps import counts_by_block
from .model import modules_of, run
from .state import PruningOptions, PruningState


def matrix_elements(block: nn.Module) -> int:
    """The elements of a block's matrices, each of which multiplies every token once."""
    return sum(parameter.numel() for parameter in block.parameters() if parameter.ndim == 2)


class ImageFlops:
    """FLOPs of a forward, by image: those of the unpruned model, without what blocks save.

    A block of n tokens takes 2 n times its matrices' elements, and 4 n^2 D in its attention. The
    choice of tokens, below 1 %, is not counted.

    Args:
        model: pruned by `apply`.
        images: (1, C, H, W), of the size to count.
    """

    def __init__(self, model: nn.Module, images: Tensor):
        self.modules = modules_of(model)
        spec = self.modules.spec
        with torch.no_grad(), flop_counter() as counter:
            run(model, lambda: spec.run(images), PruningOptions(observe=lambda layer, x: None))
        self.unpruned = counter.get_total_flops()
        self.weights = [matrix_elements(block) for block in spec.blocks]

    def __call__(self, state: PruningState) -> Tensor:
        """The FLOPs of each image of the batch that went through, (B,) float64."""
        counts = counts_by_block(state).double()
        weights = torch.tensor(self.weights, dtype=torch.float64, device=counts.device)
        saved = 2 * (state.num_tokens - counts) * weights
        saved += 4 * (state.num_tokens**2 - counts**2) * self.modules.spec.dim
        return self.unpruned - saved.sum(1)
