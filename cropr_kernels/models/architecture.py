"""Architectures of models as plain values, from which the same model can be built."""

import importlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ..utils.optional import import_optional
from .adapters.base import base_class, known_classes
from .vit import ViT, ViTConfig

Architecture = dict[str, Any]  # plain values, which a file holds

# Options of timm's constructors, and the attribute of a timm model that holds each.
_TIMM_OPTIONS = {
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
# Attributes of training or of the machine, or that pruning changes.
_IGNORED = {
    "training",
    "p",
    "drop_prob",
    "inplace",
    "scale_by_keep",
    "grad_checkpointing",
    "fused_attn",
    "num_prefix",
}
_IGNORED |= {"num_prefix_tokens", "dropout", "attention_dropout"}


def architecture_of(model: nn.Module) -> Architecture | None:
    """Describe a model for `build`; None if no known constructor makes it.

    Known are `cropr_kernels.ViT`, models that timm made by name, and torchvision's. Dropout and
    stochastic depth, which only training uses, are ignored.
    """
    architecture = _describe(model)
    if architecture is None:
        return None
    with torch.device("meta"):
        if architecture["library"] == "timm":
            architecture["options"] = _changed_options(model, build(architecture))
        try:
            return architecture if traits(build(architecture)) == traits(model) else None
        except (TypeError, ValueError, RuntimeError):  # options that its constructor does not take
            return None


def _describe(model: nn.Module) -> Architecture | None:
    """Describe a model of a known library; of timm, with its default options."""
    if isinstance(model, ViT):
        return {"library": "cropr_kernels", "options": asdict(model.config)}
    if isinstance(
        model, known_classes("torchvision.models.vision_transformer", "VisionTransformer")
    ):
        names = (
            "image_size",
            "patch_size",
            "hidden_dim",
            "mlp_dim",
            "num_classes",
            "representation_size",
        )
        options = {name: getattr(model, name) for name in names}
        options |= {"num_layers": _attribute(model, "encoder.layers.__len__")}
        options |= {"num_heads": _attribute(model, "encoder.layers.0.num_heads")}
        return {"library": "torchvision", "options": options}
    config = getattr(model, "pretrained_cfg", None) or {}
    if not config.get("architecture"):
        return None
    config = {key: value for key, value in config.items() if _is_plain(value)}
    return {
        "library": "timm",
        "name": config["architecture"],
        "options": {},
        "pretrained_cfg": config,
    }


def _changed_options(model: nn.Module, default: nn.Module) -> dict[str, object]:
    """The constructor options in which a timm model differs from the default of its name."""
    options = {name: _attribute(model, path) for name, path in _TIMM_OPTIONS.items()}
    return {
        name: value
        for name, value in options.items()
        if value != _attribute(default, _TIMM_OPTIONS[name])
    }


def build(architecture: Mapping[str, Any]) -> Any:
    """Build the model that `architecture_of` described, in eval mode, with random weights."""
    library = architecture["library"]
    options = architecture["options"]
    if library == "cropr_kernels":
        return ViT(ViTConfig(**options)).eval()
    if library == "torchvision":
        return (
            import_optional("torchvision.models", "train", "a torchvision model")
            .VisionTransformer(**options)
            .eval()
        )
    model = import_optional("timm", "timm", "a timm model").create_model(
        architecture["name"], **options
    )
    config = architecture["pretrained_cfg"]
    config = {
        key: tuple(value) if isinstance(value, list) else value for key, value in config.items()
    }
    model.pretrained_cfg = model.default_cfg = config
    return model.eval()


def versions_of(architecture: Mapping[str, Any] | None) -> dict[str, str]:
    """Versions of the libraries of a model, for the reader of a file."""
    libraries = {"torch", "cropr_kernels", *([architecture["library"]] if architecture else [])}
    return {
        name: importlib.import_module("importlib.metadata").version(name)
        for name in sorted(libraries)
    }


def traits(
    model: nn.Module,
) -> dict[str, tuple[type, dict[str, object], dict[str, tuple[int, ...]]]]:
    """Class, plain attributes and shapes of each module: two models with equal traits differ in
    their weights only."""
    modules = {}
    for path, module in model.named_modules():
        if path.split(".")[0] == "cropr":
            continue
        cls: type = base_class(module)
        if cls.__name__ in ("DropPath", "Dropout"):
            cls = nn.Identity
        attributes = {
            name: value
            for name, value in vars(module).items()
            if name[0] != "_" and _is_plain(value)
        }
        for name in _IGNORED | ({"pretrained_cfg", "default_cfg"} if module is model else set()):
            attributes.pop(name, None)
        shapes = {
            name: tuple(value.shape) for name, value in module.named_parameters(recurse=False)
        }
        modules[path] = cls, attributes, shapes
    return modules


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _attribute(model: nn.Module, path: str) -> object:
    """Look up an attribute of an attribute, or call a method; None if there is none. Tuples become
    lists."""
    value: Any = model
    for name in path.split("."):
        value = value[int(name)] if name.isdigit() else getattr(value, name, None)
    return value() if callable(value) else list(value) if isinstance(value, tuple) else value
