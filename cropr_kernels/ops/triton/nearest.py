"""The most similar target of each candidate, by cosine: shared by merge and parent_offsets, as
csrc/nearest.h.

The order of floating-point sums is fixed by the code, not by the layout that the compiler picks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .select import KeyBlocks

BLOCK = 1024  # positions of a list that a program loads offsets a time


class TargetBlocks(NamedTuple):
    """Block sizes of targets_kernel: targets and candidates, columns, and positions of a list."""

    targets: int
    candidates: int
    cols: int
    positions: int


@triton.jit
def load_positions(idx_ptr, offs, count, n):
    """Load positions idx[offs], and a mask of those inside the list and inside the n tokens."""
    position = tl.load(idx_ptr + offs, mask=offs < count, other=-1)
    exists = (position >= 0) & (position < n)
    return tl.where(exists, position, 0), exists


@triton.jit
def sum_pairs(x, LEVELS: tl.constexpr):
    """Add neighbours along axis 1, LEVELS times: the order of the sum does not depend on the
    layout."""
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
def lowest_of_nearest(similarity, target_rows):
    """Return the largest similarity along axis 0, and the lowest target row that has it."""
    best = tl.max(similarity, axis=0)
    return best, tl.min(tl.where(similarity == best[None, :], target_rows, 0x7FFFFFFF), axis=0)


@triton.jit
def nearest_in_tile(
    features,
    b,
    tokens,
    target_rows,
    candidates,
    num_targets,
    num_candidates,
    n,
    BLOCKS: tl.constexpr,
):
    """Find the target most similar to each candidate among `target_rows`, by cosine; NaN is the
    lowest."""
    ACC: tl.constexpr = tl.float64 if features.ptr.dtype.element_ty == tl.float64 else tl.float32
    BLOCK_T: tl.constexpr = BLOCKS.targets
    BLOCK_C: tl.constexpr = BLOCKS.candidates
    BLOCK_D: tl.constexpr = BLOCKS.cols
    dim = features.dim
    position, is_target = load_positions(tokens.target_idx, target_rows, num_targets, n)
    origin, is_candidate = load_positions(tokens.candidate_idx, candidates, num_candidates, n)
    ptr = features.ptr + b * features.stride_b
    target_ptr = ptr + position[:, None] * features.stride_n
    candidate_ptr = ptr + origin[:, None] * features.stride_n
    product = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    target_squares = tl.zeros([BLOCK_T, BLOCK_D // 8], ACC)
    candidate_squares = tl.zeros([BLOCK_C, BLOCK_D // 8], ACC)
    for first in range(0, dim, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)[None, :]
        targets = tl.load(target_ptr + cols, mask=is_target[:, None] & (cols < dim), other=0.0)
        candidate_tile = tl.load(
            candidate_ptr + cols, mask=is_candidate[:, None] & (cols < dim), other=0.0
        )
        product = tl.dot(
            targets, tl.trans(candidate_tile), product, input_precision="ieee", out_dtype=ACC
        )
        target_squares += sum_pairs(targets.to(ACC) * targets.to(ACC), 3)
        candidate_squares += sum_pairs(candidate_tile.to(ACC) * candidate_tile.to(ACC), 3)
    target_length, candidate_length = (
        tl.sqrt(sum_rows(target_squares)),
        tl.sqrt(sum_rows(candidate_squares)),
    )
    similarity = product / target_length[:, None] / candidate_length[None, :]
    similarity = tl.where(
        is_target[:, None] & (similarity == similarity), similarity, float("-inf")
    )
    return lowest_of_nearest(similarity, target_rows[:, None])


@triton.jit
def nearest_in_image(scratch, candidates, tiles, num_candidates, num_prefix, BLOCKS: tl.constexpr):
    """Find the target most similar to each candidate among all tiles, the lowest of equals: tiles
    ascend, only more wins."""
    BLOCK_TILES: tl.constexpr = 16
    BLOCK_C: tl.constexpr = BLOCKS.candidates
    ACC: tl.constexpr = scratch.partial.dtype.element_ty
    inside = (candidates < num_candidates)[None, :]
    best = tl.full([BLOCK_C], float("-inf"), ACC)
    nearest = tl.zeros([BLOCK_C], tl.int32) + num_prefix
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)[:, None]
        offsets = tile.to(tl.int64) * num_candidates + candidates[None, :]
        mask = (tile < tiles) & inside
        tile_best = tl.load(
            scratch.partial + offsets, mask=mask, other=float("-inf"), cache_modifier=".cg"
        )
        target_rows = tl.load(
            scratch.partial_idx + offsets, mask=mask, other=0x7FFFFFFF, cache_modifier=".cg"
        )
        group_best, row = lowest_of_nearest(tile_best, target_rows)
        nearest = tl.where(group_best > best, row, nearest)
        best = tl.maximum(best, group_best)
    return best, nearest


def target_blocks(dtype: torch.dtype, num_candidates: int) -> tuple[TargetBlocks, KeyBlocks]:
    """Blocks of targets_kernel that fit into registers without spilling."""
    tile = {2: (64, 64, 32), 4: (32, 32, 16), 8: (32, 16, 16)}[dtype.itemsize]
    keys = min(max(triton.next_power_of_2(num_candidates), 128), BLOCK)
    return TargetBlocks(*tile, BLOCK), KeyBlocks(keys, num_candidates <= keys)
