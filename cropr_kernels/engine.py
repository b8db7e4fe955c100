"""The inference engine: one residual buffer in which no token ever moves.

    x (B, N, D) holds every token at its position for the whole network; idx (B, K) names those still alive.
    h = norm(x[idx]);  x[idx] += attention(h), h = norm(x[idx]);  x[idx] += mlp(h), idx = idx[select(x[idx] . q)]

So pruning costs one selection a layer, and Last Layer Fusion nothing: the last block reads all of x, where the
dropped tokens still are. The functional form of the same stream is `cropr_kernels.stream`.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ops = torch.ops.cropr


class Rotary(NamedTuple):
    """Rotary positions of the tokens alive: table (patches, 2 C) by position, never gathered per image."""

    table: Tensor
    idx: Tensor | None
    num_prefix: int

    def rotate_(self, heads: Tensor, *, half: bool = False) -> None:
        """Turn queries or keys (B, H, K, C) in place."""
        ops.rotate_(heads.transpose(1, 2), self.table, self.idx, self.num_prefix, half)


@dataclass(frozen=True)
class FusedBlock:
    """A pre-norm block x + g1 * attention(norm1(x)), x + g2 * mlp(norm2(x)), as the engine runs it.

    Modules are looked up in `block` at every call, so replaced parameters are seen.
    """

    block: Any  # with norm1, norm2 (LayerNorm), attn and mlp
    attention: Callable[[Any, Tensor, Rotary | None], Tensor]  # (block.attn, h (B, K, D), rotary) -> update
    scales: Callable[[Any], tuple[Tensor | None, Tensor | None]]  # block -> LayerScale's g1, g2


def why_not_fused(block: Any) -> str | None:
    """What keeps a block with norm1, attn, norm2 and mlp out of the engine; None if nothing does."""
    for name in ("norm1", "norm2"):
        norm = getattr(block, name)
        if type(norm).__name__ != "LayerNorm" or not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1:
            return f"{name} is {type(norm).__name__}, not LayerNorm over the width"
    for name in ("", "norm1", "norm2", "ls1", "ls2", "drop_path1", "drop_path2"):
        module = getattr(block, name) if name and hasattr(block, name) else block
        if module._forward_hooks or module._forward_pre_hooks:
            return f"forward hooks on {name or 'the block'}"
    return None


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
) -> Tensor:
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

    Returns:
        The tokens after the norm: (B, K, D) in order of position, or all (B, N, D) with LLF.

    Raises:
        RuntimeError: gradients are enabled and a block's parameters require them.
    """
    idx: Tensor | None = None
    alive, depth = x.shape[1], len(blocks)
    tickets: Tensor | None = None
    h = _norm_of(x, None, blocks[0].block.norm1)
    for layer, fused in enumerate(blocks):
        block = fused.block
        scale1, scale2 = fused.scales(block)
        update = fused.attention(block.attn, h, None if rope is None else Rotary(rope, idx, num_prefix))
        _refuse_gradient(update)
        h = ops.add_norm_(x, idx, update, scale1, block.norm2.weight, block.norm2.bias, block.norm2.eps)
        update = block.mlp(h)
        _refuse_gradient(update)
        following = blocks[layer + 1].block.norm1 if layer + 1 < depth else norm
        prunes = layer < len(modules) and counts[layer] < alive
        reunites = llf and layer + 2 == depth and (prunes or idx is not None)
        if prunes:
            alive = counts[layer]
            tickets = x.new_zeros(x.shape[0], dtype=torch.int32) if tickets is None else tickets
            query = modules[layer].query()
            idx, _ = ops.add_select_(x, idx, update, scale2, query, tickets, alive, num_prefix)
        elif reunites or not isinstance(following, nn.LayerNorm):
            ops.add_(x, idx, update, scale2)
        else:
            h = ops.add_norm_(x, idx, update, scale2, following.weight, following.bias, following.eps)
            continue
        if reunites:
            idx, alive = None, x.shape[1]
        h = _norm_of(x, idx, following)
    return h


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
    images: Tensor
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

    def __call__(self, run: Callable[[Tensor], Tensor], images: Tensor, key: Hashable) -> Tensor:
        """run(images), replayed; the result is a copy that later calls leave alone."""
        found = self.captured.get(key)
        if found is None:
            while len(self.captured) >= self.capacity:
                self.captured.popitem(last=False)
            found = self.captured[key] = self.capture(run, images)
        self.captured.move_to_end(key)
        found.images.copy_(images)
        found.graph.replay()
        return found.output.clone()

    def capture(self, run: Callable[[Tensor], Tensor], images: Tensor) -> Captured:
        static = images.clone()
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):  # compiles kernels and fills caches, which capture must not do
            for _ in range(2):
                run(static)
        torch.cuda.current_stream(images.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run(static)
        return Captured(graph, static, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Graphs":
        return Graphs(self.capacity)  # graphs belong to the tensors they were captured with

    def __reduce__(self) -> tuple[type["Graphs"], tuple[int]]:
        return Graphs, (self.capacity,)
