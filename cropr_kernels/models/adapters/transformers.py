"""Hugging Face vision models, with or without their heads, by probing: no list of names."""

import inspect
from typing import Any

from torch import Tensor, nn

from ..probing import ProbeError
from .base import ModelSpec, known_classes
from .structure import examples_of, probe

# Names of images, videos and spectrograms.
_INPUTS = ("pixel_values", "pixel_values_videos", "input_values")


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
    reason = "; ".join(reasons) or "it has no part that takes images"
    raise TypeError(f"cropr.apply: {type(model).__name__} cannot be pruned: {reason}")


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
    """Tell whether a Hugging Face model takes images, and no text."""
    return is_model(module) and _input_of(module) is not None


def _input_of(module: nn.Module) -> str | None:
    """Return the name of the images of a model that takes no text."""
    parameters = inspect.signature(module.forward).parameters
    if any(name.endswith(("input_ids", "inputs_embeds")) for name in parameters):
        return None
    return next((name for name in _INPUTS if name in parameters), None)


def _probe(model: nn.Module, tower: nn.Module, example: Tensor | None) -> ModelSpec:
    name = _input_of(tower) or ""
    images = _example_of(tower) if example is None else example[:1]

    def forward(images: Tensor) -> object:
        return tower(**{name: images})

    return probe(model, tower, forward, images)


def _example_of(tower: nn.Module) -> Tensor:
    """Make an image, a video or a spectrogram of the size in the configuration of a tower."""
    images = examples_of(tower)[0]
    config: Any = tower.config
    if hasattr(config, "num_mel_bins"):  # (1, time, frequencies)
        return images.new_zeros(1, config.max_length, config.num_mel_bins)
    frames = getattr(config, "num_frames", getattr(config, "frames_per_clip", None))
    return images if frames is None else images.unsqueeze(1).repeat(1, frames, 1, 1, 1)
