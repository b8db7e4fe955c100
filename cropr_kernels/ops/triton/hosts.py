"""cropr::host_offsets, host_offsets_ and add_hosts on CUDA: what pruned tokens need to be restored with their hosts.

Offsets take one launch. A program compares a tile of kept tokens with a tile of pruned ones; the last of those that
share pruned tokens finds the host of each, and subtracts its row. Adding up takes one launch more: a program holds a
tile of rows, and follows the parents of all of them. Sums are ordered by the code, as in merge.
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
_REGISTERS = 200  # a thread may have; with fewer ptxas spills on some architectures


class Tokens(NamedTuple):
    """Positions of kept tokens (B, K) and of pruned ones (B, R), by the names that merge has for them."""

    safe_idx: Any
    candidate_idx: Any


class Scratch(NamedTuple):
    """Each pruned token's best similarity, and with which kept token, by tile of these (B, T, R), and how many programs
    of each group of pruned tokens are done (B, G)."""

    partial: Any
    partial_idx: Any
    counters: Any


class Offsets(NamedTuple):
    """Where offsets go, (B, R, D) or None for the rows of x themselves; and hosts, (B, R) or by position (B, N)."""

    ptr: Any
    host_idx: Any


@triton.jit(do_not_specialize=["n", "num_keep", "num_prune", "num_prefix"])
def offsets_kernel(x, tokens, scratch, offsets, n, num_keep, num_prune, num_prefix, BLOCKS: tl.constexpr):
    BLOCK_D: tl.constexpr = BLOCKS.cols
    ACC: tl.constexpr = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32
    dim = x.dim
    tiles = tl.maximum(tl.cdiv(num_keep - num_prefix, BLOCKS.safe), 1)
    groups = tl.cdiv(num_prune, BLOCKS.candidates)
    pid = tl.program_id(0)
    b = (pid // (tiles * groups)).to(tl.int64)
    group = pid // tiles % groups
    tile = pid % tiles
    tokens = Tokens(tokens.safe_idx + b * num_keep, tokens.candidate_idx + b * num_prune)
    scratch = Scratch(
        scratch.partial + b * tiles * num_prune,
        scratch.partial_idx + b * tiles * num_prune,
        scratch.counters + b * groups + group,
    )
    slots = num_prefix + tile * BLOCKS.safe + tl.arange(0, BLOCKS.safe)
    pruned = group * BLOCKS.candidates + tl.arange(0, BLOCKS.candidates)
    inside = pruned < num_prune
    best, nearest = nearest_in_tile(x, b, tokens, slots, pruned, num_keep, num_prune, n, BLOCKS)
    at = tile.to(tl.int64) * num_prune + pruned
    tl.store(scratch.partial + at, best, mask=inside)
    tl.store(scratch.partial_idx + at, nearest, mask=inside)
    if is_last(scratch.counters, tiles):
        _, nearest = nearest_in_image(scratch, pruned, tiles, num_prune, num_prefix, BLOCKS)
        host, there = load_positions(tokens.safe_idx, nearest, num_keep, n)
        own, exists = load_positions(tokens.candidate_idx, pruned, num_prune, n)
        moves = exists & there
        x_ptr = x.ptr + b * x.stride_b
        host_ptr = x_ptr + host[:, None] * x.stride_n
        own_ptr = x_ptr + own[:, None] * x.stride_n
        if offsets.ptr is None:
            tl.store(offsets.host_idx + b * n + own, host, mask=moves)
            out_ptr = own_ptr
        else:
            tl.store(offsets.host_idx + b * num_prune + pruned, host, mask=inside)
            out_ptr = offsets.ptr + (b * num_prune + pruned)[:, None] * dim
        for first in range(0, dim, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)[None, :]
            mask = moves[:, None] & (cols < dim)
            row = tl.load(own_ptr + cols, mask=mask, other=0.0)
            other = tl.load(host_ptr + cols, mask=mask, other=0.0)
            tl.debug_barrier()  # in place, all threads have read the rows before one stores them
            tl.store(out_ptr + cols, (row.to(ACC) - other.to(ACC)).to(row.dtype), mask=mask)


def _launch_offsets(x, kept_idx, pruned_idx, offsets, num_prefix):
    (batch, n, _), num_keep, num_prune = x.shape, kept_idx.shape[1], pruned_idx.shape[1]
    if not (batch and num_prune):
        return
    blocks, _ = target_blocks(x.dtype, num_prune)
    blocks = blocks._replace(candidates=min(blocks.candidates, max(triton.next_power_of_2(num_prune), 16)))
    tiles = max(triton.cdiv(num_keep - num_prefix, blocks.safe), 1)
    groups = triton.cdiv(num_prune, blocks.candidates)
    partial = x.new_empty((batch, tiles, num_prune), dtype=accumulation_dtype(x.dtype))
    partial_idx = x.new_empty(partial.shape, dtype=torch.int32)
    scratch = Scratch(partial, partial_idx, x.new_zeros((batch, groups), dtype=torch.int32))
    launch(
        offsets_kernel, batch * tiles * groups,
        rows_of(x), Tokens(kept_idx.contiguous(), pruned_idx.contiguous()), scratch, offsets,
        n, num_keep, num_prune, num_prefix, blocks, num_warps=_NUM_WARPS, maxnreg=_REGISTERS,
    )  # fmt: skip


def host_offsets(x, kept_idx, pruned_idx, num_prefix=0):
    """Launch cropr::host_offsets. Positions must be distinct and in [0, N): they are not checked on the device."""
    check("host_offsets", x, kept_idx, pruned_idx, num_prefix)
    x = dense_rows(x)
    offset = x.new_empty((*pruned_idx.shape, x.shape[2]))
    host_idx = x.new_empty(pruned_idx.shape, dtype=torch.int64)
    _launch_offsets(x, kept_idx, pruned_idx, Offsets(offset, host_idx), num_prefix)
    return offset, host_idx


def host_offsets_(x, kept_idx, pruned_idx, parent, num_prefix=0):
    """Launch cropr::host_offsets_. Positions must be distinct and in [0, N): they are not checked on the device."""
    check("host_offsets_", x, kept_idx, pruned_idx, parent, num_prefix)
    _launch_offsets(x, kept_idx, pruned_idx, Offsets(None, parent), num_prefix)


@triton.jit
def parents_of(parent_ptr, position, active, n):
    """The parents of tokens (R,), and which of the active ones have one beside themselves."""
    parent = tl.load(parent_ptr + position, mask=active, other=-1)
    active = active & (parent >= 0) & (parent < n) & (parent != position)
    return tl.where(active, parent, position), active


@triton.jit
def add_parents(x_ptr, stride_n, parent_ptr, rows, inside, cols, dim, n, ACC: tl.constexpr):
    """These columns of the rows, with those of all tokens that their parents lead to."""
    mask = (cols < dim)[None, :]
    own = tl.load(x_ptr + rows[:, None] * stride_n + cols[None, :], mask=inside[:, None] & mask, other=0.0)
    sums = tl.zeros(own.shape, ACC)
    position, active = parents_of(parent_ptr, rows, inside, n)
    step = n * 0
    while (tl.max(active.to(tl.int32), axis=0) > 0) & (step < n):  # parents that lead in a circle end as well
        ptr = x_ptr + position[:, None] * stride_n + cols[None, :]
        sums += tl.load(ptr, mask=active[:, None] & mask, other=0.0).to(ACC)
        position, active = parents_of(parent_ptr, position, active, n)
        step += 1
    return (own.to(ACC) + sums).to(own.dtype)


@triton.jit(do_not_specialize=["n"])
def add_hosts_kernel(x, parent_ptr, out_ptr, n, BLOCKS: tl.constexpr):
    ACC: tl.constexpr = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32
    dim = x.dim
    tiles = tl.cdiv(n, BLOCKS.rows)
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    rows = ((pid % tiles) * BLOCKS.rows + tl.arange(0, BLOCKS.rows)).to(tl.int64)
    inside = rows < n
    x_ptr, parent_ptr = x.ptr + b * x.stride_b, parent_ptr + b * n
    out_ptr += (b * n + rows)[:, None] * dim
    cols = tl.arange(0, BLOCKS.first)
    total = add_parents(x_ptr, x.stride_n, parent_ptr, rows, inside, cols, dim, n, ACC)
    tl.store(out_ptr + cols[None, :], total, mask=inside[:, None] & (cols < dim)[None, :])
    if BLOCKS.rest > 0:
        cols = BLOCKS.first + tl.arange(0, BLOCKS.rest)
        total = add_parents(x_ptr, x.stride_n, parent_ptr, rows, inside, cols, dim, n, ACC)
        tl.store(out_ptr + cols[None, :], total, mask=inside[:, None] & (cols < dim)[None, :])


def add_hosts(x, parent):
    """Launch cropr::add_hosts. Parents outside [0, N) add nothing, and circles end: they are not checked."""
    check("add_hosts", x, parent)
    x = aligned_rows(x)
    out = x.new_empty(x.shape)
    batch, n, dim = x.shape
    if x.numel():
        blocks = row_blocks(dim, x.dtype)
        launch(
            add_hosts_kernel, batch * triton.cdiv(n, blocks.rows),
            rows_of(x), parent.contiguous(), out, n, blocks, **STREAM,
        )  # fmt: skip
    return out
