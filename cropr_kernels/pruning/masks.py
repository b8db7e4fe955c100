"""Masks of a batch: patches that must be kept (protect), and positions that hold no patch
(padding)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Attention logit of padding: its exponential is zero, and times the root of a head's width it fits
# float16.
_PADDING_LOGIT = -3000.0


class Masks(NamedTuple):
    """The masks of a batch by position, prefix included."""

    priority: Tensor  # (B, N) int8: 1 is kept before all others, -1 pruned before all others
    padding: Tensor | None  # (B, N) bool: tokens that no other may see

    def log_sizes(self, positions: Tensor | None) -> Tensor | None:
        """The attention logits that padding adds to the active tokens, (B, K) float32; None without
        padding."""
        padding = self.padding_at(positions)
        return None if padding is None else padding.float() * _PADDING_LOGIT

    def padding_at(self, positions: Tensor | None) -> Tensor | None:
        """Padding among the active tokens, (B, K) bool."""
        return (
            self.padding
            if self.padding is None or positions is None
            else self.padding.gather(1, positions)
        )

    def split(self, images: int) -> list["Masks"]:
        """Split into masks of `images` images each."""
        paddings = (
            [None] * len(self.priority) if self.padding is None else self.padding.split(images)
        )
        return [Masks(*parts) for parts in zip(self.priority.split(images), paddings)]


def make_masks(
    protect: Tensor | None,
    padding: Tensor | None,
    batch: int,
    num_patches: int,
    num_prefix: int,
    is_video: bool = False,
) -> Masks | None:
    """Make the masks of a batch from those of its grids, (B, grid height, grid width) bool, of
    videos (B, frames, grid height, grid width); None if there are none.

    A patch that is both is padding. Raises ValueError if a mask is not of this type or shape.
    """
    token_masks: dict[str, Tensor] = {}
    for name, mask in (("protect", protect), ("padding", padding)):
        if mask is None:
            continue
        if (
            mask.dtype != torch.bool
            or mask.ndim != 3 + is_video
            or len(mask) != batch
            or mask[0].numel() != num_patches
        ):
            raise ValueError(
                f"cropr: {name} must be bool of shape (B, {'frames, ' if is_video else ''}grid "
                "height, grid width) with B = "
                f"{batch} and {num_patches} "
                f"patches, got {str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}"
            )
        token_masks[name] = torch.nn.functional.pad(mask.flatten(1), (num_prefix, 0))
    padded = token_masks.get("padding")
    protected = token_masks.get("protect")
    if padded is None:
        return None if protected is None else Masks(protected.to(torch.int8), None)
    priority = -padded.to(torch.int8)
    if protected is not None:
        priority = torch.where(padded, priority, protected.to(torch.int8))
    return Masks(priority, padded)


def level_padding(x: Tensor, padding: Tensor, num_prefix: int) -> Tensor:
    """Replace padding (B, K) by the mean of the patches of its image, so that heads that average
    see patches alone."""
    patches = ~padding
    patches = patches & (torch.arange(x.shape[1], device=x.device) >= num_prefix)
    weights = patches.to(x.dtype) / patches.sum(1, keepdim=True).clamp_min(1).to(x.dtype)
    return torch.where(padding.unsqueeze(-1), weights.unsqueeze(1) @ x, x)


def boxes_on_grid(boxes: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Mark the patches that each box touches: (n, grid height, grid width) bool.

    boxes (n, 4) are x0, y0, x1, y1 in pixels.
    """
    top, left = (
        torch.arange(count, device=boxes.device) * side for count, side in zip(grid, patch)
    )
    columns = (boxes[:, :1] < left + patch[1]) & (boxes[:, 2:3] > left)
    rows = (boxes[:, 1:2] < top + patch[0]) & (boxes[:, 3:4] > top)
    return rows[:, :, None] & columns[:, None, :]


def protect_boxes(
    boxes: Sequence[Tensor], grid: tuple[int, int], patch_size: tuple[int, int] = (16, 16)
) -> Tensor:
    """Mark the patches that any box of an image touches: (B, grid height, grid width), for
    model(images, protect=...).

    Args:
        boxes: (n, 4) for each image, x0, y0, x1, y1 in pixels; n may be 0.
        grid: patches in height and width.
        patch_size: pixels of a patch in height and width.

    Raises:
        ValueError: boxes are not (n, 4).
    """
    for box in boxes:
        if box.ndim != 2 or box.shape[1] != 4:
            raise ValueError(
                f"cropr.protect_boxes: boxes must have shape (n, 4), got {tuple(box.shape)}"
            )
    return torch.stack([boxes_on_grid(box, grid, patch_size).any(0) for box in boxes])


def pad_images(
    images: Sequence[Tensor],
    patch_size: tuple[int, int] = (16, 16),
    size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Pad images of different sizes with zeros to one batch, each at the top left.

    Args:
        images: (C, H, W) each.
        patch_size: pixels of a patch in height and width.
        size: height and width of the batch in pixels; default the largest of the images, rounded up
            to full patches.

    Returns:
        The batch (B, C, H, W), and the mask (B, grid height, grid width) for model(images,
        padding=...), true if a patch holds nothing of its image.

    Raises:
        ValueError: there are no images, they differ in channels, or one is larger than `size`.
    """
    if not images:
        raise ValueError("cropr.pad_images: needs at least one image, got none")
    if size is None:
        height = _round_up(max(image.shape[1] for image in images), patch_size[0])
        width = _round_up(max(image.shape[2] for image in images), patch_size[1])
    else:
        height, width = size
    channels = images[0].shape[0]
    grid = (height // patch_size[0], width // patch_size[1])
    batch = images[0].new_zeros(len(images), channels, height, width)
    padding = torch.ones(len(images), *grid, dtype=torch.bool, device=batch.device)
    for i, image in enumerate(images):
        if (
            image.ndim != 3
            or image.shape[0] != channels
            or image.shape[1] > height
            or image.shape[2] > width
        ):
            raise ValueError(
                f"cropr.pad_images: image {i} must fit into ({channels}, {height}, {width}), got "
                f"{tuple(image.shape)}"
            )
        batch[i, :, : image.shape[1], : image.shape[2]] = image
        padding[i, : -(-image.shape[1] // patch_size[0]), : -(-image.shape[2] // patch_size[1])] = (
            False
        )
    return batch, padding


def _round_up(pixels: int, multiple: int) -> int:
    return -(-pixels // multiple) * multiple
