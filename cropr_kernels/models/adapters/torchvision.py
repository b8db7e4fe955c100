"""torchvision's VisionTransformer."""

from typing import Any

from torch import Tensor

from ..blocks import Rotary, SizeWeightedAttention
from .base import BlockParts, ModelSpec, known_classes, own_class

SUPPORTED = "torchvision VisionTransformer"
_MODULE = "torchvision.models.vision_transformer"


def find(model: Any) -> ModelSpec | None:
    if not any(isinstance(model, family) for family in known_classes(_MODULE, "VisionTransformer")):
        return None
    side = model.image_size // model.patch_size
    return ModelSpec(
        blocks=list(model.encoder.layers),
        projection=model.conv_proj,
        norm=model.encoder.ln,
        tower=model,
        num_prefix=1,
        dim=model.hidden_dim,
        num_heads=model.encoder.layers[0].num_heads,
        patch_size=(model.patch_size, model.patch_size),
        grid=(side, side),
        num_classes=model.num_classes,
        class_token=True,
        pooling="token",
        returns_tokens=False,
    )


def parts(block: Any) -> BlockParts | None:
    if own_class(block) not in known_classes(_MODULE, "EncoderBlock"):
        return None
    return BlockParts(block, "ln_1", "ln_2", "self_attention", _attend, _no_scales)


def _attend(attn: Any, h: Tensor, rotary: Rotary | None, log_sizes: Tensor | None) -> Tensor:
    with SizeWeightedAttention.maybe(log_sizes):
        return attn(h, h, h, need_weights=False)[0]


def _no_scales(block: Any) -> tuple[None, None]:
    return None, None
