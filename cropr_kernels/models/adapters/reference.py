"""`cropr_kernels.ViT`."""

from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import Rotary, proportional_attention
from ..vit import Attention, Block, ViT
from .base import BlockParts, ModelSpec, own_class

SUPPORTED = "cropr_kernels.ViT"


def find(model: Any) -> ModelSpec | None:
    if not isinstance(model, ViT):
        return None
    pools_token = model.config.global_pool == "token"
    return ModelSpec(
        blocks=list(model.blocks),
        projection=model.patch_embed.proj,
        norm=model.norm,
        tower=model,
        num_prefix=model.num_prefix_tokens,
        dim=model.embed_dim,
        num_heads=model.config.num_heads,
        patch_size=model.patch_embed.patch_size,
        grid=(model.grid, model.grid),
        num_classes=model.num_classes,
        class_token=pools_token,
        pooling="token" if pools_token else "average",
        returns_tokens=not pools_token,
    )


def parts(block: Any) -> BlockParts | str | None:
    if own_class(block) is not Block:
        return None
    return BlockParts(block, "norm1", "norm2", "attn", attend, scales, ("qkv",))


def attend(attn: Attention, h: Tensor, rotary: Rotary | None, log_sizes: Tensor | None) -> Tensor:
    if rotary is None and log_sizes is None:
        return attn(h)
    q, k, v = attn.project(h)
    if rotary is not None:
        rotary.rotate_(q)
        rotary.rotate_(k)
    return attn.close(proportional_attention(q.type_as(v), k.type_as(v), v, log_sizes))


def scales(block: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """LayerScale's factors, where there are any: timm's blocks name them alike."""
    return getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None)
