"""Patches that must be kept, and patches that are none: what a caller knows of a batch before any score is computed."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# What padding adds to attention logits: its exponential is zero, and times the root of a head's width it fits float16.
_ABSENT = -3000.0


class Masks(NamedTuple):
    """What holds for the tokens of a batch, by position, prefix included."""

    priority: Tensor  # (B, N) int8: 1 is kept before all others, -1 pruned before all others
    padding: Tensor | None  # (B, N) bool: tokens that no other may see

    def log_sizes(self, positions: Tensor | None) -> Tensor | None:
        """What padding adds to the logits of the active tokens, (B, K) float32; None where there is no padding."""
        padding = self.padding_at(positions)
        return None if padding is None else padding.float() * _ABSENT

    def padding_at(self, positions: Tensor | None) -> Tensor | None:
        """Which of the active tokens are padding, (B, K)."""
        return self.padding if self.padding is None or positions is None else self.padding.gather(1, positions)

    def split(self, images: int) -> list["Masks"]:
        """The masks of so many images at a time."""
        paddings = [None] * len(self.priority) if self.padding is None else self.padding.split(images)
        return [Masks(*parts) for parts in zip(self.priority.split(images), paddings)]


def make_masks(
    protect: Tensor | None, padding: Tensor | None, batch: int, num_patches: int, num_prefix: int
) -> Masks | None:
    """The masks of a batch from those of its grids, (B, grid height, grid width) bool; None where there are none.

    A patch that is both is padding. ValueError where a mask is not of this type or shape.
    """
    flat: dict[str, Tensor] = {}
    for name, mask in (("protect", protect), ("padding", padding)):
        if mask is None:
            continue
        if mask.dtype != torch.bool or mask.ndim != 3 or len(mask) != batch or mask[0].numel() != num_patches:
            raise ValueError(
                f"cropr: {name} must be bool of shape (B, grid height, grid width) with B = {batch} and {num_patches} "
                f"patches, got {str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}"
            )
        flat[name] = torch.nn.functional.pad(mask.flatten(1), (num_prefix, 0))
    if not flat:
        return None
    absent, present = flat.get("padding"), flat.get("protect")
    if absent is None:
        return Masks(present.to(torch.int8), None)  # type: ignore[union-attr]
    priority = -absent.to(torch.int8)
    return Masks(priority if present is None else torch.where(absent, priority, present.to(torch.int8)), absent)


def level_padding(x: Tensor, padding: Tensor, num_prefix: int) -> Tensor:
    """Put the mean of the patches of an image where its padding (B, K) is: heads that average see the patches alone."""
    patches = ~padding
    patches = patches & (torch.arange(x.shape[1], device=x.device) >= num_prefix)
    share = patches.to(x.dtype) / patches.sum(1, keepdim=True).clamp_min(1).to(x.dtype)
    return torch.where(padding.unsqueeze(-1), share.unsqueeze(1) @ x, x)


def boxes_on_grid(boxes: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Which patches each box touches: (n, grid height, grid width) bool; boxes (n, 4) are x0, y0, x1, y1 in pixels."""
    top, left = (torch.arange(count, device=boxes.device) * side for count, side in zip(grid, patch))
    columns = (boxes[:, :1] < left + patch[1]) & (boxes[:, 2:3] > left)
    rows = (boxes[:, 1:2] < top + patch[0]) & (boxes[:, 3:4] > top)
    return rows[:, :, None] & columns[:, None, :]


def protect_boxes(boxes: Sequence[Tensor], grid: tuple[int, int], patch_size: tuple[int, int] = (16, 16)) -> Tensor:
    """The patches that any box of an image touches: (B, grid height, grid width) bool, for model(images, protect=...).

    Args:
        boxes: for each image (n, 4) as x0, y0, x1, y1 in pixels; n may be 0.
        grid: patches in height and width.
        patch_size: pixels of a patch in height and width.

    Raises:
        ValueError: boxes are not (n, 4).
    """
    for box in boxes:
        if box.ndim != 2 or box.shape[1] != 4:
            raise ValueError(f"cropr.protect_boxes: boxes must have shape (n, 4), got {tuple(box.shape)}")
    return torch.stack([boxes_on_grid(box, grid, patch_size).any(0) for box in boxes])


def pad_images(
    images: Sequence[Tensor], patch_size: tuple[int, int] = (16, 16), size: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Put images of different sizes into one batch, each at the top left, zeros around it.

    Args:
        images: (C, H, W) each.
        patch_size: pixels of a patch in height and width.
        size: height and width of the batch in pixels; default the largest of the images, up to whole patches.

    Returns:
        The batch (B, C, H, W), and for model(images, padding=...) (B, grid height, grid width) bool, true where a patch
        holds nothing of its image.

    Raises:
        ValueError: there are no images, they differ in channels, or one is larger than `size`.
    """
    if not images:
        raise ValueError("cropr.pad_images: needs at least one image, got none")
    if size is None:
        height, width = (
            -(-max(image.shape[axis] for image in images) // side) * side for axis, side in zip((1, 2), patch_size)
        )
    else:
        height, width = size
    channels, grid = images[0].shape[0], (height // patch_size[0], width // patch_size[1])
    batch = images[0].new_zeros(len(images), channels, height, width)
    padding = torch.ones(len(images), *grid, dtype=torch.bool, device=batch.device)
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != channels or image.shape[1] > height or image.shape[2] > width:
            raise ValueError(
                f"cropr.pad_images: image {i} must fit into ({channels}, {height}, {width}), got {tuple(image.shape)}"
            )
        batch[i, :, : image.shape[1], : image.shape[2]] = image
        padding[i, : -(-image.shape[1] // patch_size[0]), : -(-image.shape[2] // patch_size[1])] = False
    return batch, padding
