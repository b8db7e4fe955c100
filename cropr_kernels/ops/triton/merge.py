"""cropr::merge and merge_ on CUDA: pruned tokens are merged into the most similar safe ones, in two launches.

The first compares: a program holds a tile of safe tokens against a tile of candidates. The last of those that share
candidates finds the nearest safe token of each; the last of an image chooses which are pruned, and their targets. The
second writes the merged rows, one program per pruned token: the first of those that share a target adds them all up,
one after the other, so no two programs write one row. The code says in which order floats are added up, not the layout
that the compiler picks: the bits are the same on every run and for every alignment.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..reference import accumulation_dtype
from ..validation import check
from .launching import launch
from .nearest import BLOCK, load_positions, nearest_in_image, nearest_in_tile, sum_pairs, sum_rows, target_blocks
from .prune import gather
from .select import Selection, is_last, select_image
from .utils import dense_rows, rows_of

_NUM_WARPS = 4
_REGISTERS = 168  # a thread may have, where ptxas would otherwise spill to fit more warps on a processor
_TOGETHER = tl.constexpr(4)  # pruned rows of a mean that are loaded at a time


class Tokens(NamedTuple):
    """Positions of the tokens that stay (B, S) and of those that may go (B, C), the sizes of all (B, N), and what it
    costs to prune them (B, N), if that is not one."""

    safe_idx: Any
    candidate_idx: Any
    sizes: Any
    costs: Any


class Scratch(NamedTuple):
    """Each candidate's best similarity, and with which safe token, by tile of these (B, T, C); what it costs to prune
    it, and which it is most like at all (B, C); which candidates are kept, then which are pruned (B, C); and zeros (B,
    N + G + 1): N become the slots of kept positions, the others count programs, of each group of candidates, then
    groups."""

    partial: Any
    partial_idx: Any
    cost: Any
    nearest_idx: Any
    order: Any
    zeros: Any


class Plan(NamedTuple):
    """Positions kept (B, K) and pruned (B, P), which of the kept each pruned one joins (B, P), sizes after it (B, K),
    and where every token went (B, N)."""

    kept_idx: Any
    pruned_idx: Any
    slot_idx: Any
    kept_sizes: Any
    dest_idx: Any


@triton.jit
def load_costs(best, tokens, candidates, num_candidates, n):
    """What it costs to prune candidates whose best similarity this is; NaN is the highest."""
    cost = tl.maximum(1.0 - best, 0.0)
    if tokens.costs is not None:
        origin, exists = load_positions(tokens.candidate_idx, candidates, num_candidates, n)
        cost *= tl.load(tokens.costs + origin, mask=exists, other=1.0).to(best.dtype)
    return tl.where(cost == cost, cost, float("inf"))


@triton.jit
def choose_targets(
    tokens, scratch, plan, n, num_safe, num_candidates, num_prune,
    IN_PLACE: tl.constexpr, BLOCKS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Which candidates of one image are pruned, and into which tokens they are merged; lists ascend by position."""
    # Kept are those that cost most, of equals the lower position.
    num_stay = num_candidates - num_prune
    order = Selection(scratch.cost, None, None, scratch.order, scratch.order + num_stay)
    select_image(scratch.cost, order, 0, None, num_candidates, num_candidates, num_stay, 0, KEYS)
    # A one at every position that is kept; the ones before it are its slot.
    BLOCK: tl.constexpr = BLOCKS.positions
    lanes = tl.arange(0, BLOCK)
    for start in range(0, num_safe, BLOCK):
        position, exists = load_positions(tokens.safe_idx, start + lanes, num_safe, n)
        tl.store(scratch.zeros + position, 1, mask=exists)
    tl.debug_barrier()
    for start in range(0, num_stay, BLOCK):
        offs = start + lanes
        which = tl.load(scratch.order + offs, mask=offs < num_stay, other=num_candidates, cache_modifier=".cg")
        position, exists = load_positions(tokens.candidate_idx, which, num_candidates, n)
        tl.store(scratch.zeros + position, 1, mask=exists)
    tl.debug_barrier()
    kept_before = num_safe * 0
    for start in range(0, n, BLOCK):
        position = start + lanes
        kept = tl.load(scratch.zeros + position, mask=position < n, other=0, cache_modifier=".cg")
        slot = kept_before + tl.cumsum(kept, axis=0) - kept
        size = tl.load(tokens.sizes + position, mask=kept == 1, other=0.0)
        tl.store(plan.kept_idx + slot, position.to(tl.int64), mask=kept == 1)
        tl.store(plan.kept_sizes + slot, size, mask=kept == 1)
        tl.store(scratch.zeros + position, slot, mask=kept == 1)
        if not IN_PLACE:
            tl.store(plan.dest_idx + position, slot.to(tl.int64), mask=kept == 1)
        kept_before += tl.sum(kept, axis=0)
    tl.debug_barrier()
    for start in range(0, num_prune, BLOCK):
        offs = start + lanes
        inside = offs < num_prune
        which = tl.load(scratch.order + num_stay + offs, mask=inside, other=num_candidates, cache_modifier=".cg")
        position, exists = load_positions(tokens.candidate_idx, which, num_candidates, n)
        nearest = tl.load(scratch.nearest_idx + which, mask=inside, other=num_safe, cache_modifier=".cg")
        target, there = load_positions(tokens.safe_idx, nearest, num_safe, n)
        moves = exists & there
        slot = tl.load(scratch.zeros + target, mask=moves, other=-1, cache_modifier=".cg")
        tl.store(plan.pruned_idx + offs, position, mask=exists)
        tl.store(plan.slot_idx + offs, slot, mask=inside)
        tl.store(plan.dest_idx + position, target if IN_PLACE else slot.to(tl.int64), mask=moves)


