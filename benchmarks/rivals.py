"""Other ways to reduce tokens, on the reference ViT and at the token counts of a schedule: what Cropr is compared with.

Written to be fast in PyTorch, with this package's selection and gather where they fit.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cropr_kernels.blocks import proportional_attention

ops = torch.ops.cropr


class Rival(nn.Module, ABC):
    """A plain model whose blocks lose tokens: counts[l] are left after block l."""

    def __init__(self, model: Any, counts: Sequence[int]):
        super().__init__()
        self.model, self.counts = model, list(counts)

    @property
    def blocks(self) -> Any:
        return self.model.blocks

    def forward(self, images: Tensor) -> Tensor:
        x, rope = self.model.embed(images)
        if rope is not None:
            raise ValueError(f"{type(self).__name__}: models with rotary positions are not supported")
        return self.model.forward_head(self.model.norm(self.run(x)))

    @abstractmethod
    def run(self, x: Tensor) -> Tensor:
        """Tokens after the last block."""

    def keep(self, layer: int, count: int) -> int:
        """Tokens left after a block that `count` enter."""
        return self.counts[layer] if layer < len(self.counts) else count


class AttentionTopK(Rival):
    """Those stay that the class token attends to most in this block: mean over heads of its row of the softmax."""

    def run(self, x: Tensor) -> Tensor:
        for layer, block in enumerate(self.model.blocks):
            q, k, v = block.attn.project(block.norm1(x))
            x = x + block.ls1(block.attn.mix(q, k, v))
            x = x + block.ls2(block.mlp(block.norm2(x)))
            keep = self.keep(layer, x.shape[1])
            if keep < x.shape[1]:  # SDPA hands out no probabilities: the one row is computed again
                row = (q[:, :, :1] @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
                x = ops.gather(x, ops.select(row.mean(1)[:, 0].float(), keep, self.model.num_prefix_tokens)[0])
        return x


class ToMe(Rival):
    """Token Merging (Bolya et al. 2023): between attention and MLP the most similar even and odd tokens merge in pairs.

    Args:
        proportional: log(size) on the attention logits, as ToMe has it off the shelf.
    """

    def __init__(self, model: Any, counts: Sequence[int], *, proportional: bool = True):
        super().__init__(model, counts)
        self.proportional = proportional

    def run(self, x: Tensor) -> Tensor:
        sizes: Tensor | None = None
        for layer, block in enumerate(self.model.blocks):
            q, k, v = block.attn.project(block.norm1(x))
            log_sizes = sizes.log() if sizes is not None and self.proportional else None
            heads = proportional_attention(q, k, v, log_sizes).transpose(1, 2).flatten(2)
            x = x + block.ls1(block.attn.proj(block.attn.norm(heads)))
            keep = self.keep(layer, x.shape[1])
            if keep < x.shape[1]:
                x, sizes = merge_pairs(x, k.mean(1), sizes, x.shape[1] - keep, self.model.num_prefix_tokens)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return x


def merge_pairs(x: Tensor, metric: Tensor, sizes: Tensor | None, count: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    """One bipartite merge of x (B, N, D): `count` even tokens go into their most similar odd ones.

    Returns:
        Tokens (B, N - count, D), the unmerged even ones before the odd ones, and their sizes, float32.
    """
    metric = F.normalize(metric, dim=-1)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    similarity[:, : (num_prefix + 1) // 2] = -torch.inf  # prefix tokens neither move nor take others in
    similarity[:, :, : num_prefix // 2] = -torch.inf
    best, partner = similarity.max(-1)
    stays, goes = ops.select(-best.float(), best.shape[1] - count, (num_prefix + 1) // 2)
    if sizes is None:
        sizes = x.new_ones(x.shape[:2], dtype=torch.float32)
    mass = x * sizes.unsqueeze(-1).to(x.dtype)
    even, odd = mass[:, ::2], mass[:, 1::2]
    target = partner.gather(1, goes)
    odd = odd.scatter_add(1, target.unsqueeze(-1).expand(-1, -1, x.shape[2]), ops.gather(even, goes))
    odd_sizes = sizes[:, 1::2].scatter_add(1, target, sizes[:, ::2].gather(1, goes))
    sizes = torch.cat([sizes[:, ::2].gather(1, stays), odd_sizes], 1)
    return torch.cat([ops.gather(even, stays), odd], 1) / sizes.unsqueeze(-1).to(x.dtype), sizes
