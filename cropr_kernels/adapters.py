"""How known models embed images, and how the engine runs their blocks: what pruning knows about each family."""

import sys
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .engine import FusedBlock, Rotary, why_not_fused
from .stream import rope_at
from .vit import Block, ViT


class Adapter(Protocol):
    """One model family. Blocks are model.blocks, the last norm model.norm, the rest model.forward_head."""

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N, D) that enter the first block, and the rotary table (patches, C) if there is one."""
        ...


@dataclass(frozen=True)
class ReferenceAdapter:
    """cropr_kernels.vit.ViT."""

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return model.embed(images)


@dataclass(frozen=True)
class TimmViTAdapter:
    """timm.models.vision_transformer.VisionTransformer: ViT, DeiT, DINOv2, SigLIP, CLIP towers."""

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return model.norm_pre(model._pos_embed(model.patch_embed(images))), None


@dataclass(frozen=True)
class TimmEvaAdapter:
    """timm.models.eva.Eva: EVA, EVA-02, DINOv3 and others with rotary positions."""

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x, rope = model._pos_embed(model.patch_embed(images))
        return model.norm_pre(x), rope


def find_adapter(model: nn.Module) -> Adapter:
    """Return the adapter of a model's family.

    Raises:
        TypeError: no adapter knows the model; the message says what one would need.
        ValueError: the model drops patches itself, or has a rotary table per block.
    """
    if isinstance(model, ViT):
        return ReferenceAdapter()
    for module, name, adapter in (
        ("timm.models.vision_transformer", "VisionTransformer", TimmViTAdapter()),
        ("timm.models.eva", "Eva", TimmEvaAdapter()),
    ):
        family = getattr(sys.modules.get(module), name, None)
        if family is None or not isinstance(model, family):
            continue
        if not isinstance(getattr(model, "patch_drop", None), nn.Identity | None):
            raise ValueError("cropr.apply: the model already drops patches; create it with patch_drop_rate=0")
        if getattr(model, "rope_mixed", False):
            raise ValueError("cropr.apply: models with a learned rotary table per block (rope_mixed) are not supported")
        return adapter
    raise TypeError(
        f"cropr.apply: no adapter for {type(model).__module__}.{type(model).__name__}; supported are "
        "cropr_kernels.vit.ViT, timm VisionTransformer and timm Eva. An adapter needs the tokens that enter the "
        "first block, a list of blocks called as block(x), and the norm and head that follow the last"
    )


def pools_class_token(model: Any) -> bool:
    """Whether the head looks at the class token alone; else it looks at the patches."""
    pool = model.config.global_pool if isinstance(model, ViT) else getattr(model, "global_pool", "")
    return getattr(model, "cls_token", None) is not None and pool in ("token", "")


def _known(module: str, *names: str) -> tuple[type, ...]:
    """Classes of a module that is already imported: nobody has one of them otherwise."""
    return tuple(cls for name in names if (cls := getattr(sys.modules.get(module), name, None)) is not None)


def _plain_attention(attn: Any, h: Tensor, rotary: Rotary | None) -> Tensor:
    return attn(h)


def _reference_attention(attn: Any, h: Tensor, rotary: Rotary | None) -> Tensor:
    q, k, v = attn.project(h)
    if rotary is not None:
        rotary.rotate_(q)
        rotary.rotate_(k)
    return attn.mix(q, k, v)


def _eva_attention(attn: Any, h: Tensor, rotary: Rotary | None) -> Tensor:
    """timm's EvaAttention and AttentionRope, with q and k turned in place by position."""
    if rotary is None:
        return attn(h)
    if getattr(attn, "gate", None) is not None or getattr(attn, "num_kv_groups", 1) > 1:
        table = rotary.table
        return attn(h, rope=table if rotary.idx is None else rope_at(table, rotary.idx, rotary.num_prefix))
    if attn.qkv is not None:
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        parts: tuple[Tensor, ...] = F.linear(h, attn.qkv.weight, bias).chunk(3, dim=-1)
    else:
        parts = (attn.q_proj(h), attn.k_proj(h), attn.v_proj(h))
    q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in parts)
    q, k = attn.q_norm(q), attn.k_norm(k)
    half = getattr(attn, "rotate_half", False)
    rotary.rotate_(q, half=half)
    rotary.rotate_(k, half=half)
    out = F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v).transpose(1, 2).flatten(2)
    return attn.proj(attn.norm(out))


def _layer_scales(block: Any) -> tuple[Tensor | None, Tensor | None]:
    return getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None)


def _eva_scales(block: Any) -> tuple[Tensor | None, Tensor | None]:
    return block.gamma_1, block.gamma_2


def fuse_block(block: nn.Module) -> FusedBlock | str:
    """The block as the engine runs it, or why the engine cannot."""
    if type(block) is Block:
        fused = FusedBlock(block, _reference_attention, _layer_scales)
    elif type(block) in _known("timm.models.vision_transformer", "Block"):
        fused = FusedBlock(block, _plain_attention, _layer_scales)
    elif type(block) in _known("timm.models.eva", "EvaBlock"):
        attention = getattr(block, "attn", None)
        known = _known("timm.models.eva", "EvaAttention") + _known("timm.layers.attention", "AttentionRope")
        if type(attention) not in known:
            return f"attention is {type(attention).__name__}"
        fused = FusedBlock(block, _eva_attention, _eva_scales)
    else:
        return f"{type(block).__module__}.{type(block).__name__} is not a block it knows"
    return why_not_fused(block) or fused


def fuse_blocks(model: Any) -> list[FusedBlock] | str:
    """All blocks of a model as the engine runs them, or the first one that it cannot run, and why."""
    fused: list[FusedBlock] = []
    for layer, block in enumerate(model.blocks):
        one = fuse_block(block)
        if isinstance(one, str):
            return f"block {layer}: {one}"
        fused.append(one)
    return fused
