"""How known models embed images: the little that pruning has to know about each family."""

import sys
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from .vit import ViT


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
