"""Where each patch went: pictures of what a model does are drawn from these."""

from typing import Any

import torch
from torch import Tensor

from ..models.adapters import anatomy
from .model import grid_of, require_pruned


@torch.no_grad()
def pruning_map(model: Any, images: Tensor, *, protect: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
    """When each patch left: (B, grid height, grid width) int64, the number of blocks it went through.

    Patches that were never pruned hold the depth of the network.

    Args:
        model: pruned by `apply`; it is read in its current mode.
        images: (B, C, H, W).
        protect, padding: (B, grid height, grid width) bool, as the model takes them.

    Raises:
        TypeError: the model is not pruned.
        ValueError: a mask does not fit.
    """
    stack, known = require_pruned(model, "cropr.pruning_map"), anatomy(model)
    patch, windows, depth = known.patch_size, stack.windows, len(known.blocks)
    grid = images.shape[2] // patch[0], images.shape[3] // patch[1]
    masks = {name: mask for name, mask in (("protect", protect), ("padding", padding)) if mask is not None}
    embedded = None if known.hosted else model.cropr_embed(images, **masks)
    prefix = known.num_prefix if embedded is None else embedded.num_prefix
    shape = (len(images), grid[0] * grid[1]) if embedded is None else (len(embedded.x), embedded.x.shape[1] - prefix)
    left = torch.full(shape, depth, dtype=torch.int64, device=images.device)

    def record(layer: int, positions: Tensor) -> None:
        left.scatter_(1, positions - prefix, layer + 1)

    if stack.passage is not None:
        stack.passage.departures = record
        try:
            model(images, **masks)
        finally:
            stack.passage.departures = None
    else:
        model.cropr_stream(images, embedded=embedded, departures=record, predict=False)
    if windows is not None:
        left = windows.join(left.unsqueeze(-1), grid).squeeze(-1)
    return left.unflatten(1, grid)


@torch.no_grad()
def merge_map(model: Any, images: Tensor, *, protect: Tensor | None = None) -> Tensor:
    """Which token each patch ended in: (B, grid height, grid width) int64; patches with one number are one token.

    Numbers count the patches that stayed, in order of position, from 0. With LLF it is the state before all return.

    Args:
        model: pruned by `apply` with merge; it is read in its current mode.
        images: (B, C, H, W).
        protect: (B, grid height, grid width) bool, as the model takes it.

    Raises:
        TypeError: the model is not pruned.
        ValueError: its tokens do not merge, or the mask does not fit.
    """
    if require_pruned(model, "cropr.merge_map").merging is None:
        raise ValueError("cropr.merge_map: the model's tokens do not merge; cropr.apply(model, ..., merge=True)")
    grid, prefix = grid_of(model, images), model.num_prefix_tokens
    embedded = model.cropr_embed(images, protect=protect)
    rows = model.cropr_stream(images, embedded=embedded, predict=False).rows
    if rows is None:  # nothing was pruned
        rows = torch.arange(prefix + grid[0] * grid[1], device=images.device).repeat(len(images), 1)
    return (rows[:, prefix:] - prefix).unflatten(1, grid)
