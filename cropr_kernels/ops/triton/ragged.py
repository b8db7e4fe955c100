"""Ragged images on CUDA: selection, costs of merges and merges with starts instead of equal counts.

Kernels and their parts are those of equal images, on one image of all rows of x.view(B * N, D).
Programs are launched for N tokens an image; those past the rows of theirs do nothing.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..reference import accumulation_dtype
from ..validation import check
from .launching import launch
from .means import NUM_WARPS, REGISTERS, Assignment, launch_means
from .merge import Scratch, Tokens, load_costs
from .nearest import BLOCK, load_positions, nearest_in_image, nearest_in_tile, target_blocks
from .residual import Update, add_select_kernel, dense
from .scores import fold_query
from .select import (
    Selection,
    Weights,
    embedded_keys,
    is_last,
    key_blocks,
    priority_bytes,
    select_kernel,
)
from .utils import STREAM, Rows, aligned_rows, block_counters, ragged_image, row_blocks, rows_of


class Choice(NamedTuple):
    """Rows in order (T,), and where each image begins in them; which candidates (B, C) are pruned,
    and the rows of their targets (B, C)."""

    order: Any
    starts: Any
    prune: Any
    nearest: Any


@triton.jit(do_not_specialize=["n", "num_rows", "num_candidates", "num_prefix"])
def nearest_kernel(
    features, tokens, starts_ptr, scratch, n, num_rows, num_candidates, num_prefix,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Compare a tile of targets with a tile of candidates; the last program of these candidates
    finds the nearest target of each, and the cost of merging into it."""
    BLOCK_T: tl.constexpr = BLOCKS.targets
    BLOCK_C: tl.constexpr = BLOCKS.candidates
    tiles = tl.maximum(tl.cdiv(n - num_prefix, BLOCK_T), 1)
    groups = tl.maximum(tl.cdiv(num_candidates, BLOCK_C), 1)
    pid = tl.program_id(0)
    b = (pid // (tiles * groups)).to(tl.int64)
    group = pid // tiles % groups
    tile = pid % tiles
    start, count, present = ragged_image(starts_ptr, b, num_candidates, num_prefix)
    num_targets = count - present
    target_idx = tokens.target_idx + start
    tokens = Tokens(target_idx, target_idx + num_targets, None, tokens.cost_scale)
    candidates = group * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = candidates < num_candidates
    costs_ptr = scratch.cost + b * num_candidates + candidates
    nearest_ptr = scratch.nearest_idx + b * num_candidates + candidates
    used_tiles = tl.maximum(tl.cdiv(num_targets - num_prefix, BLOCK_T), 1)
    scratch = Scratch(
        scratch.partial + b * tiles * num_candidates,
        scratch.partial_idx + b * tiles * num_candidates,
        None,
        None,
        None,
        scratch.zeros + b * groups,
    )
    is_used = group * BLOCK_C < present
    if is_used & (tile < used_tiles):
        target_rows = num_prefix + tile * BLOCK_T + tl.arange(0, BLOCK_T)
        best, nearest = nearest_in_tile(
            features, 0, tokens, target_rows, candidates, num_targets, present, num_rows, BLOCKS
        )
        partial_offs = tile.to(tl.int64) * num_candidates + candidates
        tl.store(scratch.partial + partial_offs, best, mask=inside)
        tl.store(scratch.partial_idx + partial_offs, nearest, mask=inside)
        if is_last(scratch.zeros + group, used_tiles):
            best, nearest = nearest_in_image(
                scratch, candidates, used_tiles, num_candidates, num_prefix, BLOCKS
            )
            cost = load_costs(best, tokens, candidates, present, num_rows)
            target, exists = load_positions(target_idx, nearest, num_targets, num_rows)
            exists &= candidates < present
            tl.store(costs_ptr, tl.where(exists, cost, float("inf")), mask=inside)
            tl.store(nearest_ptr, tl.where(exists, target, -1), mask=inside)
    if (is_used == 0) & (tile == 0):
        none = tl.zeros([BLOCK_C], tl.int64) - 1
        tl.store(costs_ptr, none.to(costs_ptr.dtype.element_ty) * float("-inf"), mask=inside)
        tl.store(nearest_ptr, none, mask=inside)


@triton.jit
def count_pruned(prune_ptr, count, BLOCK: tl.constexpr):
    """Return how many of the first `count` candidates are pruned."""
    lanes = tl.arange(0, BLOCK)
    pruned = tl.zeros([BLOCK], tl.int32)
    for first in range(0, count, BLOCK):
        inside = first + lanes < count
        pruned += (tl.load(prune_ptr + first + lanes, mask=inside, other=0) != 0).to(tl.int32)
    return tl.sum(pruned, axis=0)


@triton.jit(do_not_specialize=["n", "batch", "num_kept", "num_candidates", "num_prefix"])
def choice_kernel(
    choice, sizes_ptr, marks_ptr, assignment, starts_ptr, n, batch, num_kept, num_candidates,
    num_prefix, BLOCK: tl.constexpr,
):  # fmt: skip
    """Split the rows of one image per program into kept and pruned ones; both lists ascend.

    marks (B * N,), zeros, become the kept rows by position. Past num_kept nothing is written; kept
    rows that are missing up to it, and pruned ones up to B * C, become -1.
    """
    num_places = batch * num_candidates
    b = tl.program_id(0).to(tl.int64)
    start, count, present = ragged_image(choice.starts, b, num_candidates, num_prefix)
    num_targets = count - present
    order_ptr = choice.order + start
    first_candidate = b * num_candidates
    pruned_before = count_pruned(choice.prune, (b * num_candidates).to(tl.int32), BLOCK)
    num_rows = batch * n
    lanes = tl.arange(0, BLOCK)
    # Mark every kept row with 1; the number of marks before it is its place.
    for first in range(0, count, BLOCK):
        offs = first + lanes
        candidate = offs - num_targets
        is_candidate = (candidate >= 0) & (offs < count)
        prune = tl.load(choice.prune + first_candidate + candidate, mask=is_candidate, other=0)
        row, exists = load_positions(order_ptr, offs, count, num_rows)
        tl.store(marks_ptr + row, 1, mask=exists & (prune == 0))
    tl.debug_barrier()
    kept_before = start.to(tl.int32) - pruned_before
    tl.store(starts_ptr + b, kept_before.to(tl.int64))
    tl.store(assignment.starts + b, pruned_before.to(tl.int64))
    for first in range(0, n, BLOCK):
        position = first + lanes
        row = b * n + position
        kept = tl.load(marks_ptr + row, mask=position < n, other=0, cache_modifier=".cg")
        kept_row = kept_before + tl.cumsum(kept, axis=0) - kept
        fits = (kept == 1) & (kept_row >= 0) & (kept_row < num_kept)
        size = tl.load(sizes_ptr + row, mask=kept == 1, other=0.0)
        tl.store(assignment.kept_idx + kept_row, row, mask=fits)
        tl.store(assignment.kept_sizes + kept_row, size, mask=fits)
        tl.store(marks_ptr + row, tl.where(fits, kept_row, -1), mask=kept == 1)
        kept_before += tl.sum(kept, axis=0)
    tl.debug_barrier()
    for first in range(0, present, BLOCK):
        offs = first + lanes
        is_pruned = (offs < present) & (
            tl.load(choice.prune + first_candidate + offs, mask=offs < present, other=0) != 0
        )
        place = pruned_before + tl.cumsum(is_pruned.to(tl.int32), axis=0) - 1
        row, exists = load_positions(order_ptr + num_targets, offs, present, num_rows)
        target = tl.load(choice.nearest + first_candidate + offs, mask=is_pruned, other=-1)
        moves = is_pruned & exists & (target >= 0) & (target < num_rows)
        kept_row = tl.load(marks_ptr + target, mask=moves, other=-1, cache_modifier=".cg")
        tl.store(assignment.pruned_idx + place, row, mask=is_pruned)
        tl.store(assignment.row_idx + place, kept_row, mask=is_pruned)
        tl.store(assignment.dest_idx + row, target - b * n, mask=moves)
        pruned_before += tl.sum(is_pruned.to(tl.int32), axis=0)
    if b == batch - 1:
        tl.store(starts_ptr + batch, kept_before.to(tl.int64))
        tl.store(assignment.starts + batch, pruned_before.to(tl.int64))
        for first in range(pruned_before, num_places, BLOCK):
            places = first + lanes
            tl.store(assignment.pruned_idx + places, -1, mask=places < num_places)
            tl.store(assignment.row_idx + places, -1, mask=places < num_places)
        for first in range(kept_before, num_kept, BLOCK):  # a choice of more than is pruned
            rest = first + lanes
            tl.store(assignment.kept_idx + rest, -1, mask=rest < num_kept)
            tl.store(assignment.kept_sizes + rest, 1.0, mask=rest < num_kept)


def ragged_add_select_(
    x, rows, starts, update, gamma, query, num_candidates, num_prefix=0, sizes=None,
    size_weight=0.0, priority=None, cost_scale=None, cost_weight=0.0,
):  # fmt: skip
    """Launch cropr::ragged_add_select_. Starts are trusted; a row outside [0, B * N) writes
    nothing."""
    parts = (sizes, size_weight, priority, cost_scale, cost_weight)
    check(
        "ragged_add_select_",
        *(x, rows, starts, update, gamma, query, num_candidates, num_prefix),
        *parts,
    )
    batch, n, dim = x.shape
    order = x.new_empty(rows.shape, dtype=torch.int64)
    if not (rows.numel() and dim):
        return order
    blocks = row_blocks(dim, x.dtype)
    keys = embedded_keys(n)
    scores = x.new_empty(rows.shape, dtype=torch.float32)
    counters = None if keys is None else block_counters(x)
    priority, rows, starts = priority_bytes(priority), rows.contiguous(), starts.contiguous()
    selection = Selection(scores, priority, counters, order, None, starts)
    sizes = dense(sizes) if size_weight else None
    weights = Weights(sizes, float(size_weight), cost_scale, float(cost_weight))
    launch(
        add_select_kernel, batch * triton.cdiv(n, blocks.rows),
        Rows(x, 0, dim, dim), rows,  # rows of all images as of one
        Update(aligned_rows(update.contiguous().unsqueeze(0)), dense(gamma)), fold_query(query),
        selection, weights, batch * n, n, num_candidates, num_prefix, blocks, keys, **STREAM,
    )  # fmt: skip
    if keys is None:
        blocks, num_warps = key_blocks(n)
        launch(
            select_kernel, batch,
            selection, 0, weights, rows, batch * n, n, num_candidates, num_prefix, blocks,
            num_warps=num_warps,
        )  # fmt: skip
    return order


def ragged_nearest(x, order, starts, num_candidates, num_prefix=0, cost_scale=None):
    """Launch cropr::ragged_nearest. Starts are trusted; a row outside [0, B * N) is like none."""
    check("ragged_nearest", x, order, starts, num_candidates, num_prefix, cost_scale)
    batch, n, dim = x.shape
    acc = accumulation_dtype(x.dtype)
    costs = x.new_empty((batch, num_candidates), dtype=acc)
    nearest = x.new_empty((batch, num_candidates), dtype=torch.int64)
    if not costs.numel():
        return costs, nearest
    blocks, _ = target_blocks(x.dtype, num_candidates)
    tiles = max(triton.cdiv(n - num_prefix, blocks.targets), 1)
    groups = triton.cdiv(num_candidates, blocks.candidates)
    partial = x.new_empty((batch, tiles, num_candidates), dtype=acc)
    partial_idx = x.new_empty(partial.shape, dtype=torch.int32)
    counters = x.new_zeros((batch, groups), dtype=torch.int32)
    order = order.contiguous()
    launch(
        nearest_kernel, batch * tiles * groups,
        rows_of(x.contiguous().view(1, batch * n, dim)),
        Tokens(order, order, None, dense(cost_scale)), starts.contiguous(),
        Scratch(partial, partial_idx, costs, nearest, None, counters),
        n, batch * n, num_candidates, num_prefix, BLOCKS=blocks, num_warps=NUM_WARPS,
        maxnreg=REGISTERS,
    )  # fmt: skip
    return costs, nearest


def ragged_merge_(
    x, order, starts, prune, nearest, sizes, parent, num_kept, num_prefix=0, offsets=False
):
    """Launch cropr::ragged_merge_. Starts are trusted; rows outside [0, B * N) write nothing, nor
    does any past num_kept; rows that are missing up to it are -1.

    No launch depends on T, so that graphs and recorded launches fit any choice.
    """
    check(
        "ragged_merge_",
        *(x, order, starts, prune, nearest, sizes, parent, num_kept, num_prefix, offsets),
    )
    batch, n, dim = x.shape
    rows = x.new_empty((num_kept,), dtype=torch.int64)
    kept_sizes = sizes.new_empty((num_kept,))
    if not batch:
        return rows, x.new_zeros((1,), dtype=torch.int64), kept_sizes
    kept_starts, pruned_starts = (x.new_empty((batch + 1,), dtype=torch.int64) for _ in range(2))
    pruned_idx, row_idx = (
        x.new_empty((prune.numel(),), dtype=dtype) for dtype in (torch.int64, torch.int32)
    )
    marks = x.new_zeros((batch * n,), dtype=torch.int32)
    assignment = Assignment(rows, pruned_idx, row_idx, kept_sizes, parent, pruned_starts)
    choice = Choice(
        order.contiguous(),
        starts.contiguous(),
        prune.contiguous().view(torch.int8),
        nearest.contiguous(),
    )
    launch(
        choice_kernel, batch,
        choice, sizes, marks, assignment, kept_starts, n, batch, num_kept, prune.shape[1],
        num_prefix, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    flat = x.view(1, batch * n, dim)
    counts = (prune.numel(), num_kept, 0)
    launch_means(flat, n, assignment, sizes, x, counts, in_place=True, offsets=offsets)
    return rows, kept_starts, kept_sizes
