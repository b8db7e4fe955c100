"""The inference engine: one residual buffer in which no token ever moves.

    x (B, N, D) holds every token at its position for the whole network; idx (B, K) names the active ones.
    h = norm(x[idx]);  x[idx] += attention(h), h = norm(x[idx]);  x[idx] += mlp(h), idx = idx[select(x[idx] . q)]

So pruning costs one selection a layer, and Last Layer Fusion nothing: the last block reads all of x, where the
pruned tokens still are. Merging changes the rows that tokens go into, and moves none; so does fusion by hosts, which
leaves a pruned token's offset from its host in its row, and adds the rows of hosts up before the last block. The first
block of a pruned model calls it; those behind pass on what it gives. The functional form of the same is `PruningState`.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..models.adapters import BlockParts
from ..models.blocks import Rotary
from .config import PruningConfig
from .masks import Masks
from .merging import COST_WEIGHT, log_sizes, resolve_parents
from .state import PruningState

ops = torch.ops.cropr
# Of the tokens of a batch, how many bytes run through all blocks at a time, so that rows which are read again are still
# in the cache: about half of a GPU's L2. None: the whole batch. No GPU has said yet that it pays.
CACHE_BYTES: int | None = None


def run_engine(state: PruningState, x: Tensor, rotary: Rotary | None) -> Tensor:
    """Run x through all blocks; `state` learns which tokens are active in the end.

    Args:
        state: of this forward, before its first block.
        x: (B, N, D), nobody else's: it changes in place, and has no gradient.
        rotary: the rotary table, if the blocks take one.

    Returns:
        The active tokens (B, K, D) in order of position; all (B, N, D) with Last Layer Fusion, and where tokens merged
        and the caller wants all positions.
    """
    blocks: list[BlockParts] = state.stack.engine
    learns = (parameter for parts in blocks for parameter in parts.block.parameters() if parameter.requires_grad)
    if torch.is_grad_enabled() and any(True for _ in learns):
        raise RuntimeError(
            "the engine computes no gradients, and a block has parameters that require one: call the model under "
            "torch.no_grad(), freeze it, or deploy(model, engine=False)"
        )
    # Below autograd, as in inference mode: operators cost less.
    with nullcontext() if torch.compiler.is_compiling() else torch._C._AutoDispatchBelowADInplaceOrView():
        if CACHE_BYTES is None:
            x, positions = _run(state, blocks, x, state.masks, rotary)
        else:
            images = max(CACHE_BYTES // max(x[:1].nbytes, 1), 1)
            masks = [None] * len(x.split(images)) if state.masks is None else state.masks.split(images)
            done = [_run(state, blocks, *part, rotary) for part in zip(x.split(images), masks)]
            x = torch.cat([part for part, _ in done])
            found = [positions for _, positions in done if positions is not None]
            positions = torch.cat(found) if found else None
    state.done, state.positions = True, positions
    return x


def _run(
    state: PruningState, blocks: list[BlockParts], x: Tensor, masks: Masks | None, rotary: Rotary | None
) -> tuple[Tensor, Tensor | None]:
    """The tokens after the last block, and the positions of those that are active, None for all."""
    counts, prefix = state.counts, state.num_prefix
    x, idx = x.contiguous(), None
    count = x.shape[1]
    pruned = None
    if counts[-1] < count:
        priorities = state.choose_priorities(x, None if masks is None else masks.priority)
        pruned = Pruned(state.config, x, prefix, priorities)
    log_sizes = None if masks is None else masks.log_sizes(None)
    h = _norm(x, None, getattr(blocks[0].block, blocks[0].norm1))
    for layer, parts in enumerate(blocks):
        block = parts.block
        scale1, scale2 = parts.scales(block)
        norm2 = getattr(block, parts.norm2)
        where = None if rotary is None else rotary._replace(idx=idx)
        update = parts.attend(getattr(block, parts.attn), h, where, log_sizes)
        h = ops.add_norm_(x, idx, update, scale1, norm2.weight, norm2.bias, norm2.eps)
        update = block.mlp(h)
        if layer == state.last:
            ops.add_(x, idx, update, scale2)
            if pruned is not None and pruned.by_host:  # no block sees the tokens that are restored
                return ops.add_parents(x, pruned.parent), None
            break
        following = getattr(blocks[layer + 1].block, blocks[layer + 1].norm1)
        if pruned is not None and layer < len(counts) and counts[layer] < count:
            count = counts[layer]
            idx = pruned.add_prune_(x, idx, update, scale2, state.stack[layer].query(), count)
            if pruned.merge is not None:
                log_sizes = pruned.log_sizes
            else:
                log_sizes = None if masks is None else masks.log_sizes(idx)
        elif pruned is not None and layer == state.fused_after:
            ops.add_(x, idx, update, scale2)
            x = ops.add_parents(x, pruned.parent) if pruned.by_host else x
            idx, pruned = None, None
            log_sizes = None if masks is None else masks.log_sizes(None)
        else:
            h = ops.add_norm_(x, idx, update, scale2, following.weight, following.bias, following.eps)
            continue
        h = _norm(x, idx, following)
    if idx is None:
        return x, None
    merges = pruned is not None and pruned.merge is not None and state.options.whole
    return ops.gather(x, pruned.positions() if pruned is not None and merges else idx), idx


class Pruned:
    """What is remembered of the pruned tokens while a batch goes through the network."""

    def __init__(
        self, config: PruningConfig, x: Tensor, num_prefix: int, priorities: tuple[Tensor | None, Tensor | None]
    ):
        self.merge, self.num_prefix, self.modules = config.merge, num_prefix, 0
        self.priorities = priorities  # (B, N) each, in turns
        self.by_host = config.llf is not None and config.llf.by_host
        if self.merge is not None:
            self.sizes = x.new_ones(x.shape[:2], dtype=torch.float32)  # by position
            self.costs = torch.ones_like(self.sizes)
        if self.merge is not None or self.by_host:  # where each token went, or its host is
            self.parent = torch.arange(x.shape[1], device=x.device).repeat(x.shape[0], 1)
        self.log_sizes: Tensor | None = None  # (B, K), of the active tokens, for their attention

    def add_prune_(
        self,
        x: Tensor,
        idx: Tensor | None,
        update: Tensor,
        gamma: Tensor | None,
        query: Tensor,
        num_keep: int,
    ) -> Tensor:
        """End a block as add_select_ does, and drop or merge the pruned tokens: (B, num_keep), the positions kept."""
        prefix, before, priority = self.num_prefix, self.modules, self.priorities[self.modules % 2]
        self.modules += 1
        if self.merge is None:
            kept_idx, pruned_idx = ops.add_select_(x, idx, update, gamma, query, num_keep, prefix, priority=priority)
            if self.by_host:
                ops.parent_offsets_(x, kept_idx, pruned_idx, self.parent, prefix)
            return kept_idx
        weight = self.merge.size_weight if before else 0.0  # at first every size is one
        safe = self.merge.num_safe(update.shape[1], num_keep, prefix)
        parts = (self.sizes, weight, priority, self.costs, COST_WEIGHT)
        split = ops.add_select_(x, idx, update, gamma, query, safe, prefix, *parts)
        kept_idx, _, kept_sizes = ops.merge_(
            x, *split, self.sizes, self.parent, num_keep, prefix, self.by_host, self.costs
        )
        self.log_sizes = log_sizes(kept_sizes)
        return kept_idx

    def positions(self) -> Tensor:
        """For every token the position at which it is now: (B, N)."""
        return resolve_parents(self.parent, self.modules)


def _norm(x: Tensor, idx: Tensor | None, norm: Any) -> Tensor:
    return ops.gather_norm(x, idx, norm.weight, norm.bias, norm.eps)
