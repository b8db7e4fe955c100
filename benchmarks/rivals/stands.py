"""Modules that stand where a Cropr module stands, in a model that `cropr.apply` pruned, and split in another way."""

from typing import Any

import torch
from torch import Tensor, nn

import cropr_kernels as cropr

from .network import Given, attention_of
from .selection import random_scores, variance_scores


class Stand(nn.Module):
    """It holds the query of the module it replaces, and may look at the block before it."""

    folded: Tensor

    def __init__(self, query: Tensor, block: Any = None):
        super().__init__()
        self.register_buffer("folded", query)

    def query(self) -> Tensor:
        return self.folded

    def predict(self, x: Tensor, log_sizes: Tensor | None = None) -> tuple[None, None]:
        return None, None


class Random(Stand):
    """Uniformly random tokens stay."""

    def forward(self, x: Tensor, num_keep: int, num_prefix: int = 0, *_: Any) -> cropr.Split:
        return cropr.Split(*torch.ops.cropr.split(x, random_scores(x), num_keep, num_prefix))


class Variance(Stand):
    """Tokens with the highest variance over their channels stay."""

    def forward(self, x: Tensor, num_keep: int, num_prefix: int = 0, *_: Any) -> cropr.Split:
        return cropr.Split(*torch.ops.cropr.split(x, variance_scores(x), num_keep, num_prefix))


class AttentionTopK(Stand):
    """Those stay that the class token attends to most in the block before: its row of the softmax, mean over heads."""

    def __init__(self, query: Tensor, block: Any):
        super().__init__(query, block)
        self.row: Tensor | None = None
        block.register_forward_pre_hook(self.look)

    @torch.no_grad()
    def look(self, block: Any, args: tuple[Tensor, ...]) -> None:
        q, k, _ = block.attn.project(block.norm1(args[0]))
        self.row = attention_of(q[:, :, :1], k, Given())[:, :, 0].mean(1)

    def forward(self, x: Tensor, num_keep: int, num_prefix: int = 0, *_: Any) -> cropr.Split:
        return cropr.Split(*torch.ops.cropr.split(x, self.row, num_keep, num_prefix))
