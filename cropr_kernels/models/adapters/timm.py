"""timm's VisionTransformer (ViT, DeiT, DINOv2, SigLIP, CLIP towers) and Eva (EVA, EVA-02, DINOv3, rotary ViTs)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import Rotary, proportional_attention
from .base import BlockParts, ModelSpec, known_classes, own_class
from .reference import scales

SUPPORTED = "timm VisionTransformer and Eva"


def find(model: Any) -> ModelSpec | None:
    families = known_classes("timm.models.vision_transformer", "VisionTransformer")
    if not any(isinstance(model, family) for family in families + known_classes("timm.models.eva", "Eva")):
        return None
    if not isinstance(getattr(model, "patch_drop", None), nn.Identity | None):
        raise ValueError("cropr.apply: the model already drops patches; create it with patch_drop_rate=0")
    if getattr(model, "rope_mixed", False):
        raise ValueError("cropr.apply: models with a learned rotary table per block (rope_mixed) are not supported")
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


def parts(block: Any) -> BlockParts | str | None:
    kind = own_class(block)
    if kind in known_classes("timm.models.vision_transformer", "Block"):
        known, factors = known_classes("timm.models.vision_transformer", "Attention"), scales
    elif kind in known_classes("timm.models.eva", "EvaBlock"):
        known = known_classes("timm.models.eva", "EvaAttention") + known_classes(
            "timm.layers.attention", "AttentionRope"
        )
        factors = _eva_scales
    else:
        return None
    attn = block.attn
    if type(attn) not in known:
        return f"attention is {type(attn).__name__}"
    if getattr(attn, "gate", None) is not None:
        return "attention has a gate"
    if getattr(attn, "num_kv_groups", 1) > 1:
        return "attention shares keys between heads"
    if not getattr(attn, "fused_attn", True):
        return "attention does not call scaled_dot_product_attention"
    return BlockParts(block, "norm1", "norm2", "attn", attend, factors, ("qkv",))


def attend(attn: Any, h: Tensor, rotary: Rotary | None, log_sizes: Tensor | None) -> Tensor:
    if rotary is None and log_sizes is None:
        return attn(h)
    q, k, v = _project(attn, h)
    if rotary is not None:
        half = getattr(attn, "rotate_half", False)
        rotary.rotate_(q, half=half)
        rotary.rotate_(k, half=half)
    heads = proportional_attention(q.type_as(v), k.type_as(v), v, log_sizes).transpose(1, 2).flatten(2)
    heads = attn.proj(attn.norm(heads) if hasattr(attn, "norm") else heads)
    return attn.proj_drop(heads) if hasattr(attn, "proj_drop") else heads


def _project(attn: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention, EvaAttention and AttentionRope: one matrix, with or without biases of its own, or three."""
    if attn.qkv is None:
        projected: Any = attn.q_proj(h), attn.k_proj(h), attn.v_proj(h)
    else:
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        projected = F.linear(h, attn.qkv.weight, bias).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in projected)
    return attn.q_norm(q), attn.k_norm(k), v


def _eva_scales(block: Any) -> tuple[Tensor | None, Tensor | None]:
    return block.gamma_1, block.gamma_2
