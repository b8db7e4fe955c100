"""`cropr_kernels.ViT`."""

from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import Rotary, attention_by_projection, pads_projection, project_heads, proportional_attention
from ..vit import Block, ViT
from .base import BlockParts, ModelSpec, own_class

SUPPORTED = "cropr_kernels.ViT"


def find(model: Any) -> ModelSpec | None:
    return spec_of(model) if isinstance(model, ViT) else None


def spec_of(model: Any) -> ModelSpec:
    """The specification of a model with timm's attributes."""
    pool = model.global_pool
    averages = pool in ("avg", "avgmax", "max") and not getattr(model, "pool_include_prefix", False)
    return ModelSpec(
        blocks=list(model.blocks),
        projection=model.patch_embed.proj,
        norm=model.norm,
        tower=model,
        num_prefix=model.num_prefix_tokens,
        dim=model.embed_dim,
        num_heads=model.blocks[0].attn.num_heads,
        patch_size=model.patch_embed.patch_size,
        grid=model.patch_embed.grid_size,
        num_classes=model.num_classes,
        class_token=getattr(model, "cls_token", None) is not None and pool in ("token", ""),
        pooling="token" if pool == "token" else "average" if averages else "other",
        returns_tokens=pool != "token",
    )


def parts(block: Any) -> BlockParts | None:
    if own_class(block) is not Block:
        return None
    return BlockParts(block, "norm1", "norm2", "attn", attend, scales, ("qkv",))


def attend(attn: Any, h: Tensor, rotary: Rotary | None, log_sizes: Tensor | None) -> Tensor:
    """The update of an attention with timm's names; it is opened only where its heads are needed."""
    if rotary is None and log_sizes is None:
        return attn(h)
    if rotary is None and log_sizes is not None and pads_projection(attn, h):
        heads = attention_by_projection(attn, h, log_sizes)
    else:
        q, k, v = project_heads(attn, h)
        if rotary is not None:
            half = getattr(attn, "rotate_half", False)
            rotary.rotate_(q, half=half)
            rotary.rotate_(k, half=half)
        heads = proportional_attention(q.type_as(v), k.type_as(v), v, log_sizes)
    heads = heads.transpose(1, 2).flatten(2)
    heads = attn.proj(attn.norm(heads) if hasattr(attn, "norm") else heads)
    return attn.proj_drop(heads) if hasattr(attn, "proj_drop") else heads


def scales(block: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """LayerScale's factors, where there are any: timm's blocks name them alike."""
    return getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None)
