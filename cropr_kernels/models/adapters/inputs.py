"""Arguments of Hugging Face vision models, made of images (B, C, H, W) in their sizes."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..patch_inputs import PatchInputs
from .structure import examples_of

# Images, videos, spectrograms, patches with their positions
NAMES = ("pixel_values", "pixel_values_videos", "input_values", "flattened_patches", "image")
_FRAMES = 2  # of a video, if a model names no number

MakeInputs = Callable[[Tensor], dict[str, Tensor]]


def input_of(module: nn.Module) -> str | None:
    """Return the name of the images of a model that takes no text."""
    parameters = inspect.signature(module.forward).parameters
    if any(name.endswith(("input_ids", "inputs_embeds")) for name in parameters):
        return None
    return next((name for name in NAMES if name in parameters), None)


def inputs_of(tower: nn.Module, example: Tensor | None) -> Iterator[tuple[Tensor, MakeInputs]]:
    """Examples of what a tower may take, and what makes its arguments of them.

    Args:
        tower: takes images and no text.
        example: (1, C, H, W), an image; None: of the size in its configuration.
    """
    name = input_of(tower) or ""
    parameters = inspect.signature(tower.forward).parameters
    config: Any = getattr(tower, "config", None)
    config = getattr(config, "vision_config", config)
    images = examples_of(tower)[0] if example is None else example[:1]
    plain = partial(_as_they_are, name)
    if name == "flattened_patches":
        yield images, partial(_positions_in_patches, name, config.patch_size)
    elif "spatial_shapes" in parameters:
        yield images, partial(_patches_with_sizes, name, config.patch_size)
    elif "pixel_position_ids" in parameters:
        yield images, partial(_patches_with_positions, name, config.patch_size)
    elif example is not None:
        yield images, plain
    elif hasattr(config, "num_mel_bins"):  # (1, time, frequencies)
        yield images.new_zeros(1, config.max_length, config.num_mel_bins), plain
    else:
        frames = getattr(config, "num_frames", getattr(config, "frames_per_clip", None))
        if frames is not None or name == "pixel_values_videos":
            video = images.unsqueeze(1).repeat(1, frames or _FRAMES, 1, 1, 1)
            yield video, plain
            yield video, partial(_frames, name)
        yield images, plain
        if isinstance(getattr(config, "patch_size", None), int):
            yield images, partial(_patches, name, config.patch_size)


def patch_inputs_of(tower: nn.Module) -> PatchInputs | None:
    """The inputs of a tower that takes patches, a mask of them, and the grid of each image."""
    names = (*inspect.signature(tower.forward).parameters,)
    if "spatial_shapes" not in names or "pixel_attention_mask" not in names:
        return None
    return PatchInputs(
        "pixel_values", "pixel_attention_mask", "spatial_shapes", names, _without_mask
    )


def _without_mask(tower: nn.Module, **inputs: object) -> object:
    return tower(pixel_attention_mask=None, **inputs)


def _as_they_are(name: str, images: Tensor) -> dict[str, Tensor]:
    return {name: images}


def _frames(name: str, videos: Tensor) -> dict[str, Tensor]:
    """The frames of videos as a batch."""
    return {name: videos.flatten(0, 1)}


def _patches(name: str, size: int, images: Tensor) -> dict[str, Tensor]:
    """Patches (B, N, size * size * C) of images."""
    patches = images.unfold(2, size, size).unfold(
        3, size, size
    )  # (B, C, height, width, size, size)
    return {name: patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)}


def _grid_of(size: int, images: Tensor) -> tuple[int, int]:
    return images.shape[-2] // size, images.shape[-1] // size


def _columns_and_rows(size: int, images: Tensor) -> Tensor:
    """The column and row of each patch, (B, N, 2)."""
    height, width = _grid_of(size, images)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([columns, rows], -1).flatten(0, 1).to(images.device)
    return places.expand(len(images), -1, -1)


def _patches_with_sizes(name: str, size: int, images: Tensor) -> dict[str, Tensor]:
    """Patches, a mask of them all, and the grid of each image (NaFlex)."""
    inputs = _patches(name, size, images)
    grid = torch.tensor(_grid_of(size, images), device=images.device)
    mask = torch.ones(inputs[name].shape[:2], dtype=torch.long, device=images.device)
    shapes = grid.expand(len(images), -1)
    return inputs | {"pixel_attention_mask": mask, "spatial_shapes": shapes}


def _patches_with_positions(name: str, size: int, images: Tensor) -> dict[str, Tensor]:
    """Patches, and the column and row of each."""
    places = _columns_and_rows(size, images)
    return _patches(name, size, images) | {"pixel_position_ids": places}


def _positions_in_patches(name: str, size: int, images: Tensor) -> dict[str, Tensor]:
    """Patches, each after its row and column, which count from 1 (Pix2Struct)."""
    places = _columns_and_rows(size, images).flip(-1).to(images.dtype) + 1
    return {name: torch.cat([places, _patches(name, size, images)[name]], -1)}
