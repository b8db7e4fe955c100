"""cropr::merge and merge_ on CUDA: pruned tokens are merged into their most similar targets, in two
launches.

The first compares: a program compares a tile of targets with a tile of candidates. The last of
    those that share
candidates finds the nearest target of each; the last of an image chooses the pruned candidates, and
their targets. The second writes the merged rows, one program per pruned token: the first of those
that share a target adds them all up, one after the other, so no two programs write one row. The
order of floating-point sums is fixed by the code, not by the layout that the compiler picks: the
bits are the same on every run and for every alignment.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..reference import accumulation_dtype
from ..validation import check
from .launching import launch
from .nearest import (
    BLOCK,
    load_positions,
    nearest_in_image,
    nearest_in_tile,
    sum_pairs,
    sum_rows,
    target_blocks,
)
from .prune import gather
from .select import Selection, is_last, select_image
from .utils import dense_rows, rows_of

_NUM_WARPS = 4
_REGISTERS = 168  # per thread; without a limit ptxas spills to fit more warps on a processor
_UNROLL = tl.constexpr(4)  # pruned rows of a mean that are loaded at a time


class Tokens(NamedTuple):
    """Positions of the targets (B, T) and of the candidates (B, C), sizes of all tokens (B, N), and
    their cost scales (B, N) or None for 1."""

    target_idx: Any
    candidate_idx: Any
    sizes: Any
    cost_scale: Any


class Scratch(NamedTuple):
    """Best similarity of each candidate and the target it is with, by tile of targets (B, tiles,
    C); the cost of pruning each and its nearest target of all tiles (B, C); kept, then pruned
    candidates (B, C); and zeros (B, N + groups + 1): N become the kept rows by position, the others
    count finished programs of each group of candidates, then groups."""

    partial: Any
    partial_idx: Any
    cost: Any
    nearest_idx: Any
    order: Any
    zeros: Any


class Assignment(NamedTuple):
    """Positions kept (B, K) and pruned (B, R), the kept row that each pruned token is merged into
    (B, R), new sizes (B, K), and the destination of every token (B, N)."""

    kept_idx: Any
    pruned_idx: Any
    row_idx: Any
    kept_sizes: Any
    dest_idx: Any


@triton.jit
def load_costs(best, tokens, candidates, num_candidates, n):
    """Return the cost of pruning candidates, max(1 - best, 0) * cost_scale; NaN becomes the
    highest."""
    cost = tl.maximum(1.0 - best, 0.0)
    if tokens.cost_scale is not None:
        origin, exists = load_positions(tokens.candidate_idx, candidates, num_candidates, n)
        cost *= tl.load(tokens.cost_scale + origin, mask=exists, other=1.0).to(best.dtype)
    return tl.where(cost == cost, cost, float("inf"))


@triton.jit
def choose_targets(
    tokens, scratch, assignment, n, num_targets, num_candidates, num_prune,
    IN_PLACE: tl.constexpr, BLOCKS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Choose the pruned candidates of one image and the kept rows they are merged into; lists
    ascend by position."""
    # Candidates of the highest cost are kept, of equals the lower position.
    num_stay = num_candidates - num_prune
    order = Selection(scratch.cost, None, None, scratch.order, scratch.order + num_stay)
    select_image(scratch.cost, order, 0, None, num_candidates, num_candidates, num_stay, 0, KEYS)
    # Mark every kept position with 1; the number of marks before it is its row.
    BLOCK: tl.constexpr = BLOCKS.positions
    lanes = tl.arange(0, BLOCK)
    for start in range(0, num_targets, BLOCK):
        position, exists = load_positions(tokens.target_idx, start + lanes, num_targets, n)
        tl.store(scratch.zeros + position, 1, mask=exists)
    tl.debug_barrier()
    for start in range(0, num_stay, BLOCK):
        offs = start + lanes
        chosen = tl.load(
            scratch.order + offs, mask=offs < num_stay, other=num_candidates, cache_modifier=".cg"
        )
        position, exists = load_positions(tokens.candidate_idx, chosen, num_candidates, n)
        tl.store(scratch.zeros + position, 1, mask=exists)
    tl.debug_barrier()
    kept_before = num_targets * 0
    for start in range(0, n, BLOCK):
        position = start + lanes
        kept = tl.load(scratch.zeros + position, mask=position < n, other=0, cache_modifier=".cg")
        kept_row = kept_before + tl.cumsum(kept, axis=0) - kept
        size = tl.load(tokens.sizes + position, mask=kept == 1, other=0.0)
        tl.store(assignment.kept_idx + kept_row, position.to(tl.int64), mask=kept == 1)
        tl.store(assignment.kept_sizes + kept_row, size, mask=kept == 1)
        tl.store(scratch.zeros + position, kept_row, mask=kept == 1)
        if not IN_PLACE:
            tl.store(assignment.dest_idx + position, kept_row.to(tl.int64), mask=kept == 1)
        kept_before += tl.sum(kept, axis=0)
    tl.debug_barrier()
    for start in range(0, num_prune, BLOCK):
        offs = start + lanes
        inside = offs < num_prune
        chosen = tl.load(
            scratch.order + num_stay + offs, mask=inside, other=num_candidates, cache_modifier=".cg"
        )
        position, exists = load_positions(tokens.candidate_idx, chosen, num_candidates, n)
        nearest = tl.load(
            scratch.nearest_idx + chosen, mask=inside, other=num_targets, cache_modifier=".cg"
        )
        target, has_target = load_positions(tokens.target_idx, nearest, num_targets, n)
        moves = exists & has_target
        kept_row = tl.load(scratch.zeros + target, mask=moves, other=-1, cache_modifier=".cg")
        tl.store(assignment.pruned_idx + offs, position, mask=exists)
        tl.store(assignment.row_idx + offs, kept_row, mask=inside)
        tl.store(
            assignment.dest_idx + position,
            target if IN_PLACE else kept_row.to(tl.int64),
            mask=moves,
        )


