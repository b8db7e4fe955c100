"""Where each patch went: pictures of what a model does are drawn from these."""

from typing import Any

import torch
from torch import Tensor

from .model import require_pruned, run, warn_of_random_queries
from .state import PruningOptions


@torch.no_grad()
def pruning_map(
    model: Any, images: Tensor, *, protect: Tensor | None = None, padding: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """When each patch was pruned: (B, grid height, grid width) int64, the number of blocks it went through.

    Patches that were never pruned hold the depth of the network.

    Args:
        model: pruned by `apply`; it is read in its current mode.
        images: (B, C, H, W).
        protect, padding: (B, grid height, grid width) bool, as the model takes them.
        kwargs: what else the model is called with, such as interpolate_pos_encoding=True.

    Raises:
        TypeError: the model is not pruned.
        ValueError: a mask does not fit.
    """
    tower = require_pruned(model, "cropr.pruning_map").spec.tower
    warn_of_random_queries(model, "cropr.pruning_map", 4)
    options = PruningOptions(protect=protect, padding=padding)
    _, state = run(model, lambda: tower(images, **kwargs), options)
    return state.pruning_map(images.device)


@torch.no_grad()
def merge_map(model: Any, images: Tensor, *, protect: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Which token each patch ended in: (B, grid height, grid width) int64; patches with one number are one token.

    Numbers count the patches that were kept, in order of position, from 0. With LLF it is the state before all return.

    Args:
        model: pruned by `apply` with merge; it is read in its current mode.
        images: (B, C, H, W).
        protect: (B, grid height, grid width) bool, as the model takes it.
        kwargs: what else the model is called with.

    Raises:
        TypeError: the model is not pruned.
        ValueError: its tokens do not merge, or the mask does not fit.
    """
    stack = require_pruned(model, "cropr.merge_map")
    if stack.config.merge is None:
        raise ValueError("cropr.merge_map: the model's tokens do not merge; cropr.apply(model, ..., merge=True)")
    warn_of_random_queries(model, "cropr.merge_map", 4)
    tower = stack.spec.tower
    _, state = run(model, lambda: tower(images, **kwargs), PruningOptions(protect=protect))
    grid, prefix, rows = state.require_grid(), state.num_prefix, state.rows
    if rows is None:  # nothing was pruned
        rows = torch.arange(state.num_tokens, device=images.device).repeat(len(images), 1)
    return (rows[:, prefix:] - prefix).unflatten(1, grid)
