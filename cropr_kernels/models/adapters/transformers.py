"""Hugging Face vision models, with or without their heads, by probing: no list of names."""

from typing import Any

from torch import Tensor, nn

from ..probing import ProbeError
from .base import ModelSpec, known_classes
from .structure import example_of, probe

_INPUTS = ("pixel_values", "input_values")  # names of images, and of spectrograms


def is_model(module: nn.Module) -> bool:
    return isinstance(module, known_classes("transformers.modeling_utils", "PreTrainedModel"))


def find(model: nn.Module, example: Tensor | None) -> ModelSpec:
    """Specify a Hugging Face model; of one with several towers that take images, the only one that can be pruned.

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
            f"cropr.apply: {type(model).__name__} has {len(specs)} vision towers; give cropr.apply the one to prune"
        )
    reason = "; ".join(reasons) or "it has no part that takes images"
    raise TypeError(f"cropr.apply: {type(model).__name__} cannot be pruned: {reason}")


def _towers_of(model: nn.Module) -> list[nn.Module]:
    """Return the outermost modules that take images alone: the model itself, or the towers of one with text."""
    if _takes_images(model):
        return [model]
    towers: list[nn.Module] = []
    for module in model.modules():
        inside = any(module is part for tower in towers for part in tower.modules())
        if module is not model and not inside and _takes_images(module):
            towers.append(module)
    return towers


def _takes_images(module: nn.Module) -> bool:
    """Tell whether a Hugging Face model takes images, and no text."""
    if getattr(module, "main_input_name", None) not in _INPUTS or not hasattr(module, "config"):
        return False
    modalities = getattr(type(module), "input_modalities", None)
    return not (isinstance(modalities, tuple | list) and "text" in modalities)


def _probe(model: nn.Module, tower: nn.Module, example: Tensor | None) -> ModelSpec:
    hf_tower: Any = tower
    name: str = hf_tower.main_input_name

    def forward(images: Tensor) -> object:
        return tower(**{name: images})

    return probe(model, tower, forward, example_of(tower) if example is None else example[:1])
