"""Token Transforming: each kept token is a mean of many, and each token a part of many means."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.matching import sizes_of, unit_keys
from benchmarks.baselines.network import Context, Reducer, Reduction, gather_rows

ops = torch.ops.cropr


class TokenTransforming(Reducer):
    """Multiply the patches with a matrix W (K, N): x' = W x, rows of W add up to 1.

    The K patches that the class token attends to most are the informative ones. Every patch divides
    itself among them by the softmax of cosine / temperature, with the cosine of the keys, and W is
    its parts times its size, relative to the sum over patches, which is the new size. Source: Zeng
    et al. 2025 (arXiv 2506.05709), of which we could read the abstract and the figures' captions,
    and no code: from it come the matrix, many to many, and that no training is needed. How tokens
    are chosen and weighted is ours. Temperature 0 is merging into the most similar.

    Args:
        temperature: of the softmax; 0.003 had the least divergence on other photos of 0.003 to 0.1.
    """

    needs = frozenset({"class row", "keys"})
    insertion_point = "attention"

    def __init__(self, temperature: float = 0.003):
        super().__init__()
        self.temperature = temperature

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        if num_keep == x.shape[1]:
            return Reduction(x, sizes=context.sizes)
        row = context.require("class_row").mean(1)
        kept_idx, _ = ops.select(row.detach().float(), num_keep, num_prefix)
        keys = unit_keys(context, num_prefix)
        informative = gather_rows(keys, kept_idx[:, num_prefix:] - num_prefix)
        share = (keys @ informative.transpose(1, 2) / self.temperature).softmax(2)
        mass = share * sizes_of(x, context)[:, num_prefix:, None]
        sizes = mass.sum(1)
        weights = (mass / sizes.unsqueeze(1)).transpose(1, 2)
        tokens = ops.gather(x, kept_idx).clone()
        tokens[:, num_prefix:] = weights.to(x.dtype) @ x[:, num_prefix:]
        return Reduction(
            tokens,
            weights=weights,
            sizes=F.pad(sizes, (num_prefix, 0), value=1.0),
            position_idx=kept_idx,
        )
