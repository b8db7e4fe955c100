"""cropr::parent_offsets, parent_offsets_ and add_parents on CUDA: restoring pruned tokens with the
change of their parents.

Offsets take one launch. A program compares a tile of kept tokens with a tile of pruned ones; the
last of those that share pruned tokens finds the parent of each, and subtracts its row. Adding up
takes one more launch: a program holds a tile of rows, and follows the parents of all of them. The
order of sums is fixed by the code, as in merge.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..reference import accumulation_dtype
from ..validation import check
from .launching import launch
from .nearest import load_positions, nearest_in_image, nearest_in_tile, target_blocks
from .select import is_last
from .utils import STREAM, aligned_rows, dense_rows, row_blocks, rows_of

_NUM_WARPS = 4
_REGISTERS = 200  # per thread; with fewer, ptxas spills on some architectures


class Tokens(NamedTuple):
    """Positions of kept tokens (B, K) and of pruned ones (B, R), named as in merge: nearest.py
    takes both."""

    target_idx: Any
    candidate_idx: Any


class Scratch(NamedTuple):
    """Best similarity of each pruned token and the kept token it is with, by tile of kept tokens
    (B, tiles, R); and counters of finished programs by group of pruned tokens (B, groups)."""

    partial: Any
    partial_idx: Any
    counters: Any


class Offsets(NamedTuple):
    """Outputs: offsets (B, R, D), or None to write to the rows of x; and parents, (B, R) or by
    position (B, N)."""

    ptr: Any
    parent_idx: Any


@triton.jit(do_not_specialize=["n", "num_keep", "num_prune", "num_prefix"])
def offsets_kernel(
    x, tokens, scratch, offsets, n, num_keep, num_prune, num_prefix, BLOCKS: tl.constexpr
):
    BLOCK_D: tl.constexpr = BLOCKS.cols
    ACC: tl.constexpr = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32
    dim = x.dim
    tiles = tl.maximum(tl.cdiv(num_keep - num_prefix, BLOCKS.targets), 1)
    groups = tl.cdiv(num_prune, BLOCKS.candidates)
    pid = tl.program_id(0)
    b = (pid // (tiles * groups)).to(tl.int64)
    group = pid // tiles % groups
    tile = pid % tiles
    tokens = Tokens(tokens.target_idx + b * num_keep, tokens.candidate_idx + b * num_prune)
    scratch = Scratch(
        scratch.partial + b * tiles * num_prune,
        scratch.partial_idx + b * tiles * num_prune,
        scratch.counters + b * groups + group,
    )
    target_rows = num_prefix + tile * BLOCKS.targets + tl.arange(0, BLOCKS.targets)
    pruned = group * BLOCKS.candidates + tl.arange(0, BLOCKS.candidates)
    inside = pruned < num_prune
    best, nearest = nearest_in_tile(
        x, b, tokens, target_rows, pruned, num_keep, num_prune, n, BLOCKS
    )
    partial_offs = tile.to(tl.int64) * num_prune + pruned
    tl.store(scratch.partial + partial_offs, best, mask=inside)
    tl.store(scratch.partial_idx + partial_offs, nearest, mask=inside)
    if is_last(scratch.counters, tiles):
        _, nearest = nearest_in_image(scratch, pruned, tiles, num_prune, num_prefix, BLOCKS)
        parent, has_parent = load_positions(tokens.target_idx, nearest, num_keep, n)
        position, exists = load_positions(tokens.candidate_idx, pruned, num_prune, n)
        moves = exists & has_parent
        x_ptr = x.ptr + b * x.stride_b
        parent_row_ptr = x_ptr + parent[:, None] * x.stride_n
        pruned_row_ptr = x_ptr + position[:, None] * x.stride_n
        if offsets.ptr is None:
            tl.store(offsets.parent_idx + b * n + position, parent, mask=moves)
            out_ptr = pruned_row_ptr
        else:
            tl.store(offsets.parent_idx + b * num_prune + pruned, parent, mask=inside)
            out_ptr = offsets.ptr + (b * num_prune + pruned)[:, None] * dim
        for first in range(0, dim, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)[None, :]
            mask = moves[:, None] & (cols < dim)
            row = tl.load(pruned_row_ptr + cols, mask=mask, other=0.0)
            parent_row = tl.load(parent_row_ptr + cols, mask=mask, other=0.0)
            tl.debug_barrier()  # in place, all threads have read the rows before one stores them
            tl.store(out_ptr + cols, (row.to(ACC) - parent_row.to(ACC)).to(row.dtype), mask=mask)


def _launch_offsets(x, kept_idx, pruned_idx, offsets, num_prefix):
    batch, n, _ = x.shape
    num_keep = kept_idx.shape[1]
    num_prune = pruned_idx.shape[1]
    if not (batch and num_prune):
        return
    blocks, _ = target_blocks(x.dtype, num_prune)
    blocks = blocks._replace(
        candidates=min(blocks.candidates, max(triton.next_power_of_2(num_prune), 16))
    )
    tiles = max(triton.cdiv(num_keep - num_prefix, blocks.targets), 1)
    groups = triton.cdiv(num_prune, blocks.candidates)
    partial = x.new_empty((batch, tiles, num_prune), dtype=accumulation_dtype(x.dtype))
    partial_idx = x.new_empty(partial.shape, dtype=torch.int32)
    scratch = Scratch(partial, partial_idx, x.new_zeros((batch, groups), dtype=torch.int32))
    launch(
        offsets_kernel, batch * tiles * groups,
        rows_of(x), Tokens(kept_idx.contiguous(), pruned_idx.contiguous()), scratch, offsets,
        n, num_keep, num_prune, num_prefix, blocks, num_warps=_NUM_WARPS, maxnreg=_REGISTERS,
    )  # fmt: skip


def parent_offsets(x, kept_idx, pruned_idx, num_prefix=0):
    """Launch cropr::parent_offsets. Positions must be distinct and in [0, N): they are not checked
    on the device."""
    check("parent_offsets", x, kept_idx, pruned_idx, num_prefix)
    x = dense_rows(x)
    offset = x.new_empty((*pruned_idx.shape, x.shape[2]))
    parent_idx = x.new_empty(pruned_idx.shape, dtype=torch.int64)
    _launch_offsets(x, kept_idx, pruned_idx, Offsets(offset, parent_idx), num_prefix)
    return offset, parent_idx


def parent_offsets_(x, kept_idx, pruned_idx, parent, num_prefix=0):
    """Launch cropr::parent_offsets_. Positions must be distinct and in [0, N): they are not checked
    on the device."""
    check("parent_offsets_", x, kept_idx, pruned_idx, parent, num_prefix)
    _launch_offsets(x, kept_idx, pruned_idx, Offsets(None, parent), num_prefix)


@triton.jit
def parents_of(parent_ptr, position, active, n):
    """Load the parents of tokens (R,), and a mask of the active tokens whose parent is another
    token."""
    parent = tl.load(parent_ptr + position, mask=active, other=-1)
    active = active & (parent >= 0) & (parent < n) & (parent != position)
    return tl.where(active, parent, position), active


@triton.jit
def sum_ancestors(x_ptr, stride_n, parent_ptr, rows, inside, cols, dim, n, ACC: tl.constexpr):
    """Add to each row, in these columns, those of all its ancestors."""
    mask = (cols < dim)[None, :]
    token = tl.load(
        x_ptr + rows[:, None] * stride_n + cols[None, :], mask=inside[:, None] & mask, other=0.0
    )
    sums = tl.zeros(token.shape, ACC)
    position, active = parents_of(parent_ptr, rows, inside, n)
    step = n * 0
    while (tl.max(active.to(tl.int32), axis=0) > 0) & (step < n):  # bounded, so that cycles end
        ptr = x_ptr + position[:, None] * stride_n + cols[None, :]
        sums += tl.load(ptr, mask=active[:, None] & mask, other=0.0).to(ACC)
        position, active = parents_of(parent_ptr, position, active, n)
        step += 1
    return (token.to(ACC) + sums).to(token.dtype)


@triton.jit(do_not_specialize=["n"])
def add_parents_kernel(x, parent_ptr, out_ptr, n, BLOCKS: tl.constexpr):
    ACC: tl.constexpr = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32
    dim = x.dim
    tiles = tl.cdiv(n, BLOCKS.rows)
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    rows = ((pid % tiles) * BLOCKS.rows + tl.arange(0, BLOCKS.rows)).to(tl.int64)
    inside = rows < n
    x_ptr = x.ptr + b * x.stride_b
    parent_ptr = parent_ptr + b * n
    out_ptr += (b * n + rows)[:, None] * dim
    cols = tl.arange(0, BLOCKS.first)
    total = sum_ancestors(x_ptr, x.stride_n, parent_ptr, rows, inside, cols, dim, n, ACC)
    tl.store(out_ptr + cols[None, :], total, mask=inside[:, None] & (cols < dim)[None, :])
    if BLOCKS.rest > 0:
        cols = BLOCKS.first + tl.arange(0, BLOCKS.rest)
        total = sum_ancestors(x_ptr, x.stride_n, parent_ptr, rows, inside, cols, dim, n, ACC)
        tl.store(out_ptr + cols[None, :], total, mask=inside[:, None] & (cols < dim)[None, :])


def add_parents(x, parent):
    """Launch cropr::add_parents. Parents outside [0, N) add nothing, and cycles end: they are not
    checked."""
    check("add_parents", x, parent)
    x = aligned_rows(x)
    out = x.new_empty(x.shape)
    batch, n, dim = x.shape
    if x.numel():
        blocks = row_blocks(dim, x.dtype)
        launch(
            add_parents_kernel, batch * triton.cdiv(n, blocks.rows),
            rows_of(x), parent.contiguous(), out, n, blocks, **STREAM,
        )  # fmt: skip
    return out
