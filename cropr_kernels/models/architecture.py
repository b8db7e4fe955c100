"""Models named and built again: what made a model, as plain values, and whether they make the same one."""

import importlib
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ..utils.optional import import_optional
from .adapters.base import known_classes, own_class
from .vit import ViT, ViTConfig

# What timm's constructors take, and where a model of timm has it.
_TIMM = {
    "num_classes": "num_classes",
    "global_pool": "global_pool",
    "img_size": "patch_embed.img_size",
    "patch_size": "patch_embed.patch_size",
    "in_chans": "patch_embed.proj.in_channels",
    "embed_dim": "embed_dim",
    "depth": "blocks.__len__",
    "num_heads": "blocks.0.attn.num_heads",
    "class_token": "has_class_token",
    "reg_tokens": "num_reg_tokens",
    "no_embed_class": "no_embed_class",
    "dynamic_img_size": "dynamic_img_size",
}
# Of training, of the machine, or what pruning changes.
_FREE = {"training", "p", "drop_prob", "inplace", "scale_by_keep", "grad_checkpointing", "fused_attn", "num_prefix"}
_FREE |= {"num_prefix_tokens", "dropout", "attention_dropout"}


def architecture_of(model: Any) -> dict[str, Any] | None:
    """What makes a model such as this one, for `build`; None where nothing that can be named does.

    Known are `cropr_kernels.ViT`, models that timm made by name, and torchvision's. Dropout and stochastic depth, of
    training alone, are not told apart.
    """
    found: dict[str, Any] | None = None
    families: Any = known_classes("torchvision.models.vision_transformer", "VisionTransformer")
    if isinstance(model, ViT):
        found = {"library": "cropr_kernels", "options": asdict(model.config)}
    elif isinstance(model, families):
        names = ("image_size", "patch_size", "hidden_dim", "mlp_dim", "num_classes", "representation_size")
        layers = model.encoder.layers
        options = {name: getattr(model, name) for name in names}
        options |= {"num_layers": len(layers), "num_heads": layers[0].num_heads}
        found = {"library": "torchvision", "options": options}
    elif (getattr(model, "pretrained_cfg", None) or {}).get("architecture"):
        about = {key: value for key, value in model.pretrained_cfg.items() if _is_plain(value)}
        found = {"library": "timm", "name": about["architecture"], "options": {}, "pretrained_cfg": about}
    if found is None:
        return None
    with torch.device("meta"):
        if found["library"] == "timm":
            plain = build(found)
            pairs = {name: (_look(plain, path), _look(model, path)) for name, path in _TIMM.items()}
            found["options"] = {name: own for name, (default, own) in pairs.items() if own != default}
        try:
            return found if traits(build(found)) == traits(model) else None
        except (TypeError, ValueError, RuntimeError):  # options that its constructor does not take
            return None


def build(about: dict[str, Any]) -> Any:
    """The model that `architecture_of` described, in eval mode, with random weights."""
    what, options = f"a model of {about['library']}", about["options"]
    if about["library"] == "cropr_kernels":
        return ViT(ViTConfig(**options)).eval()
    if about["library"] == "torchvision":
        return import_optional("torchvision.models", "train", what).VisionTransformer(**options).eval()
    model = import_optional("timm", "timm", what).create_model(about["name"], **options)
    saved = {key: tuple(value) if isinstance(value, list) else value for key, value in about["pretrained_cfg"].items()}
    model.pretrained_cfg = model.default_cfg = saved
    return model.eval()


def versions_of(about: dict[str, Any] | None) -> dict[str, str]:
    """Versions of what makes a model, for the reader of a file."""
    libraries = {"torch", "cropr_kernels", *([about["library"]] if about else [])}
    return {name: importlib.import_module("importlib.metadata").version(name) for name in sorted(libraries)}


def traits(model: nn.Module) -> dict[str, Any]:
    """What tells two models apart but for their weights: modules, their plain attributes, shapes."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if path.split(".")[0] != "cropr":
            plain = {name: value for name, value in vars(module).items() if name[0] != "_" and name not in _FREE}
            shapes = {name: tuple(value.shape) for name, value in module.named_parameters(recurse=False)}
            kind = own_class(module)
            kind = nn.Identity if kind.__name__ in ("DropPath", "Dropout") else kind
            found[path] = kind, {name: value for name, value in plain.items() if _is_plain(value)}, shapes
    found[""][1].pop("pretrained_cfg", None), found[""][1].pop("default_cfg", None)
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _look(model: Any, path: str) -> Any:
    """An attribute of an attribute, None where there is none."""
    for name in path.split("."):
        model = model[int(name)] if name.isdigit() else getattr(model, name, None)
    return model() if callable(model) else list(model) if isinstance(model, tuple) else model
