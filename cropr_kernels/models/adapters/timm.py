"""timm's VisionTransformer (ViT, DeiT, DINOv2, SigLIP, CLIP towers) and Eva (EVA, EVA-02, DINOv3, rotary ViTs)."""

from typing import Any

from torch import Tensor, nn

from .base import BlockParts, EngineRefusal, ModelSpec, known_classes, own_class
from .reference import attend, scales, spec_of

SUPPORTED = "timm VisionTransformer and Eva"


def find(model: Any) -> ModelSpec | None:
    families = known_classes("timm.models.vision_transformer", "VisionTransformer")
    if not any(isinstance(model, family) for family in families + known_classes("timm.models.eva", "Eva")):
        return None
    if not isinstance(getattr(model, "patch_drop", None), nn.Identity | None):
        raise ValueError("cropr.apply: the model already drops patches; create it with patch_drop_rate=0")
    if getattr(model, "rope_mixed", False):
        raise ValueError("cropr.apply: models with a learned rotary table per block (rope_mixed) are not supported")
    return spec_of(model)


def parts(block: Any) -> BlockParts | None:
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
        raise EngineRefusal(f"attention is {type(attn).__name__}")
    if getattr(attn, "gate", None) is not None:
        raise EngineRefusal("attention has a gate")
    if getattr(attn, "num_kv_groups", 1) > 1:
        raise EngineRefusal("attention shares keys between heads")
    if not getattr(attn, "fused_attn", True):
        raise EngineRefusal("attention does not call scaled_dot_product_attention")
    return BlockParts(block, "norm1", "norm2", "attn", attend, factors, ("qkv",))


def _eva_scales(block: Any) -> tuple[Tensor | None, Tensor | None]:
    return block.gamma_1, block.gamma_2
