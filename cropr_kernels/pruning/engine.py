"""The inference engine: one residual buffer in which no token ever moves.

    x (B, N, D) holds every token at its position for the whole network; idx (B, K) names those still alive.
    h = norm(x[idx]);  x[idx] += attention(h), h = norm(x[idx]);  x[idx] += mlp(h), idx = idx[select(x[idx] . q)]

So pruning costs one selection a layer, and Last Layer Fusion nothing: the last block reads all of x, where the
dropped tokens still are. Merging changes the rows that tokens go into, and moves none. The functional form of the same
stream is `cropr_kernels.pruning.state`.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models.blocks import FusedBlock, Rotary
from .masks import Masks
from .merging import Merge, follow

ops = torch.ops.cropr


class Ended(NamedTuple):
    """What leaves the engine."""

    tokens: Tensor  # after the norm: (B, K, D) in order of position, or all (B, N, D) with LLF
    rows: Tensor | None  # (B, N), where tokens merged: the row of `tokens` in which each token is
    positions: Tensor | None  # (B, K), of the tokens; None: all, in order


def run_stream(
    blocks: Sequence[FusedBlock],
    modules: Any,
    counts: Sequence[int],
    x: Tensor,
    norm: Any,
    *,
    num_prefix: int,
    llf: bool,
    rope: Tensor | None = None,
    merge: Merge | None = None,
    masks: Masks | None = None,
) -> Ended:
    """Run x through the blocks and the last norm. Inference only: x changes in place and has no gradient.

    Args:
        blocks: one FusedBlock per block.
        modules: Cropr modules, one per count; block l is followed by module l.
        counts: kept tokens after each module; a count equal to that before it prunes nothing.
        x: (B, N, D), the residual buffer; contiguous, and nobody else's.
        norm: what follows the last block; fused if it is a LayerNorm.
        num_prefix: P, first tokens that are never pruned.
        llf: the last block sees all tokens again.
        rope: rotary table (patches, 2 C), rows by patch position.
        merge: how tokens that leave merge into those that stay.
        masks: tokens that stay or leave whatever their score, and those that no other may see; no padding with merge.

    Raises:
        RuntimeError: gradients are enabled and a block's parameters require them.
    """
    idx: Tensor | None = None
    alive, depth = x.shape[1], len(blocks)
    merged = Merged(merge, x, num_prefix) if merge is not None and counts and counts[-1] < alive else None
    priority = None if masks is None else masks.priority
    log_sizes = None if masks is None else masks.log_sizes(None)
    h = _norm_of(x, None, blocks[0].block.norm1)
    for layer, fused in enumerate(blocks):
        block = fused.block
        scale1, scale2 = fused.scales(block)
        rotary = None if rope is None else Rotary(rope, idx, num_prefix)
        prunes = layer < len(modules) and counts[layer] < alive
        update, _ = fused.attention(h, rotary, log_sizes)
        _refuse_gradient(update)
        h = ops.add_norm_(x, idx, update, scale1, block.norm2.weight, block.norm2.bias, block.norm2.eps)
        update = block.mlp(h)
        _refuse_gradient(update)
        following = blocks[layer + 1].block.norm1 if layer + 1 < depth else norm
        reunites = llf and layer + 2 == depth and (prunes or idx is not None)
        if prunes:
            query = modules[layer].query()
            if merged is None:
                idx, _ = ops.add_select_(x, idx, update, scale2, query, counts[layer], num_prefix, priority=priority)
                log_sizes = None if masks is None else masks.log_sizes(idx)
            else:
                idx = merged.add_merge_(x, idx, update, scale2, query, counts[layer], priority)
                log_sizes = merged.log_sizes
            alive = counts[layer]
        elif reunites or not isinstance(following, nn.LayerNorm):
            ops.add_(x, idx, update, scale2)
        else:
            h = ops.add_norm_(x, idx, update, scale2, following.weight, following.bias, following.eps)
            continue
        if reunites:
            idx, alive, merged = None, x.shape[1], None
            log_sizes = None if masks is None else masks.log_sizes(None)
        h = _norm_of(x, idx, following)
    return Ended(h, None if merged is None or idx is None else merged.rows(idx), idx)


class Merged:
    """What merging remembers while a batch goes through the network."""

    def __init__(self, how: Merge, x: Tensor, num_prefix: int):
        self.how, self.num_prefix, self.merges = how, num_prefix, 0
        self.sizes = x.new_ones(x.shape[:2], dtype=torch.float32)  # by position
        self.parent = torch.arange(x.shape[1], device=x.device).repeat(x.shape[0], 1)  # where each token went
        self.log_sizes: Tensor | None = None  # (B, K), of the tokens alive, for their attention

    def add_merge_(
        self,
        x: Tensor,
        idx: Tensor | None,
        update: Tensor,
        gamma: Tensor | None,
        query: Tensor,
        num_keep: int,
        priority: Tensor | None,
    ) -> Tensor:
        """End a block as add_select_ does, and merge who leaves: (B, num_keep), the positions that stay."""
        count, prefix = update.shape[1], self.num_prefix
        weight = self.how.size_weight if self.merges else 0.0  # at first every size is one
        safe = self.how.num_safe(count, num_keep, prefix)
        split = ops.add_select_(x, idx, update, gamma, query, safe, prefix, self.sizes, weight, priority)
        kept_idx, _, kept_sizes = ops.merge_(x, *split, self.sizes, self.parent, num_keep, prefix)
        self.merges += 1
        self.log_sizes = kept_sizes.log() if self.how.proportional else None
        return kept_idx

    def rows(self, idx: Tensor) -> Tensor:
        """For every token the row among those at idx (B, K), ascending, in which it is: (B, N)."""
        return torch.searchsorted(idx, follow(self.parent, self.merges))


def _refuse_gradient(update: Tensor) -> None:
    """Parameters of a block that someone unfroze would not learn: say so instead."""
    if update.requires_grad:
        raise RuntimeError(
            "the engine computes no gradients, and a block has parameters that require one: call the model under "
            "torch.no_grad(), freeze it, or deploy(model, engine=False)"
        )


def _norm_of(x: Tensor, idx: Tensor | None, norm: Any) -> Tensor:
    """The norm of the tokens alive; a LayerNorm reads them where they are."""
    if isinstance(norm, nn.LayerNorm):
        return ops.gather_norm(x, idx, norm.weight, norm.bias, norm.eps)
    return norm(x if idx is None else ops.gather(x, idx))


class Captured(NamedTuple):
    graph: Any
    inputs: tuple[Tensor, ...]
    output: Tensor


class Graphs:
    """CUDA graphs of one model, captured at the first call for each key, the least recently used dropped first.

    A replay runs the whole network without Python or launches. Every graph holds the memory of one forward.
    """

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"Graphs: capacity must be >= 1, got {capacity}")
        self.capacity = capacity
        self.captured: OrderedDict[Hashable, Captured] = OrderedDict()

    def __call__(self, run: Callable[..., Tensor], inputs: tuple[Tensor, ...], key: Hashable) -> Tensor:
        """run(*inputs), replayed; the result is a copy that later calls leave alone."""
        found = self.captured.get(key)
        if found is None:
            while len(self.captured) >= self.capacity:
                self.captured.popitem(last=False)
            found = self.captured[key] = self.capture(run, inputs)
        self.captured.move_to_end(key)
        for static, value in zip(found.inputs, inputs):
            static.copy_(value)
        found.graph.replay()
        return found.output.clone()

    def capture(self, run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Captured:
        static, device = tuple(value.clone() for value in inputs), inputs[0].device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # compiles kernels and fills caches, which capture must not do
            for _ in range(2):
                run(*static)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run(*static)
        return Captured(graph, static, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Graphs":
        return Graphs(self.capacity)  # graphs belong to the tensors they were captured with

    def __reduce__(self) -> tuple[type["Graphs"], tuple[int]]:
        return Graphs, (self.capacity,)
