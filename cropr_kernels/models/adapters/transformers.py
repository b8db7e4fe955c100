"""Hugging Face ViT, ViT-MAE, DINOv2, DINOv3, SigLIP and CLIP vision models, with or without their heads."""

import inspect
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from ..blocks import Rotary, SizeWeightedAttention
from .base import BlockParts, EngineRefusal, ModelSpec, base_class, known_classes, pair

SUPPORTED = "transformers ViT, ViT-MAE, DINOv2 (with registers), DINOv3, SigLIP and CLIP vision"


@dataclass(frozen=True)
class Family:
    """One family of models, which transformers defines in one module."""

    name: str
    block: str  # classes of that module
    norm1: str  # modules of a block
    norm2: str
    attn: str
    class_token: bool = True
    classifier_pooling: Literal["token", "average"] = "token"
    pooling_head: str = ""  # class of a head that attends to the tokens
    map_model: str = ""  # class whose head puts all patches back to where they were
    backbone: str = ""  # class that returns the maps of several blocks
    refusal: str | None = None

    def classes(self, name: str) -> tuple[type, ...]:
        """Return the named class, or nothing if its module is not imported."""
        return known_classes(f"transformers.models.{self.name}.modeling_{self.name}", name)


_BEFORE_AFTER = ("layernorm_before", "layernorm_after", "attention")
_NORM_1_2 = ("norm1", "norm2", "attention")
_LAYER_NORM_1_2 = ("layer_norm1", "layer_norm2", "self_attn")
FAMILIES = (
    Family("vit", "ViTLayer", *_BEFORE_AFTER, map_model="ViTForMaskedImageModeling"),
    Family("vit_mae", "ViTMAELayer", *_BEFORE_AFTER, map_model="ViTMAEForPreTraining", refusal="it shuffles patches"),
    Family("dinov2", "Dinov2Layer", *_NORM_1_2, classifier_pooling="average", backbone="Dinov2Backbone"),
    Family(
        "dinov2_with_registers",
        "Dinov2WithRegistersLayer",
        *_NORM_1_2,
        classifier_pooling="average",
        backbone="Dinov2WithRegistersBackbone",
    ),
    Family("dinov3_vit", "DINOv3ViTLayer", *_NORM_1_2, backbone="DINOv3ViTBackbone"),
    Family(
        "siglip",
        "SiglipEncoderLayer",
        *_LAYER_NORM_1_2,
        class_token=False,
        classifier_pooling="average",
        pooling_head="SiglipMultiheadAttentionPoolingHead",
    ),
    Family("clip", "CLIPEncoderLayer", *_LAYER_NORM_1_2),
)
_LAST_NORMS = ("layernorm", "norm", "post_layernorm")


def _family_of(block: nn.Module) -> Family | None:
    return next((family for family in FAMILIES if isinstance(block, family.classes(family.block))), None)


def find(model: nn.Module) -> ModelSpec | None:
    stacks = _stacks_of_blocks(model)
    if not stacks:
        return None
    if len(stacks) > 1:  # text and vision towers have blocks of one class
        stacks = {path: stack for path, stack in stacks.items() if "vision" in path}
    if len(stacks) != 1:
        raise TypeError(
            f"cropr.apply: {type(model).__name__} has {len(stacks)} vision towers; give cropr.apply the one to prune"
        )
    if not hasattr(type(model), "main_input_name"):  # a module around a Hugging Face model, such as that of peft
        return None
    [(path, stack)] = stacks.items()
    blocks = list(stack)
    family = cast(Family, _family_of(blocks[0]))
    if isinstance(model, family.classes(family.backbone)):
        raise ValueError(
            f"cropr.apply: {type(model).__name__} returns maps of several blocks, which pruned blocks do not have; "
            "take the model without Backbone in its name"
        )
    return _spec_of(model, family, path, blocks)


def _stacks_of_blocks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Find the encoders of a model: lists of blocks of known families, by their path."""
    stacks = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or path.split(".")[-1].startswith("decoder"):
            continue
        if len(module) and all(_family_of(block) is not None for block in module):
            stacks[path] = module
    return stacks


def _spec_of(model: nn.Module, family: Family, path: str, blocks: list[nn.Module]) -> ModelSpec:
    hf_model: Any = model
    config = getattr(hf_model.config, "vision_config", hf_model.config)
    parents = [path.rsplit(".", levels)[0] for levels in range(path.count("."), 0, -1)]
    owners = [model, *map(model.get_submodule, parents)]  # the modules around the blocks, from the outermost
    tower = model
    if hf_model.main_input_name != "pixel_values":  # a model with text too: the innermost that embeds images
        tower = [owner for owner in owners if _convolutions(owner)][-1]
    norms = [getattr(owner, name, None) for owner in reversed(owners) for name in _LAST_NORMS]
    classifies = hasattr(model, "classifier")
    has_pooling_head = any(isinstance(module, family.classes(family.pooling_head)) for module in tower.modules())
    image = pair(config.image_size)
    patch = pair(config.patch_size)
    return ModelSpec(
        blocks=blocks,
        projection=_convolutions(tower)[0],
        norm=next(norm for norm in norms if norm is not None),
        tower=tower,
        num_prefix=int(family.class_token) + getattr(config, "num_register_tokens", 0),
        dim=config.hidden_size,
        num_heads=config.num_attention_heads,
        patch_size=patch,
        grid=(image[0] // patch[0], image[1] // patch[1]),
        num_classes=hf_model.config.num_labels if classifies else 0,
        class_token=family.class_token,
        pooling=family.classifier_pooling if classifies else "other" if has_pooling_head else "token",
        returns_tokens=True,
        needs_map=isinstance(model, family.classes(family.map_model)),
        refusal=family.refusal,
    )


def _convolutions(module: nn.Module) -> list[nn.Module]:
    return [submodule for submodule in module.modules() if isinstance(submodule, nn.Conv2d)]


def parts(block: nn.Module) -> BlockParts | None:
    family = _family_of(block)
    cls = base_class(block)
    if family is None or cls not in family.classes(family.block):
        return None
    # Blocks of older versions return tuples.
    if not hasattr(block, "mlp") or "uple" in str(inspect.signature(cls.forward).return_annotation):
        raise EngineRefusal(f"{cls.__name__} of this transformers version has another structure")
    attn = getattr(block, family.attn)
    if not (hasattr(attn, "o_proj") or hasattr(attn, "out_proj")):
        raise EngineRefusal(f"the attention of {cls.__name__} in this transformers version has another structure")
    return BlockParts(block, family.norm1, family.norm2, family.attn, _attend, _scales)


def _attend(attn: nn.Module, h: Tensor, rotary: Rotary | None, log_sizes: Tensor | None) -> Tensor:
    tables = {} if rotary is None else {"position_embeddings": rotary.rows()}
    with SizeWeightedAttention.maybe(log_sizes):
        return attn(h, attention_mask=None, **tables)[0]


def _scales(block: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    scale1 = getattr(block, "layer_scale1", None)
    if scale1 is None:
        return None, None
    return scale1.lambda1, block.layer_scale2.lambda1  # type: ignore[return-value, union-attr]
