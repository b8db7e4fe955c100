"""What pruning knows about each family of models: how they embed images, and how the engine runs their blocks."""

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import AttentionParts, FusedBlock, why_not_fused
from .hosts import SUPPORTED, find_host
from .vit import Attention, Block, ViT, rotate


class Adapter(Protocol):
    """One model family. Blocks are model.blocks, the last norm model.norm, the rest model.forward_head."""

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N, D) that enter the first block, and the rotary table (patches, C) if there is one."""
        ...


@dataclass(frozen=True)
class ReferenceAdapter:
    """cropr_kernels.models.vit.ViT."""

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
        f"cropr_kernels.ViT, timm VisionTransformer and Eva, {SUPPORTED}. An adapter needs a list of blocks, each "
        "called with the tokens (B, N, D), and to know how many of the first tokens are no patches"
    )


class Anatomy(NamedTuple):
    """What pruning must know of a model, whoever runs its blocks."""

    blocks: Any
    class_token: bool  # whether the head looks at the class token; else at the patches
    num_prefix: int
    dim: int
    patch_size: tuple[int, int]
    grid: tuple[int, int]  # patches in height and width at the model's own image size
    num_classes: int
    hosted: bool  # it runs its blocks itself


def anatomy(model: Any) -> Anatomy:
    """What pruning must know of a model.

    Raises:
        TypeError: its family is not known; the message says what an adapter would need.
        ValueError: the model drops patches itself, or has a rotary table per block.
    """
    host = find_host(model)
    if host is not None:
        return Anatomy(*host, hosted=True)
    find_adapter(model)
    patch = model.patch_embed
    return Anatomy(
        model.blocks,
        pools_class_token(model),
        model.num_prefix_tokens,
        model.embed_dim,
        patch.patch_size,
        getattr(patch, "grid_size", None) or (model.grid, model.grid),
        model.num_classes,
        hosted=False,
    )


def pools_class_token(model: Any) -> bool:
    """Whether the head looks at the class token alone; else it looks at the patches."""
    return getattr(model, "cls_token", None) is not None and _pool(model) in ("token", "")


def reads_class_token(model: Any) -> bool:
    """Whether the head takes the class token and nothing else of what leaves the last block."""
    return _pool(model) == "token"


def averages_patches(model: Any) -> bool:
    """Whether the head pools the patches, and nothing else, by their mean or maximum."""
    return _pool(model) in ("avg", "avgmax", "max") and not getattr(model, "pool_include_prefix", False)


def _pool(model: Any) -> str:
    return model.config.global_pool if isinstance(model, ViT) else getattr(model, "global_pool", "")


def _known(module: str, *names: str) -> tuple[type, ...]:
    """Classes of a module that is already imported: nobody has one of them otherwise."""
    return tuple(cls for name in names if (cls := getattr(sys.modules.get(module), name, None)) is not None)


def _close(attn: Any, heads: Tensor) -> Tensor:
    """Sub-norm, output projection and its dropout, where the attention has them."""
    heads = attn.proj(attn.norm(heads) if hasattr(attn, "norm") else heads)
    return attn.proj_drop(heads) if hasattr(attn, "proj_drop") else heads


def _heads(attn: Any, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in parts)
    return attn.q_norm(q), attn.k_norm(k), v


def _project(attn: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """timm's Attention, EvaAttention and AttentionRope: one matrix, with or without biases of its own, or three."""
    if attn.qkv is None:
        return _heads(attn, (attn.q_proj(h), attn.k_proj(h), attn.v_proj(h)))
    bias = attn.qkv.bias
    if getattr(attn, "q_bias", None) is not None:
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    return _heads(attn, F.linear(h, attn.qkv.weight, bias).chunk(3, dim=-1))


def _turn_reference(attn: Any, heads: Tensor, rope: Tensor, num_prefix: int) -> Tensor:
    return rotate(heads, rope, num_prefix)


def _turn_timm(attn: Any, heads: Tensor, rope: Tensor, num_prefix: int) -> Tensor:
    from timm.layers import apply_rot_embed_cat

    half = getattr(attn, "rotate_half", False)
    return torch.cat([heads[:, :, :num_prefix], apply_rot_embed_cat(heads[:, :, num_prefix:], rope, half=half)], dim=2)


_REFERENCE = AttentionParts(Attention.project, _turn_reference, _close)
_TIMM = AttentionParts(_project, _turn_timm, _close)


def _timm_parts(attn: Any, known: tuple[type, ...]) -> AttentionParts | str:
    if type(attn) not in known:
        return f"attention is {type(attn).__name__}"
    if getattr(attn, "gate", None) is not None:
        return "attention has a gate"
    if getattr(attn, "num_kv_groups", 1) > 1:
        return "attention shares keys between heads"
    return _TIMM


def _layer_scales(block: Any) -> tuple[Tensor | None, Tensor | None]:
    return getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None)


def _eva_scales(block: Any) -> tuple[Tensor | None, Tensor | None]:
    return block.gamma_1, block.gamma_2


def fuse_block(block: nn.Module) -> FusedBlock | str:
    """The block as the engine runs it, or why the engine cannot."""
    if type(block) is Block:
        fused = FusedBlock(block, _layer_scales, _REFERENCE)
    elif type(block) in _known("timm.models.vision_transformer", "Block"):
        known = _known("timm.models.vision_transformer", "Attention")
        fused = FusedBlock(block, _layer_scales, _timm_parts(block.attn, known))
    elif type(block) in _known("timm.models.eva", "EvaBlock"):
        known = _known("timm.models.eva", "EvaAttention") + _known("timm.layers.attention", "AttentionRope")
        if type(block.attn) not in known:
            return f"attention is {type(block.attn).__name__}"
        fused = FusedBlock(block, _eva_scales, _timm_parts(block.attn, known))
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


def take_apart(model: Any) -> list[FusedBlock] | str:
    """All blocks of a model with attention that can weigh tokens, or the first one without, and why."""
    fused = fuse_blocks(model)
    if isinstance(fused, str):
        return fused
    why = [f"block {i}: {block.parts}" for i, block in enumerate(fused) if isinstance(block.parts, str)]
    return why[0] if why else fused