@triton.jit
def assignment_of(assignment, b, n, num_keep, num_prune):
    """The assignment of image b."""
    return Assignment(
        assignment.kept_idx + b * num_keep,
        assignment.pruned_idx + b * num_prune,
        assignment.row_idx + b * num_prune,
        assignment.kept_sizes + b * num_keep,
        assignment.dest_idx + b * n,
    )


@triton.jit(do_not_specialize=["n", "num_targets", "num_candidates", "num_prune", "num_prefix"])
def targets_kernel(
    features, tokens, scratch, assignment, n, num_targets, num_candidates, num_prune, num_prefix,
    IN_PLACE: tl.constexpr, BLOCKS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    BLOCK_T: tl.constexpr = BLOCKS.targets
    BLOCK_C: tl.constexpr = BLOCKS.candidates
    tiles = tl.maximum(tl.cdiv(num_targets - num_prefix, BLOCK_T), 1)
    groups = tl.maximum(tl.cdiv(num_candidates, BLOCK_C), 1)
    pid = tl.program_id(0)
    b = (pid // (tiles * groups)).to(tl.int64)
    group = pid // tiles % groups
    tile = pid % tiles
    cost_scale = tokens.cost_scale
    if cost_scale is not None:
        cost_scale += b * n
    target_idx, candidate_idx = (
        tokens.target_idx + b * num_targets,
        tokens.candidate_idx + b * num_candidates,
    )
    tokens = Tokens(target_idx, candidate_idx, tokens.sizes + b * n, cost_scale)
    scratch = Scratch(
        scratch.partial + b * tiles * num_candidates,
        scratch.partial_idx + b * tiles * num_candidates,
        scratch.cost + b * num_candidates,
        scratch.nearest_idx + b * num_candidates,
        scratch.order + b * num_candidates,
        scratch.zeros + b * (n + groups + 1),
    )
    target_rows = num_prefix + tile * BLOCK_T + tl.arange(0, BLOCK_T)
    candidates = group * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = candidates < num_candidates
    best, nearest = nearest_in_tile(
        features, b, tokens, target_rows, candidates, num_targets, num_candidates, n, BLOCKS
    )
    partial_offs = tile.to(tl.int64) * num_candidates + candidates
    tl.store(scratch.partial + partial_offs, best, mask=inside)
    tl.store(scratch.partial_idx + partial_offs, nearest, mask=inside)
    counters = scratch.zeros + n
    if is_last(counters + group, tiles):
        best, nearest = nearest_in_image(
            scratch, candidates, tiles, num_candidates, num_prefix, BLOCKS
        )
        cost = load_costs(best, tokens, candidates, num_candidates, n)
        tl.store(scratch.cost + candidates, cost, mask=inside)
        tl.store(scratch.nearest_idx + candidates, nearest, mask=inside)
        if is_last(counters + groups, groups):
            assignment = assignment_of(
                assignment, b, n, num_targets + num_candidates - num_prune, num_prune
            )
            choose_targets(
                tokens,
                scratch,
                assignment,
                n,
                num_targets,
                num_candidates,
                num_prune,
                IN_PLACE,
                BLOCKS,
                KEYS,
            )


@triton.jit
def next_joining(row_idx_ptr, kept_row, start, num_prune, BLOCK: tl.constexpr):
    """Return the first pruned token from `start` on that is merged into kept row `kept_row`, or
    num_prune."""
    joining = num_prune
    first = num_prune * 0 + start
    while (first < num_prune) & (joining == num_prune):
        offs = first + tl.arange(0, BLOCK)
        joins = tl.load(row_idx_ptr + offs, mask=offs < num_prune, other=-1) == kept_row
        joining = tl.min(tl.where(joins, offs, num_prune), axis=0)
        first += BLOCK
    return joining


@triton.jit
def sum_of_squares(x):
    """Sum the squares of (N,), N >= 128, neighbors first: (1,)."""
    even, odd = tl.split(x.reshape(1, x.shape[0] // 2, 2))
    return sum_rows(sum_pairs(tl.fma(even, even, odd * odd), 2))


@triton.jit
def mean_of(
    x_ptr, stride, cols, inside, assignment, sizes_ptr, target, kept_row, pruned_row, num_prune,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return columns of the target and of the mean of all tokens merged into it, and the size of
    the mean."""
    target_row = tl.load(x_ptr + target * stride + cols, mask=inside, other=0.0).to(ACC)
    total = tl.load(sizes_ptr + target)
    sums = tl.fma(target_row, total.to(ACC), tl.zeros(cols.shape, ACC))
    start = pruned_row
    while start < num_prune:
        for i in tl.static_range(_UNROLL):  # in order of position
            r = start + i
            joins = tl.load(assignment.row_idx + r, mask=r < num_prune, other=-1) == kept_row
            origin = tl.load(assignment.pruned_idx + r, mask=joins, other=0)
            size = tl.load(sizes_ptr + origin, mask=joins, other=0.0)
            row = tl.load(x_ptr + origin * stride + cols, mask=joins & inside, other=0.0)
            sums = tl.fma(row.to(ACC), size.to(ACC), sums)
            total += size
        start = next_joining(assignment.row_idx, kept_row, start + _UNROLL, num_prune, BLOCK)
    return target_row, sums / total, total


@triton.jit(do_not_specialize=["n", "num_keep", "num_prune"])
def means_kernel(
    x, assignment, sizes_ptr, out_ptr, n, num_keep, num_prune,
    IN_PLACE: tl.constexpr, OFFSETS: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write one merged row per program; with OFFSETS, in place, pruned rows become their offsets
    from it.

    The norm takes a pass over all columns; with ONE_BLOCK the mean is then still in registers.
    """
    pid = tl.program_id(0)
    dim = x.dim
    ACC: tl.constexpr = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32
    b = (pid // num_prune).to(tl.int64)
    pruned_row = pid % num_prune
    assignment = assignment_of(assignment, b, n, num_keep, num_prune)
    sizes_ptr += b * n
    kept_row = tl.load(assignment.row_idx + pruned_row)
    if (kept_row >= 0) & (
        next_joining(assignment.row_idx, kept_row, 0, num_prune, BLOCK) == pruned_row
    ):
        x_ptr = x.ptr + b * x.stride_b
        target = tl.load(assignment.kept_idx + kept_row)
        out_ptr += (b * n + target if IN_PLACE else b * num_keep + kept_row) * dim
        total = 0.0
        mean = tl.zeros([BLOCK_D], ACC)
        target_square = tl.zeros([1], ACC)
        square = tl.zeros([1], ACC)
        for first in range(0, dim, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)
            row, mean, total = mean_of(
                x_ptr,
                x.stride_n,
                cols,
                cols < dim,
                assignment,
                sizes_ptr,
                target,
                kept_row,
                pruned_row,
                num_prune,
                ACC,
                BLOCK,
            )
            target_square += sum_of_squares(row)
            square += sum_of_squares(mean)
        factor = tl.sqrt(target_square) / tl.sqrt(square)
        fits = (square > 0) & (square < float("inf")) & (factor < float("inf"))
        factor = tl.where(fits, factor, 1.0)
        for first in range(0, dim, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)
            inside = cols < dim
            if not ONE_BLOCK:
                _, mean, _ = mean_of(
                    x_ptr,
                    x.stride_n,
                    cols,
                    inside,
                    assignment,
                    sizes_ptr,
                    target,
                    kept_row,
                    pruned_row,
                    num_prune,
                    ACC,
                    BLOCK,
                )
            # In place, all threads must have read the row and the size before one stores them
            tl.debug_barrier()
            # Rounded here, so that offsets subtract the stored value.
            merged = tl.fma(mean, factor, tl.zeros([BLOCK_D], ACC)).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + cols, merged, mask=inside)
            if OFFSETS:
                start = pruned_row
                while start < num_prune:
                    pruned_row_ptr = (
                        x_ptr + tl.load(assignment.pruned_idx + start) * x.stride_n + cols
                    )
                    row = tl.load(pruned_row_ptr, mask=inside, other=0.0)
                    tl.debug_barrier()
                    tl.store(
                        pruned_row_ptr, (row.to(ACC) - merged.to(ACC)).to(row.dtype), mask=inside
                    )
                    start = next_joining(assignment.row_idx, kept_row, start + 1, num_prune, BLOCK)
        tl.store(assignment.kept_sizes + kept_row, total)
        if IN_PLACE:
            tl.store(sizes_ptr + target, total)


def _launch(
    x,
    target_idx,
    candidate_idx,
    sizes,
    cost_scale,
    dest,
    num_keep,
    num_prefix,
    *,
    in_place,
    offsets=False,
):
    batch, n, dim = x.shape
    num_targets, num_candidates = target_idx.shape[1], candidate_idx.shape[1]
    num_prune = num_targets + num_candidates - num_keep
    kept_idx, pruned_idx = (
        x.new_empty((batch, count), dtype=torch.int64) for count in (num_keep, num_prune)
    )
    kept_sizes = sizes.new_empty((batch, num_keep))
    if not batch:
        return gather(x, kept_idx), kept_idx, pruned_idx, kept_sizes
    cost_scale = None if cost_scale is None else cost_scale.contiguous()
    target_idx = target_idx.contiguous()
    candidate_idx = candidate_idx.contiguous()
    acc = accumulation_dtype(x.dtype)
    blocks, keys = target_blocks(x.dtype, num_candidates)
    tiles = max(triton.cdiv(num_targets - num_prefix, blocks.targets), 1)
    groups = max(triton.cdiv(num_candidates, blocks.candidates), 1)
    partial, cost = (x.new_empty((batch, count, num_candidates), dtype=acc) for count in (tiles, 1))
    partial_idx, nearest = (x.new_empty(part.shape, dtype=torch.int32) for part in (partial, cost))
    order = x.new_empty(candidate_idx.shape, dtype=torch.int64)
    zeros = x.new_zeros((batch, n + groups + 1), dtype=torch.int32)
    scratch = Scratch(partial, partial_idx, cost, nearest, order, zeros)
    assignment = Assignment(
        kept_idx, pruned_idx, x.new_empty((batch, num_prune), dtype=torch.int32), kept_sizes, dest
    )
    launch(
        targets_kernel, batch * tiles * groups,
        rows_of(x), Tokens(target_idx, candidate_idx, sizes, cost_scale), scratch, assignment,
        n, num_targets, num_candidates, num_prune, num_prefix, IN_PLACE=in_place, BLOCKS=blocks,
        KEYS=keys,
        num_warps=_NUM_WARPS, maxnreg=_REGISTERS,
    )  # fmt: skip
    out = x if in_place else gather(x, kept_idx)
    if num_prune and dim:
        # Registers
        block_d = min(max(triton.next_power_of_2(dim), 128), 1024 if acc == torch.float32 else 256)
        launch(
            means_kernel, batch * num_prune,
            rows_of(x), assignment, sizes, out, n, num_keep, num_prune, IN_PLACE=in_place,
            OFFSETS=offsets,
            ONE_BLOCK=dim <= block_d, BLOCK=BLOCK, BLOCK_D=block_d, num_warps=_NUM_WARPS,
            maxnreg=_REGISTERS,
        )  # fmt: skip
    return out, kept_idx, pruned_idx, kept_sizes


def merge(x, target_idx, candidate_idx, sizes, num_keep, num_prefix=0, cost_scale=None):
    """Launch cropr::merge. Positions must be a partition of [0, N): they are not checked on the
    device."""
    check("merge", x, target_idx, candidate_idx, sizes, num_keep, num_prefix, cost_scale)
    x = dense_rows(x)
    dest = x.new_empty(x.shape[:2], dtype=torch.int64)
    parts = (sizes.contiguous(), cost_scale, dest, num_keep, num_prefix)
    return *_launch(x, target_idx, candidate_idx, *parts, in_place=False), dest


def merge_(
    x,
    target_idx,
    candidate_idx,
    sizes,
    parent,
    num_keep,
    num_prefix=0,
    offsets=False,
    cost_scale=None,
):
    """Launch cropr::merge_. Positions must be distinct and in [0, N): they are not checked on the
    device."""
    check(
        "merge_",
        x,
        target_idx,
        candidate_idx,
        sizes,
        parent,
        num_keep,
        num_prefix,
        offsets,
        cost_scale,
    )
    parts = (sizes, cost_scale, parent, num_keep, num_prefix)
    parts = _launch(x, target_idx, candidate_idx, *parts, in_place=True, offsets=offsets)
    _, kept_idx, pruned_idx, kept_sizes = parts
    return kept_idx, pruned_idx, kept_sizes
