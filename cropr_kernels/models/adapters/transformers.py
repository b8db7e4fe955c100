"""Hugging Face vision models, with or without their heads, by probing: no list of names."""

from dataclasses import replace

from torch import Tensor, nn

from ..probing import ForwardError, ProbeError
from .base import ModelSpec, known_classes
from .inputs import input_of, inputs_of, patch_inputs_of
from .structure import probe


def is_model(module: nn.Module) -> bool:
    return isinstance(module, known_classes("transformers.modeling_utils", "PreTrainedModel"))


def find(model: nn.Module, example: Tensor | None) -> ModelSpec:
    """Specify a Hugging Face model; of one with several towers that take images, the only one that
    can be pruned.

    Raises:
        TypeError: there is none, or several.
    """
    reasons: list[str] = []
    specs: list[ModelSpec] = []
    for tower in _towers_of(model):
        try:
            specs.append(_probe(model, tower, example))
        except ProbeError as error:
            reasons.append(f"{type(tower).__name__}: {error}")
    if len(specs) == 1:
        return specs[0]
    if specs:
        raise TypeError(
            f"cropr.apply: {type(model).__name__} has {len(specs)} vision towers; give "
            "cropr.apply the one to prune"
        )
    reason = "; ".join(reasons) or _reason_without_towers(model)
    raise TypeError(f"cropr.apply: {type(model).__name__} cannot be pruned: {reason}")


def _reason_without_towers(model: nn.Module) -> str:
    if any(hasattr(module, "spatial_merge_size") for module in model.modules()):
        return (
            "its tower packs images into one row; cropr.prune_image_tokens(model, tower=...) "
            "prunes inside it"
        )
    return "it has no part that takes images"


def _towers_of(model: nn.Module) -> list[nn.Module]:
    """Return the outermost modules that take images alone: the model itself, or the towers of one
    with text."""
    if _takes_images(model):
        return [model]
    towers: list[nn.Module] = []
    for module in model.modules():
        inside = any(module is part for tower in towers for part in tower.modules())
        if module is not model and not inside and _takes_images(module):
            towers.append(module)
    return towers


def _takes_images(module: nn.Module) -> bool:
    """Tell whether a module of transformers takes images, and no text."""
    is_known = is_model(module) or (
        type(module).__module__.startswith("transformers.") and hasattr(module, "config")
    )
    return is_known and input_of(module) is not None


def _probe(model: nn.Module, tower: nn.Module, example: Tensor | None) -> ModelSpec:
    """Specify a model by the first example that its tower takes.

    Raises:
        ProbeError: it takes none, or cannot be pruned.
    """
    errors: list[ProbeError] = []
    for images, make_inputs in inputs_of(tower, example):
        try:
            spec = probe(model, tower, images, make_inputs)
            return replace(spec, patch_inputs=patch_inputs_of(tower))
        except ProbeError as error:
            errors.append(error)
    raise next((error for error in errors if not isinstance(error, ForwardError)), errors[0])
