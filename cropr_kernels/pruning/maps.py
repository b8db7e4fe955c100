"""Maps of pruning and merging over the patch grid."""

from functools import partial

import torch
from torch import Tensor, nn

from .model import require_pruned, run, warn_of_random_queries
from .state import PruningOptions, PruningState


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
    options = PruningOptions(protect=protect, padding=padding, engine=True, collect=True)
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
    _, state = run(model, call, PruningOptions(protect=protect, engine=True, collect=True))
    return state.merge_map(images.device)


def counts_by_block(state: PruningState) -> Tensor:
    """The tokens that each block sees of each image, (B, blocks) int64, on the CPU."""
    depth = state.last_layer + 1
    by_block = torch.full((state.num_images, depth), state.num_tokens)
    if state.record is None:
        merges = [(layer, torch.tensor(count)) for layer, count in enumerate(state.counts)]
    else:
        merges = [(merge.layer, merge.counts.cpu()) for merge in state.record.merges]
    for layer, counts in merges:
        by_block[:, layer + 1 : state.fused_after + 1] = counts.unsqueeze(-1)
    return by_block


def token_maps(state: PruningState) -> Tensor:
    """(blocks + 1, B, grid height, grid width) int64: before the first and after each block,
    the token that holds each patch, counted in order of position; -1 if it was dropped.

    With LLF, the state before tokens are restored. Merged ones need `collect`.
    """
    grid = state.require_grid()
    rows = {layer: row_idx for (layer, _), row_idx in zip(state.pruned_idx, state.collected_rows)}
    if state.record is not None:
        rows = {
            merge.layer: state.record.rows(index + 1)
            for index, merge in enumerate(state.record.merges)
        }
    pruned = dict(state.pruned_idx)
    device = next((idx.device for idx in (*pruned.values(), *rows.values())), None)
    all_rows = torch.arange(state.num_tokens, device=device).repeat(state.num_images, 1)
    maps = [all_rows]
    active = torch.ones_like(all_rows, dtype=torch.bool)
    for layer in range(state.last_layer + 1):
        if layer in pruned:
            active = active.scatter(1, pruned[layer], False)
        if layer in rows:
            maps.append(rows[layer])
        elif layer in pruned:
            maps.append((active.cumsum(1) - 1).masked_fill(~active, -1))
        else:
            maps.append(maps[-1])
    patches = torch.stack(maps)[:, :, state.num_prefix :]
    return torch.where(patches < 0, -1, patches - state.num_prefix).unflatten(2, grid)
