"""Which transformers and torchvision models can be pruned, and where their blocks are."""

import sys
from typing import Any, NamedTuple

from torch import nn

# Module and class of the blocks; whether a class token comes first.
_BLOCKS = {
    ("transformers.models.vit.modeling_vit", "ViTLayer"): True,
    ("transformers.models.vit_mae.modeling_vit_mae", "ViTMAELayer"): True,
    ("transformers.models.dinov2.modeling_dinov2", "Dinov2Layer"): True,
    ("transformers.models.dinov2_with_registers.modeling_dinov2_with_registers", "Dinov2WithRegistersLayer"): True,
    ("transformers.models.dinov3_vit.modeling_dinov3_vit", "DINOv3ViTLayer"): True,
    ("transformers.models.siglip.modeling_siglip", "SiglipEncoderLayer"): False,
    ("transformers.models.clip.modeling_clip", "CLIPEncoderLayer"): True,
    ("torchvision.models.vision_transformer", "EncoderBlock"): True,
}
SUPPORTED = (
    "transformers ViT, ViT-MAE, DINOv2 (with registers), DINOv3, SigLIP and CLIP vision, torchvision VisionTransformer"
)


class Host(NamedTuple):
    """A model that runs its blocks itself."""

    blocks: list[nn.Module]
    class_token: bool
    num_prefix: int
    dim: int
    patch_size: tuple[int, int]
    grid: tuple[int, int]  # patches at the model's own image size
    num_classes: int  # 0: it has no classifier


def find_host(model: nn.Module) -> Host | None:
    """Where a model's blocks are, or None if it has none that are known.

    Raises:
        TypeError: there are several stacks of blocks, and none or several of them are the vision tower.
    """
    known = {
        family: class_token
        for (module, name), class_token in _BLOCKS.items()
        if (family := getattr(sys.modules.get(module), name, None)) is not None
    }
    stacks = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module)
        and all(isinstance(block, tuple(known)) for block in module)
        and not path.split(".")[-1].startswith("decoder")
    }
    if not stacks:
        return None
    if len(stacks) > 1:  # text and vision towers have blocks of one class
        stacks = {path: module for path, module in stacks.items() if "vision" in path}
    if len(stacks) != 1:
        raise TypeError(
            f"cropr.apply: {type(model).__name__} has {len(stacks)} vision towers; give cropr.apply the one to prune"
        )
    blocks: list[Any] = list(next(iter(stacks.values())))
    class_token = next(value for family, value in known.items() if isinstance(blocks[0], family))
    source: Any = getattr(model, "config", model)  # torchvision keeps such facts on the model
    source = getattr(source, "vision_config", source)
    image, patch = _pair(source.image_size), _pair(source.patch_size)
    return Host(
        blocks,
        class_token,
        int(class_token) + getattr(source, "num_register_tokens", 0),
        source.hidden_dim if hasattr(source, "hidden_dim") else source.hidden_size,
        patch,
        (image[0] // patch[0], image[1] // patch[1]),
        _classes(model),
    )


def shuffles_patches(model: Any) -> bool:
    """Whether the patches enter the first block in an order that is drawn anew for every batch."""
    return any(type(module).__name__ == "ViTMAEEmbeddings" for module in model.modules())


def _classes(model: Any) -> int:
    if hasattr(model, "config"):
        return model.config.num_labels if hasattr(model, "classifier") else 0
    return model.num_classes


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[1]) if isinstance(value, list | tuple) else (value, value)
