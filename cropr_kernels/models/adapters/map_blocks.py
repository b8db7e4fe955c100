"""Blocks over maps (B, height, width, D), with windows or without, by the roles of their modules.

A copy of each block, all of whose parameters are random, must give what its parts give for its
tokens in another order: else a position would be missed where a table is still zero.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from ..arguments import has_tensors
from ..probing import BlockCall, ProbeError
from ..tiling import Tiling
from .base import EngineRefusal, MapBlock, base_class
from .parts import candidates_of

_NOISE = 0.1  # standard deviation that random parameters add


def find_map_blocks(calls: list[BlockCall]) -> tuple[list[BlockCall], list[MapBlock]]:
    """Return the calls of a chain of blocks over maps in the format of these, and the blocks as
    they run on a part of their tokens.

    Raises:
        ProbeError: their parts do not compute what they do.
    """
    name = base_class(calls[0].block).__name__
    reason = f"{name} takes maps of four dimensions, as for windows, and"
    errors: list[tuple[int, str]] = []
    for axis in (3, 1):
        calls = [
            call._replace(token_format=replace(call.token_format, map_axis=axis)) for call in calls
        ]
        blocks: list[MapBlock] = []
        try:
            for layer, call in enumerate(calls):
                blocks.append(_find_map_block(layer, call))
        except EngineRefusal as refusal:
            errors.append((len(blocks), str(refusal)))
            continue
        if len({block.window for block in blocks if block.window}) > 1:
            raise ProbeError(f"{reason} windows of several sizes")
        return calls, blocks
    _, error = max(errors, key=lambda item: item[0])
    raise ProbeError(f"{reason} {error}")


def _find_map_block(layer: int, call: BlockCall) -> MapBlock:
    """Return a block as it runs on a part of its tokens.

    Raises:
        EngineRefusal: its parts do not compute what it does.
    """
    if has_tensors(call.args, call.kwargs):
        raise EngineRefusal("its blocks take a mask, or a table")
    if call.x.is_meta:
        raise EngineRefusal("its parameters are on the meta device")
    size = getattr(call.block, "window_size", 0) or 0
    window = size if isinstance(size, int) else size[0]
    trial = _randomized(call)
    for parts in candidates_of(call.block):
        attention = getattr(call.block, parts.attn)
        num_heads = next(
            (
                value
                for name in ("num_heads", "num_attention_heads")
                if isinstance(value := getattr(attention, name, None), int)
            ),
            1,
        )
        block = MapBlock(parts, window, num_heads)
        if _computes(replace(block, parts=replace(parts, block=trial.block)), trial):
            return block
    raise EngineRefusal(
        f"block {layer} is no pre-norm block with windows that `window_size` names and positions "
        "that tables name"
    )


def _randomized(call: BlockCall) -> BlockCall:
    """The call of a copy of the block whose parameters are all random."""
    block = copy.deepcopy(call.block)
    for parameter in block.parameters():
        parameter.add_(_NOISE * torch.randn_like(parameter))
    return call._replace(block=block, output=block(call.argument, *call.args, **call.kwargs))


def _computes(block: MapBlock, call: BlockCall) -> bool:
    """Tell whether a block computes from its tokens in another order what it did in a call."""
    grid = call.token_format.grid_of(call.argument)
    tiling = Tiling(grid, block.window, call.x.device)
    positions: list[Tensor] = []
    rows = []
    for group in tiling.groups:
        order = torch.randperm(group.num_patches, device=call.x.device).unsqueeze(0)
        positions.append(group.cells[:, order[0]].flatten())
        rows.append(tiling.window_rows(group, order))
    cells = torch.cat(positions)
    try:
        output = block.run(
            call.x[:, cells], rows if block.window else [tiling.map_rows(cells[None])]
        )
    # Modules of other roles than their names say
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False
    expected = call.tokens[:, cells]
    return output.shape == expected.shape and call.is_close(output, expected)
