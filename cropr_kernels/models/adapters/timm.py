"""timm's VisionTransformer (ViT, DeiT, DINOv2, SigLIP, CLIP towers) and Eva (EVA, EVA-02, DINOv3,
rotary ViTs)."""

from dataclasses import replace

from torch import Tensor, nn

from .base import BlockParts, EngineRefusal, ModelSpec, Scales, base_class, known_classes
from .reference import attend, scales, spec_of

_VIT = "timm.models.vision_transformer"
_EVA = "timm.models.eva"


def find(model: nn.Module) -> ModelSpec | None:
    if not isinstance(model, known_classes(_VIT, "VisionTransformer") + known_classes(_EVA, "Eva")):
        return None
    if not isinstance(getattr(model, "patch_drop", None), nn.Identity | None):
        raise ValueError(
            "cropr.apply: the model already drops patches; create it with patch_drop_rate=0"
        )
    spec = spec_of(model)
    if getattr(model, "rope_mixed", False):
        return replace(
            spec, rotary_heads=True, engine_refusal="a rotary table for each block and head"
        )
    return spec


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
