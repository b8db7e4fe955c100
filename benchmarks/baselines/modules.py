"""Modules with other criteria in place of the Cropr modules of a pruned model."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import cropr_kernels as cropr
from benchmarks.baselines.network import Context, attention_of
from benchmarks.baselines.prune import published
from benchmarks.baselines.scorers import MultiHeadCropr
from benchmarks.baselines.selection import random_scores, variance_scores
from cropr_kernels.models.blocks import project_heads

ops = torch.ops.cropr


class PruningModule(cropr.Scorer):
    """Holds the query of the Cropr module it replaces; subclasses may use the block before."""

    folded: Tensor

    def __init__(self, module: Any, block: Any = None):
        super().__init__()
        self.register_buffer("folded", module.query())

    def query(self) -> Tensor:
        return self.folded


def replace_modules(
    model: Any, make: Callable[[Any, Any], nn.Module], layers: Sequence[int] | None = None
) -> None:
    """Replace the Cropr modules of `layers` (default: all) by make(module, the block before it)."""
    for layer in range(len(model.cropr)) if layers is None else layers:
        model.cropr[layer] = make(model.cropr[layer], model.blocks[layer])


class Random(PruningModule):
    """Keep uniformly random tokens."""

    def forward(self, x: Tensor, num_keep: int, num_prefix: int = 0, *_: Any) -> cropr.Split:
        return cropr.Split(*ops.split(x, random_scores(x), num_keep, num_prefix))


class Variance(PruningModule):
    """Keep the tokens with the highest variance over their channels."""

    def forward(self, x: Tensor, num_keep: int, num_prefix: int = 0, *_: Any) -> cropr.Split:
        return cropr.Split(*ops.split(x, variance_scores(x), num_keep, num_prefix))


class AttentionTopK(PruningModule):
    """Keep the tokens the class token attends to most in the block before, mean over heads."""

    def __init__(self, module: Any, block: Any):
        super().__init__(module, block)
        self.row: Tensor | None = None
        block.register_forward_pre_hook(self.attend)

    @torch.no_grad()
    def attend(self, block: Any, args: tuple[Tensor, ...]) -> None:
        q, k, _ = project_heads(block.attn, block.norm1(args[0]))
        self.row = attention_of(q[:, :, :1], k, Context())[:, :, 0].mean(1)

    def forward(self, x: Tensor, num_keep: int, num_prefix: int = 0, *_: Any) -> cropr.Split:
        return cropr.Split(*ops.split(x, self.row, num_keep, num_prefix))


class NonSalient(PruningModule):
    """Keep the tokens with the lowest scores of Cropr."""

    def forward(self, x: Tensor, num_keep: int, num_prefix: int = 0, *_: Any) -> cropr.Split:
        return cropr.Split(*ops.prune(x, -self.folded, num_keep, num_prefix))


class Published(PruningModule):
    """Keep Cropr's tokens, by the published sequence of ops."""

    def forward(self, x: Tensor, num_keep: int, num_prefix: int = 0, *_: Any) -> cropr.Split:
        return cropr.Split(*published(x, self.folded.to(x.dtype).unsqueeze(0), num_keep))


class FreeSlice(PruningModule):
    """Keep the first tokens, at no cost: the upper bound of what pruning gains."""

    def forward(self, x: Tensor, num_keep: int, num_prefix: int = 0, *_: Any) -> cropr.Split:
        idx = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        return cropr.Split(x[:, :num_keep], idx[:, :num_keep], x[:, num_keep:], idx[:, num_keep:])


class PublishedMultiHead(PruningModule):
    """Multi-head scorer as published: all tokens are projected to keys, queries are not folded."""

    def __init__(self, module: MultiHeadCropr, block: Any = None):
        super().__init__(module)
        attention = module.aggregator.attention
        self.num_heads = attention.num_heads
        self.k_proj = copy.deepcopy(attention.k_proj)
        self.register_buffer("q", attention.q_proj(module.queries.detach()).detach())

    def forward(self, x: Tensor, num_keep: int, num_prefix: int = 0, *_: Any) -> cropr.Split:
        q, k = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)
            for part in (self.q, self.k_proj(x))
        )
        scores = (q @ k.transpose(2, 3)).sum((1, 2)).float()
        return cropr.Split(*ops.split(x, scores, num_keep, num_prefix))


MODULES: dict[str, type[PruningModule]] = {
    "random": Random,
    "variance": Variance,
    "attention top-k": AttentionTopK,
}
