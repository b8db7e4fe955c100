"""Maps of pruning and merging over the patch grid."""

from functools import partial

import torch
from torch import Tensor, nn

from .model import require_pruned, run, warn_of_random_queries
from .state import PruningOptions


@torch.no_grad()
def pruning_map(
    model: nn.Module,
    images: Tensor,
    *,
    protect: Tensor | None = None,
    padding: Tensor | None = None,
    **kwargs: object,
) -> Tensor:
    """Count the blocks that each patch went through before it was pruned: (B, grid height, grid
    width) int64, of videos (B, frames, grid height, grid width).

    Patches that are never pruned hold the depth of the network.

    Args:
        model: pruned by `apply`; it is read in its current mode.
        images: as the model takes them.
        protect, padding: bool of the shape of the map, as the model takes them.
        kwargs: further arguments of the model, such as interpolate_pos_encoding=True.

    Raises:
        TypeError: the model is not pruned.
        ValueError: a mask does not fit.
    """
    spec = require_pruned(model, "cropr.pruning_map").spec
    warn_of_random_queries(model, "cropr.pruning_map", 4)
    options = PruningOptions(protect=protect, padding=padding)
    _, state = run(model, lambda: spec.run(images, **kwargs), options)
    return state.pruning_map(images.device)


@torch.no_grad()
def merge_map(
    model: nn.Module, images: Tensor, *, protect: Tensor | None = None, **kwargs: object
) -> Tensor:
    """Number the kept token that each patch merged into: int64 of the shape of `pruning_map`.

    Kept patches count from 0 in order of position. With LLF, the state before tokens are restored.

    Args:
        model: pruned by `apply` with merge; it is read in its current mode.
        images: as the model takes them.
        protect: bool of the shape of the map, as the model takes it.
        kwargs: further arguments of the model.

    Raises:
        TypeError: the model is not pruned.
        ValueError: its tokens do not merge, or the mask does not fit.
    """
    modules = require_pruned(model, "cropr.merge_map")
    if modules.config.merge is None:
        raise ValueError(
            "cropr.merge_map: the model's tokens do not merge; cropr.apply(model, ..., merge=True)"
        )
    warn_of_random_queries(model, "cropr.merge_map", 4)
    call = partial(modules.spec.run, images, **kwargs)
    _, state = run(model, call, PruningOptions(protect=protect))
    return state.merge_map(images.device)
