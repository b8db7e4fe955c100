"""torchvision's VisionTransformer."""

from typing import Protocol

from torch import nn

from .base import BlockParts, ModelSpec, base_class, known_classes
from .parts import AttendMultihead

_MODULE = "torchvision.models.vision_transformer"


class _Encoder(Protocol):
    layers: nn.Sequential
    ln: nn.Module


class _VisionTransformer(Protocol):
    image_size: int
    patch_size: int
    hidden_dim: int
    num_classes: int
    conv_proj: nn.Module
    encoder: _Encoder


def find(model: nn.Module) -> ModelSpec | None:
    if not isinstance(model, known_classes(_MODULE, "VisionTransformer")):
        return None
    vit: _VisionTransformer = model  # type: ignore[assignment]
    blocks = list(vit.encoder.layers)
    num_heads: int = blocks[0].num_heads  # type: ignore[assignment]
    side = vit.image_size // vit.patch_size
    return ModelSpec(
        blocks=blocks,
        projection=vit.conv_proj,
        norm=vit.encoder.ln,
        tower=model,
        num_prefix=1,
        dim=vit.hidden_dim,
        num_heads=num_heads,
        image_shape=(3, vit.image_size, vit.image_size),
        patch_size=(vit.patch_size, vit.patch_size),
        grid=(side, side),
        num_classes=vit.num_classes,
        class_token=True,
        pooling="token",
        returns_tokens=False,
    )


def parts(block: nn.Module) -> BlockParts | None:
    if base_class(block) not in known_classes(_MODULE, "EncoderBlock"):
        return None
    return BlockParts(block, "ln_1", "ln_2", "self_attention", AttendMultihead(), _no_scales)


def _no_scales(block: nn.Module) -> tuple[None, None]:
    return None, None