@triton.jit
def plan_of(plan, b, n, num_keep, num_prune):
    """The plan of image b."""
    return Plan(
        plan.kept_idx + b * num_keep,
        plan.pruned_idx + b * num_prune,
        plan.slot_idx + b * num_prune,
        plan.kept_sizes + b * num_keep,
        plan.dest_idx + b * n,
    )


@triton.jit(do_not_specialize=["n", "num_safe", "num_candidates", "num_prune", "num_prefix"])
def targets_kernel(
    features, tokens, scratch, plan, n, num_safe, num_candidates, num_prune, num_prefix,
    IN_PLACE: tl.constexpr, BLOCKS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    BLOCK_S: tl.constexpr = BLOCKS.safe
    BLOCK_C: tl.constexpr = BLOCKS.candidates
    tiles = tl.maximum(tl.cdiv(num_safe - num_prefix, BLOCK_S), 1)
    groups = tl.maximum(tl.cdiv(num_candidates, BLOCK_C), 1)
    pid = tl.program_id(0)
    b = (pid // (tiles * groups)).to(tl.int64)
    group = pid // tiles % groups
    tile = pid % tiles
    costs = tokens.costs
    if costs is not None:
        costs += b * n
    safe_idx, candidate_idx = tokens.safe_idx + b * num_safe, tokens.candidate_idx + b * num_candidates
    tokens = Tokens(safe_idx, candidate_idx, tokens.sizes + b * n, costs)
    scratch = Scratch(
        scratch.partial + b * tiles * num_candidates,
        scratch.partial_idx + b * tiles * num_candidates,
        scratch.cost + b * num_candidates,
        scratch.nearest_idx + b * num_candidates,
        scratch.order + b * num_candidates,
        scratch.zeros + b * (n + groups + 1),
    )
    slots = num_prefix + tile * BLOCK_S + tl.arange(0, BLOCK_S)
    candidates = group * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = candidates < num_candidates
    best, nearest = nearest_in_tile(features, b, tokens, slots, candidates, num_safe, num_candidates, n, BLOCKS)
    at = tile.to(tl.int64) * num_candidates + candidates
    tl.store(scratch.partial + at, best, mask=inside)
    tl.store(scratch.partial_idx + at, nearest, mask=inside)
    counters = scratch.zeros + n
    if is_last(counters + group, tiles):
        best, nearest = nearest_in_image(scratch, candidates, tiles, num_candidates, num_prefix, BLOCKS)
        cost = load_costs(best, tokens, candidates, num_candidates, n)
        tl.store(scratch.cost + candidates, cost, mask=inside)
        tl.store(scratch.nearest_idx + candidates, nearest, mask=inside)
        if is_last(counters + groups, groups):
            plan = plan_of(plan, b, n, num_safe + num_candidates - num_prune, num_prune)
            choose_targets(tokens, scratch, plan, n, num_safe, num_candidates, num_prune, IN_PLACE, BLOCKS, KEYS)


@triton.jit
def next_joining(slot_idx_ptr, slot, start, num_prune, BLOCK: tl.constexpr):
    """The first pruned token from `start` on that joins `slot`; num_prune if there is none."""
    found, first = num_prune, num_prune * 0 + start
    while (first < num_prune) & (found == num_prune):
        offs = first + tl.arange(0, BLOCK)
        joins = tl.load(slot_idx_ptr + offs, mask=offs < num_prune, other=-1) == slot
        found = tl.min(tl.where(joins, offs, num_prune), axis=0)
        first += BLOCK
    return found


@triton.jit
def sum_of_squares(x):
    """Of (N,), at least 128, neighbours first: (1,)."""
    even, odd = tl.split(x.reshape(1, x.shape[0] // 2, 2))
    return sum_rows(sum_pairs(tl.fma(even, even, odd * odd), 2))


@triton.jit
def mean_of(
    x_ptr, stride, cols, inside, plan, sizes_ptr, target, slot, mine, num_prune,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns of the target and of the mean of all that share it, and how many tokens that is of."""
    target_row = tl.load(x_ptr + target * stride + cols, mask=inside, other=0.0).to(ACC)
    total = tl.load(sizes_ptr + target)
    sums = tl.fma(target_row, total.to(ACC), tl.zeros(cols.shape, ACC))
    start = mine
    while start < num_prune:
        for i in tl.static_range(_TOGETHER):  # in order of position
            r = start + i
            joins = tl.load(plan.slot_idx + r, mask=r < num_prune, other=-1) == slot
            origin = tl.load(plan.pruned_idx + r, mask=joins, other=0)
            size = tl.load(sizes_ptr + origin, mask=joins, other=0.0)
            row = tl.load(x_ptr + origin * stride + cols, mask=joins & inside, other=0.0)
            sums = tl.fma(row.to(ACC), size.to(ACC), sums)
            total += size
        start = next_joining(plan.slot_idx, slot, start + _TOGETHER, num_prune, BLOCK)
    return target_row, sums / total, total


@triton.jit(do_not_specialize=["n", "num_keep", "num_prune"])
def means_kernel(
    x, plan, sizes_ptr, out_ptr, n, num_keep, num_prune,
    IN_PLACE: tl.constexpr, OFFSETS: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A merged row a program; with OFFSETS, in place, pruned rows become their offsets from it.

    Its norm takes a pass over all columns. What that finds is still in registers if they are ONE_BLOCK.
    """
    pid = tl.program_id(0)
    dim = x.dim
    ACC: tl.constexpr = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32
    b = (pid // num_prune).to(tl.int64)
    mine = pid % num_prune
    plan = plan_of(plan, b, n, num_keep, num_prune)
    sizes_ptr += b * n
    slot = tl.load(plan.slot_idx + mine)
    if (slot >= 0) & (next_joining(plan.slot_idx, slot, 0, num_prune, BLOCK) == mine):
        x_ptr = x.ptr + b * x.stride_b
        target = tl.load(plan.kept_idx + slot)
        out_ptr += (b * n + target if IN_PLACE else b * num_keep + slot) * dim
        total = 0.0
        mean = tl.zeros([BLOCK_D], ACC)
        own_square = tl.zeros([1], ACC)
        square = tl.zeros([1], ACC)
        for first in range(0, dim, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)
            row, mean, total = mean_of(
                x_ptr, x.stride_n, cols, cols < dim, plan, sizes_ptr, target, slot, mine, num_prune, ACC, BLOCK
            )
            own_square += sum_of_squares(row)
            square += sum_of_squares(mean)
        factor = tl.sqrt(own_square) / tl.sqrt(square)
        fits = (square > 0) & (square < float("inf")) & (factor < float("inf"))
        factor = tl.where(fits, factor, 1.0)
        for first in range(0, dim, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)
            inside = cols < dim
            if not ONE_BLOCK:
                _, mean, _ = mean_of(
                    x_ptr, x.stride_n, cols, inside, plan, sizes_ptr, target, slot, mine, num_prune, ACC, BLOCK
                )
            tl.debug_barrier()  # in place, all threads have read the row and the size before one stores them
            # Rounded here, not first where an offset subtracts it.
            merged = tl.fma(mean, factor, tl.zeros([BLOCK_D], ACC)).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + cols, merged, mask=inside)
            if OFFSETS:
                start = mine
                while start < num_prune:
                    own_ptr = x_ptr + tl.load(plan.pruned_idx + start) * x.stride_n + cols
                    row = tl.load(own_ptr, mask=inside, other=0.0)
                    tl.debug_barrier()
                    tl.store(own_ptr, (row.to(ACC) - merged.to(ACC)).to(row.dtype), mask=inside)
                    start = next_joining(plan.slot_idx, slot, start + 1, num_prune, BLOCK)
        tl.store(plan.kept_sizes + slot, total)
        if IN_PLACE:
            tl.store(sizes_ptr + target, total)


def _launch(x, safe_idx, candidate_idx, sizes, costs, dest, num_keep, num_prefix, *, in_place, offsets=False):
    (batch, n, dim), (num_safe, num_candidates) = x.shape, (safe_idx.shape[1], candidate_idx.shape[1])
    num_prune = num_safe + num_candidates - num_keep
    kept_idx, pruned_idx = (x.new_empty((batch, count), dtype=torch.int64) for count in (num_keep, num_prune))
    kept_sizes = sizes.new_empty((batch, num_keep))
    if not batch:
        return gather(x, kept_idx), kept_idx, pruned_idx, kept_sizes
    costs = None if costs is None else costs.contiguous()
    safe_idx, candidate_idx, acc = safe_idx.contiguous(), candidate_idx.contiguous(), accumulation_dtype(x.dtype)
    blocks, keys = target_blocks(x.dtype, num_candidates)
    tiles = max(triton.cdiv(num_safe - num_prefix, blocks.safe), 1)
    groups = max(triton.cdiv(num_candidates, blocks.candidates), 1)
    partial, cost = (x.new_empty((batch, count, num_candidates), dtype=acc) for count in (tiles, 1))
    partial_idx, nearest = (x.new_empty(part.shape, dtype=torch.int32) for part in (partial, cost))
    order = x.new_empty(candidate_idx.shape, dtype=torch.int64)
    zeros = x.new_zeros((batch, n + groups + 1), dtype=torch.int32)
    scratch = Scratch(partial, partial_idx, cost, nearest, order, zeros)
    plan = Plan(kept_idx, pruned_idx, x.new_empty((batch, num_prune), dtype=torch.int32), kept_sizes, dest)
    launch(
        targets_kernel, batch * tiles * groups,
        rows_of(x), Tokens(safe_idx, candidate_idx, sizes, costs), scratch, plan,
        n, num_safe, num_candidates, num_prune, num_prefix, IN_PLACE=in_place, BLOCKS=blocks, KEYS=keys,
        num_warps=_NUM_WARPS, maxnreg=_REGISTERS,
    )  # fmt: skip
    out = x if in_place else gather(x, kept_idx)
    if num_prune and dim:
        block_d = min(max(triton.next_power_of_2(dim), 128), 1024 if acc == torch.float32 else 256)  # registers
        launch(
            means_kernel, batch * num_prune,
            rows_of(x), plan, sizes, out, n, num_keep, num_prune, IN_PLACE=in_place, OFFSETS=offsets,
            ONE_BLOCK=dim <= block_d, BLOCK=BLOCK, BLOCK_D=block_d, num_warps=_NUM_WARPS, maxnreg=_REGISTERS,
        )  # fmt: skip
    return out, kept_idx, pruned_idx, kept_sizes


def merge(x, safe_idx, candidate_idx, sizes, num_keep, num_prefix=0, costs=None):
    """Launch cropr::merge. Positions must be a partition of [0, N): they are not checked on the device."""
    check("merge", x, safe_idx, candidate_idx, sizes, num_keep, num_prefix, costs)
    x = dense_rows(x)
    dest = x.new_empty(x.shape[:2], dtype=torch.int64)
    parts = (sizes.contiguous(), costs, dest, num_keep, num_prefix)
    return *_launch(x, safe_idx, candidate_idx, *parts, in_place=False), dest


def merge_(x, safe_idx, candidate_idx, sizes, parent, num_keep, num_prefix=0, offsets=False, costs=None):
    """Launch cropr::merge_. Positions must be distinct and in [0, N): they are not checked on the device."""
    check("merge_", x, safe_idx, candidate_idx, sizes, parent, num_keep, num_prefix, offsets, costs)
    parts = (sizes, costs, parent, num_keep, num_prefix)
    parts = _launch(x, safe_idx, candidate_idx, *parts, in_place=True, offsets=offsets)
    _, kept_idx, pruned_idx, kept_sizes = parts
    return kept_idx, pruned_idx, kept_sizes
