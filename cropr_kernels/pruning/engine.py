"""The inference engine: one residual buffer in which no token ever moves.

    x (B, N, D) holds every token at its position for the entire network; idx (B, K) names the
    active ones. h = norm(x[idx]);  x[idx] += attention(h), h = norm(x[idx]);  x[idx] += mlp(h), idx
    = idx[select(x[idx] . q)]

So pruning costs one selection a layer, and Last Layer Fusion nothing: the last block reads all of
x, in which the pruned tokens still are. Merging changes the rows that tokens go into, and moves
none; so does fusion that tracks parents, which leaves the offset of a pruned token from its parent
in its row, and adds the rows of parents before the last block. The first block of a pruned model
calls the engine; those after it pass its result on. `PruningState` is the functional form of the
same.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..models.adapters import BlockParts
from ..models.norms import norm_parameters
from ..models.rotary import Rotary
from .masks import Masks
from .ragged import RaggedBatch, run_ragged
from .state import PruningState, attention_log_sizes
from .strategies import MergeStrategy, make_strategy

ops = torch.ops.cropr
# Bytes of tokens that run through all blocks at a time, so that rows which are read again are still
# in the cache: about half of a GPU's L2. None: the full batch. Not yet measured on a GPU.
CACHE_BYTES: int | None = None


def run_engine(state: PruningState, x: Tensor, rotary: Rotary | None) -> Tensor:
    """Run x through all blocks, and note the active tokens in `state`.

    Args:
        state: of this forward, before its first block.
        x: (B, N, D), owned by the engine: it changes in place, and has no gradient.
        rotary: the rotary table, if the blocks take one.

    Returns:
        The active tokens (B, K, D) in order of position; all (B, N, D) with Last Layer Fusion, or
        if tokens merged and the caller wants all positions. Where images keep different numbers,
        the prefix (B, P, D) or all.
    """
    blocks = state.modules.engine or []
    parameters = (parameter for parts in blocks for parameter in parts.block.parameters())
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
        raise RuntimeError(
            "the engine computes no gradients, and a block has parameters that require one: call "
            "the model under "
            "torch.no_grad(), freeze it, or deploy(model, engine=False)"
        )
    with below_autograd():
        budget = state.budget()
        merge = state.config.merge
        packs = all(parts.packs for parts in blocks) and not _has_own_table(rotary)
        if budget is not None and merge is not None and packs and len(x):
            x = run_ragged(state, blocks, RaggedBatch.of(state, x, rotary), merge, budget)
            positions = None
        elif CACHE_BYTES is None:
            x, positions = _run_blocks(state, blocks, x, state.masks, rotary)
        else:
            x, positions = _run_in_chunks(
                state, blocks, x, rotary, max(CACHE_BYTES // max(x[:1].nbytes, 1), 1)
            )
    state.done = True
    state.positions = positions
    return x


def below_autograd() -> AbstractContextManager[object]:
    """Context in which operators cost less, as in inference mode."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return torch._C._AutoDispatchBelowADInplaceOrView()


def _has_own_table(rotary: Rotary | None) -> bool:
    """Tell whether each image of a batch has its own rotary table."""
    if rotary is None:
        return False
    tables = rotary.table if isinstance(rotary.table, tuple) else (rotary.table,)
    return any(table.ndim != 2 for table in tables)


def _run_in_chunks(
    state: PruningState, blocks: list[BlockParts], x: Tensor, rotary: Rotary | None, num_images: int
) -> tuple[Tensor, Tensor | None]:
    """`_run_blocks` for num_images images at a time."""
    chunks = x.split(num_images)
    masks = [None] * len(chunks) if state.masks is None else state.masks.split(num_images)
    results = [
        _run_blocks(state, blocks, chunk, mask, rotary) for chunk, mask in zip(chunks, masks)
    ]
    positions = [idx for _, idx in results if idx is not None]
    return torch.cat([tokens for tokens, _ in results]), torch.cat(positions) if positions else None


def _run_blocks(
    state: PruningState,
    blocks: list[BlockParts],
    x: Tensor,
    masks: Masks | None,
    rotary: Rotary | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the tokens after the last block, and the positions of the active ones, None for
    all."""
    counts = state.counts
    x = x.contiguous()
    idx = None
    count = x.shape[1]
    strategy = None
    if counts[-1] < count:
        priorities = state.choose_priorities(x, masks)
        strategy = make_strategy(
            state.config, state.num_prefix, priorities, state.config.tracks_parents
        )
        strategy.prepare_(x)
    log_sizes = attention_log_sizes(masks, strategy, idx)
    h = ops.gather_norm(
        x, None, *norm_parameters(getattr(blocks[0].block, blocks[0].norm1), x.dtype)
    )
    for layer, parts in enumerate(blocks):
        block = parts.block
        gamma1, gamma2 = parts.scales(block)
        norm2 = norm_parameters(getattr(block, parts.norm2), x.dtype)
        active_rotary = None if rotary is None else rotary._replace(idx=idx)
        update = parts.attend(getattr(block, parts.attn), h, active_rotary, log_sizes)
        h = ops.add_norm_(x, idx, update, gamma1, *norm2)
        update = parts.run_mlp(block, h)
        if layer == state.last_layer:
            ops.add_(x, idx, update, gamma2)
            break
        next_norm = norm_parameters(
            getattr(blocks[layer + 1].block, blocks[layer + 1].norm1), x.dtype
        )
        if strategy is not None and layer < len(counts) and counts[layer] < count:
            count = counts[layer]
            idx = strategy.reduce_(
                x, idx, update, gamma2, state.modules.scorer(layer).query(), count
            )
        elif strategy is not None and layer == state.fused_after:
            ops.add_(x, idx, update, gamma2)
            x = ops.add_parents(x, strategy.parent) if strategy.tracks_parents else x
            idx = None
            strategy = None
        else:
            h = ops.add_norm_(x, idx, update, gamma2, *next_norm)
            continue
        log_sizes = attention_log_sizes(masks, strategy, idx)
        h = ops.gather_norm(x, idx, *next_norm)
    # No block sees the tokens that are restored
    if strategy is not None and strategy.tracks_parents:
        return ops.add_parents(x, strategy.parent), None
    if idx is None:
        return x, None
    if isinstance(strategy, MergeStrategy) and state.options.full:
        return ops.gather(x, strategy.final_positions()), idx
    return ops.gather(x, idx), idx
