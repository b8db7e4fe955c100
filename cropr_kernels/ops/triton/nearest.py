"""Of some tokens the one most like each of others, by cosine: what merge and hosts have in common, as csrc/nearest.h.

The code says in which order floats are added up, not the layout that the compiler picks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .select import KeyBlocks

BLOCK = 1024  # of a list of positions, that a program takes at a time


class TargetBlocks(NamedTuple):
    """Safe tokens and candidates that a program of targets_kernel compares, columns it takes at a time, and positions
    of a list."""

    safe: int
    candidates: int
    cols: int
    positions: int


@triton.jit
def load_positions(idx_ptr, offs, count, n):
    """Positions idx[offs], and which of them exist: inside the list, and inside the n tokens."""
    position = tl.load(idx_ptr + offs, mask=offs < count, other=-1)
    exists = (position >= 0) & (position < n)
    return tl.where(exists, position, 0), exists


@triton.jit
def sum_pairs(x, LEVELS: tl.constexpr):
    """Add neighbours along axis 1, LEVELS times over: a sum whose order no layout can change."""
    for _ in tl.static_range(LEVELS):
        even, odd = tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
        x = even + odd
    return x


@triton.jit
def sum_rows(x):
    """Add up each row, neighbours first."""
    for _ in tl.static_range(8):
        if x.shape[1] > 1:
            x = sum_pairs(x, 1)
    return x.reshape(x.shape[0])


@triton.jit
def lowest_of_nearest(similarity, slots):
    """Along axis 0 the largest similarity, and the lowest slot that has it."""
    best = tl.max(similarity, axis=0)
    return best, tl.min(tl.where(similarity == best[None, :], slots, 0x7FFFFFFF), axis=0)


@triton.jit
def nearest_in_tile(features, b, tokens, slots, candidates, num_safe, num_candidates, n, BLOCKS: tl.constexpr):
    """Of the safe tokens at `slots` the one most like each candidate, by cosine; NaN is the lowest."""
    ACC: tl.constexpr = tl.float64 if features.ptr.dtype.element_ty == tl.float64 else tl.float32
    BLOCK_S: tl.constexpr = BLOCKS.safe
    BLOCK_C: tl.constexpr = BLOCKS.candidates
    BLOCK_D: tl.constexpr = BLOCKS.cols
    dim = features.dim
    position, safe = load_positions(tokens.safe_idx, slots, num_safe, n)
    origin, candidate = load_positions(tokens.candidate_idx, candidates, num_candidates, n)
    ptr = features.ptr + b * features.stride_b
    safe_ptr = ptr + position[:, None] * features.stride_n
    candidate_ptr = ptr + origin[:, None] * features.stride_n
    product = tl.zeros([BLOCK_S, BLOCK_C], ACC)
    safe_squares = tl.zeros([BLOCK_S, BLOCK_D // 8], ACC)
    squares = tl.zeros([BLOCK_C, BLOCK_D // 8], ACC)
    for first in range(0, dim, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)[None, :]
        rows = tl.load(safe_ptr + cols, mask=safe[:, None] & (cols < dim), other=0.0)
        others = tl.load(candidate_ptr + cols, mask=candidate[:, None] & (cols < dim), other=0.0)
        product = tl.dot(rows, tl.trans(others), product, input_precision="ieee", out_dtype=ACC)
        safe_squares += sum_pairs(rows.to(ACC) * rows.to(ACC), 3)
        squares += sum_pairs(others.to(ACC) * others.to(ACC), 3)
    safe_length, length = tl.sqrt(sum_rows(safe_squares)), tl.sqrt(sum_rows(squares))
    similarity = product / safe_length[:, None] / length[None, :]
    similarity = tl.where(safe[:, None] & (similarity == similarity), similarity, float("-inf"))
    return lowest_of_nearest(similarity, slots[:, None])


@triton.jit
def nearest_in_image(scratch, candidates, tiles, num_candidates, num_prefix, BLOCKS: tl.constexpr):
    """Of all safe tokens the one most like each candidate: tiles ascend and only more wins, the lowest of equals."""
    BLOCK_T: tl.constexpr = 16
    BLOCK_C: tl.constexpr = BLOCKS.candidates
    ACC: tl.constexpr = scratch.partial.dtype.element_ty
    inside = (candidates < num_candidates)[None, :]
    best = tl.full([BLOCK_C], float("-inf"), ACC)
    nearest = tl.zeros([BLOCK_C], tl.int32) + num_prefix
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)[:, None]
        at = tile.to(tl.int64) * num_candidates + candidates[None, :]
        mask = (tile < tiles) & inside
        values = tl.load(scratch.partial + at, mask=mask, other=float("-inf"), cache_modifier=".cg")
        slots = tl.load(scratch.partial_idx + at, mask=mask, other=0x7FFFFFFF, cache_modifier=".cg")
        value, slot = lowest_of_nearest(values, slots)
        nearest = tl.where(value > best, slot, nearest)
        best = tl.maximum(best, value)
    return best, nearest


def target_blocks(dtype: torch.dtype, num_candidates: int) -> tuple[TargetBlocks, KeyBlocks]:
    """Blocks of targets_kernel: what registers hold without spilling."""
    tile = {2: (64, 64, 32), 4: (32, 32, 16), 8: (32, 16, 16)}[dtype.itemsize]
    keys = min(max(triton.next_power_of_2(num_candidates), 128), BLOCK)
    return TargetBlocks(*tile, BLOCK), KeyBlocks(keys, num_candidates <= keys)
