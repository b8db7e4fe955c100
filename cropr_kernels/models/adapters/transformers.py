"""transformers' ViT, ViT-MAE, DINOv2, DINOv3, SigLIP and CLIP vision models, with or without their heads."""

import inspect
from typing import Any

from torch import Tensor, nn

from ..blocks import Rotary, SizeWeightedAttention
from .base import BlockParts, EngineRefusal, ModelSpec, known_classes, own_class, pair

SUPPORTED = "transformers ViT, ViT-MAE, DINOv2 (with registers), DINOv3, SigLIP and CLIP vision"
# Family and class of the blocks: whether a class token comes first, their norms, and their attention.
_BLOCKS = {
    ("vit", "ViTLayer"): (True, "layernorm_before", "layernorm_after", "attention"),
    ("vit_mae", "ViTMAELayer"): (True, "layernorm_before", "layernorm_after", "attention"),
    ("dinov2", "Dinov2Layer"): (True, "norm1", "norm2", "attention"),
    ("dinov2_with_registers", "Dinov2WithRegistersLayer"): (True, "norm1", "norm2", "attention"),
    ("dinov3_vit", "DINOv3ViTLayer"): (True, "norm1", "norm2", "attention"),
    ("siglip", "SiglipEncoderLayer"): (False, "layer_norm1", "layer_norm2", "self_attn"),
    ("clip", "CLIPEncoderLayer"): (True, "layer_norm1", "layer_norm2", "self_attn"),
}
_NORMS = ("layernorm", "norm", "post_layernorm")


def _known() -> dict[type, tuple[bool, str, str, str]]:
    rows = ((f"transformers.models.{family}.modeling_{family}", name, row) for (family, name), row in _BLOCKS.items())
    return {kind: row for module, name, row in rows for kind in known_classes(module, name)}


def find(model: Any) -> ModelSpec | None:
    known = _known()
    stacks = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
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
    if not hasattr(type(model), "main_input_name"):  # peft passes on what its model has
        return None  # a module around one of transformers
    if type(model).__name__.endswith("Backbone"):
        raise ValueError(
            f"cropr.apply: {type(model).__name__} gives maps of several blocks, which pruned blocks have not; take the "
            "model without Backbone in its name"
        )
    [(path, stack)] = stacks.items()
    blocks: list[Any] = list(stack)
    class_token = known[own_class(blocks[0])][0]
    owners = [model, *(model.get_submodule(".".join(path.split(".")[:i])) for i in range(1, path.count(".") + 1))]
    embeds = [module for module in owners if any(isinstance(part, nn.Conv2d) for part in module.modules())]
    tower = model if model.main_input_name == "pixel_values" else embeds[-1]  # that of a model with text too
    source = getattr(model.config, "vision_config", model.config)
    image, patch = pair(source.image_size), pair(source.patch_size)
    norms = [getattr(module, name) for module in reversed(owners) for name in _NORMS if hasattr(module, name)]
    name = type(model).__name__
    classifies = hasattr(model, "classifier")
    averages = classifies and ("Siglip" in name or "Dinov2" in name)
    attends = not classifies and any(type(module).__name__.endswith("PoolingHead") for module in tower.modules())
    return ModelSpec(
        blocks=blocks,
        projection=next(module for module in tower.modules() if isinstance(module, nn.Conv2d)),
        norm=norms[0],
        tower=tower,
        num_prefix=int(class_token) + getattr(source, "num_register_tokens", 0),
        dim=source.hidden_size,
        num_heads=source.num_attention_heads,
        patch_size=patch,
        grid=(image[0] // patch[0], image[1] // patch[1]),
        num_classes=model.config.num_labels if classifies else 0,
        class_token=class_token,
        pooling="average" if averages else "other" if attends else "token",
        returns_tokens=True,
        needs_map=name.endswith(("ForMaskedImageModeling", "ForPreTraining")),
        refusal="it shuffles patches" if "ViTMAE" in type(blocks[0]).__name__ else None,
    )


def parts(block: Any) -> BlockParts | None:
    row = _known().get(own_class(block))
    if row is None:
        return None
    _, norm1, norm2, attn = row
    kind: Any = own_class(block)
    if not hasattr(block, "mlp") or "uple" in str(inspect.signature(kind.forward).return_annotation):
        raise EngineRefusal(f"{kind.__name__} of this transformers version is built in another way")
    if not (hasattr(getattr(block, attn), "o_proj") or hasattr(getattr(block, attn), "out_proj")):
        raise EngineRefusal(f"the attention of {kind.__name__} in this transformers version is built in another way")
    return BlockParts(block, norm1, norm2, attn, _attend, _scales)


def _attend(attn: Any, h: Tensor, rotary: Rotary | None, log_sizes: Tensor | None) -> Tensor:
    tables = {} if rotary is None else {"position_embeddings": rotary.rows()}
    with SizeWeightedAttention.maybe(log_sizes):
        return attn(h, attention_mask=None, **tables)[0]


def _scales(block: Any) -> tuple[Tensor | None, Tensor | None]:
    if not hasattr(block, "layer_scale1"):
        return None, None
    return block.layer_scale1.lambda1, block.layer_scale2.lambda1
