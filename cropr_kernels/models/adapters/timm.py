"""timm's VisionTransformer (ViT, DeiT, DINOv2, SigLIP, CLIP towers), Eva (EVA, EVA-02, DINOv3,
rotary ViTs) and NaFlexVit."""

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..patch_inputs import PatchInputs
from .base import BlockParts, EngineRefusal, ModelSpec, Scales, base_class, known_classes
from .reference import attend, scales, spec_of

_VIT = "timm.models.vision_transformer"
_EVA = "timm.models.eva"
_NAFLEX = "timm.models.naflexvit"


def find(model: nn.Module) -> ModelSpec | None:
    is_naflex = isinstance(model, known_classes(_NAFLEX, "NaFlexVit"))
    families = known_classes(_VIT, "VisionTransformer") + known_classes(_EVA, "Eva")
    if not is_naflex and not isinstance(model, families):
        return None
    if not isinstance(getattr(model, "patch_drop", None), nn.Identity | None):
        raise ValueError(
            "cropr.apply: the model already drops patches; create it with patch_drop_rate=0"
        )
    spec = _spec_of_naflex(model) if is_naflex else spec_of(model)
    if getattr(model, "rope_mixed", False) or getattr(model, "rope_is_mixed", False):
        return replace(
            spec, rotary_heads=True, engine_refusal="a rotary table for each block and head"
        )
    return spec


class _Embedding(NamedTuple):
    """The patch embedding of a NaFlexVit, at the size that its configuration names."""

    proj: nn.Module  # returns tokens and their grid
    img_size: tuple[int, int]
    grid_size: tuple[int, int]


def _spec_of_naflex(model: nn.Module) -> ModelSpec:
    embeds: Any = model.embeds
    config = getattr(model, "pretrained_cfg", None) or {}
    height, width = embeds.default_img_size or config.get("input_size", (3, 224, 224))[-2:]
    grid = (height // embeds.patch_size[0], width // embeds.patch_size[1])
    spec = spec_of(model, _Embedding(embeds, (height, width), grid))
    return replace(
        spec,
        class_token=embeds.cls_token is not None and model.global_pool in ("token", ""),
        patch_inputs=PatchInputs(
            patches="patches",
            mask="patch_valid",
            places="patch_coord",
            arguments=("patches", "patch_coord", "patch_valid"),
            run=_run_patches,
        ),
    )


def _run_patches(model: nn.Module, patches: Tensor, patch_coord: Tensor) -> object:
    """Run a NaFlexVit on patches that are all valid, without a mask."""
    naflex: Any = model
    features = naflex.forward_features(patches, patch_coord=patch_coord)
    return naflex.forward_head(features["patches"])


def parts(block: nn.Module) -> BlockParts | None:
    cls = base_class(block)
    if cls in known_classes(_VIT, "Block"):
        attentions = known_classes(_VIT, "Attention")
        block_scales: Scales = scales
    elif cls in known_classes(_EVA, "EvaBlock"):
        attentions = known_classes(_EVA, "EvaAttention") + known_classes(
            "timm.layers.attention", "AttentionRope"
        )
        block_scales = _eva_scales
    else:
        return None
    attn = block.attn
    if type(attn) not in attentions:
        raise EngineRefusal(f"attention is {type(attn).__name__}")
    if getattr(attn, "gate", None) is not None:
        raise EngineRefusal("attention has a gate")
    if getattr(attn, "num_kv_groups", 1) > 1:
        raise EngineRefusal("attention shares keys between heads")
    if not getattr(attn, "fused_attn", True):
        raise EngineRefusal("attention does not call scaled_dot_product_attention")
    return BlockParts(block, "norm1", "norm2", "attn", attend, block_scales, opened=("qkv",))


def _eva_scales(block: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    return block.gamma_1, block.gamma_2  # type: ignore[return-value]
