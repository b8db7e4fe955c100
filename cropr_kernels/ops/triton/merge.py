"""cropr::merge and merge_ on CUDA: pruned tokens are merged into the most similar safe ones, in two launches.

The first compares: a program holds a tile of safe tokens against all candidates, and the last program of an image
chooses which are pruned, and their targets. The second writes the means, one program per pruned token: the first of
those that share a target adds them all up, in order, so no two programs write one row and the bits are the same on
every run.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..reference import accumulation_dtype
from ..validation import check
from .launching import launch
from .prune import gather
from .select import is_last
from .utils import block_counters, dense_rows, rows_of, width_block

_NUM_WARPS = 4


class Tokens(NamedTuple):
    """Positions of the tokens that stay (B, S) and of those that may go (B, C), and the sizes of all (B, N)."""

    safe_idx: Any
    candidate_idx: Any
    sizes: Any


class Scratch(NamedTuple):
    """Each candidate's best similarity, and with which safe token, by tile (B, T, C) and at all (B, C); whether it is
    pruned (B, C); the counters (B,) of finished programs."""

    partial: Any
    partial_idx: Any
    similarity: Any
    nearest_idx: Any
    is_pruned: Any
    counters: Any


class Plan(NamedTuple):
    """Positions kept (B, K) and pruned (B, P), which of the kept each pruned one joins (B, P), sizes after it (B, K),
    and where every token went (B, N)."""

    kept_idx: Any
    pruned_idx: Any
    slot_idx: Any
    kept_sizes: Any
    dest_idx: Any


class TargetBlocks(NamedTuple):
    """Safe tokens and candidates that a program of targets_kernel compares, and columns it takes at a time."""

    safe: int
    candidates: int
    cols: int


@triton.jit
def load_positions(idx_ptr, offs, count, n):
    """Positions idx[offs], and which of them exist: inside the list, and inside the n tokens."""
    position = tl.load(idx_ptr + offs, mask=offs < count, other=-1)
    exists = (position >= 0) & (position < n)
    return tl.where(exists, position, 0), exists


@triton.jit
def count_kept_before(candidate_idx_ptr, is_pruned_ptr, positions, num_candidates, BLOCK_C: tl.constexpr):
    """How many kept candidates have a position below each of `positions`."""
    count = tl.zeros(positions.shape, tl.int32)
    for start in range(0, num_candidates, BLOCK_C):
        offs = start + tl.arange(0, BLOCK_C)
        inside = offs < num_candidates
        at = tl.load(candidate_idx_ptr + offs, mask=inside, other=0)
        kept = inside & (tl.load(is_pruned_ptr + offs, mask=inside, other=1, cache_modifier=".cg") == 0)
        count += tl.sum((kept[None, :] & (at[None, :] < positions[:, None])).to(tl.int32), axis=1)
    return count


@triton.jit
def choose_targets(
    tokens, scratch, plan, n, tiles, num_safe, num_candidates, num_prune, num_prefix,
    IN_PLACE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Which candidates of one image are pruned, and into which tokens they are merged; lists ascend by position."""
    BLOCK_S: tl.constexpr = BLOCKS.safe
    BLOCK_C: tl.constexpr = BLOCKS.candidates
    ACC: tl.constexpr = scratch.partial.dtype.element_ty
    for start in range(0, num_candidates, BLOCK_C):
        offs = start + tl.arange(0, BLOCK_C)
        inside = offs < num_candidates
        best = tl.full([BLOCK_C], float("-inf"), ACC)
        nearest = tl.zeros([BLOCK_C], tl.int64) + num_prefix
        for tile in range(0, tiles):  # tiles ascend and only more wins: the lowest of equals
            partial = tile * num_candidates + offs
            value = tl.load(scratch.partial + partial, mask=inside, other=float("-inf"), cache_modifier=".cg")
            where = tl.load(scratch.partial_idx + partial, mask=inside, other=0, cache_modifier=".cg")
            nearest = tl.where(value > best, where, nearest)
            best = tl.maximum(best, value)
        tl.store(scratch.similarity + offs, best, mask=inside)
        tl.store(scratch.nearest_idx + offs, nearest, mask=inside)
    tl.debug_barrier()
    for start in range(0, num_candidates, BLOCK_C):
        offs = start + tl.arange(0, BLOCK_C)
        inside = offs < num_candidates
        mine = tl.load(scratch.similarity + offs, mask=inside, other=float("-inf"), cache_modifier=".cg")
        rank = tl.zeros([BLOCK_C], tl.int32)  # candidates that are pruned before this one
        for first in range(0, num_candidates, BLOCK_C):
            others = first + tl.arange(0, BLOCK_C)
            there = others < num_candidates
            other = tl.load(scratch.similarity + others, mask=there, other=float("-inf"), cache_modifier=".cg")
            equal = (other[None, :] == mine[:, None]) & (others[None, :] > offs[:, None])
            before = there[None, :] & ((other[None, :] > mine[:, None]) | equal)
            rank += tl.sum(before.to(tl.int32), axis=1)
        tl.store(scratch.is_pruned + offs, (rank < num_prune).to(tl.int32), mask=inside)
    tl.debug_barrier()
    pruned_before = num_prune * 0
    for start in range(0, num_candidates, BLOCK_C):
        offs = start + tl.arange(0, BLOCK_C)
        inside = offs < num_candidates
        pruned = tl.load(scratch.is_pruned + offs, mask=inside, other=0, cache_modifier=".cg")
        position, exists = load_positions(tokens.candidate_idx, offs, num_candidates, n)
        is_pruned, is_kept = exists & (pruned == 1), exists & (pruned == 0)
        order = pruned_before + tl.cumsum(pruned, axis=0) - pruned  # pruned tokens below this position
        safe_before = tl.zeros([BLOCK_C], tl.int32)
        for first in range(0, num_safe, BLOCK_S):
            slots = first + tl.arange(0, BLOCK_S)
            at = tl.load(tokens.safe_idx + slots, mask=slots < num_safe, other=n)
            safe_before += tl.sum((at[None, :] < position[:, None]).to(tl.int32), axis=1)
        slot = safe_before + offs - order
        tl.store(plan.kept_idx + slot, position, mask=is_kept)
        size = tl.load(tokens.sizes + position, mask=is_kept, other=0.0)
        tl.store(plan.kept_sizes + slot, size, mask=is_kept)
        nearest = tl.load(scratch.nearest_idx + offs, mask=inside, other=0, cache_modifier=".cg")
        target = tl.load(tokens.safe_idx + nearest, mask=is_pruned, other=0)
        into = nearest + count_kept_before(tokens.candidate_idx, scratch.is_pruned, target, num_candidates, BLOCK_C)
        tl.store(plan.pruned_idx + order, position, mask=is_pruned)
        tl.store(plan.slot_idx + order, into, mask=is_pruned)
        if IN_PLACE:
            tl.store(plan.dest_idx + position, target, mask=is_pruned)
        else:
            tl.store(plan.dest_idx + position, tl.where(pruned == 1, into, slot.to(tl.int64)), mask=exists)
        pruned_before += tl.sum(pruned, axis=0)
    for start in range(0, num_safe, BLOCK_S):
        slots = start + tl.arange(0, BLOCK_S)
        position, exists = load_positions(tokens.safe_idx, slots, num_safe, n)
        slot = slots + count_kept_before(tokens.candidate_idx, scratch.is_pruned, position, num_candidates, BLOCK_C)
        tl.store(plan.kept_idx + slot, position, mask=exists)
        size = tl.load(tokens.sizes + position, mask=exists, other=0.0)
        tl.store(plan.kept_sizes + slot, size, mask=exists)
        if not IN_PLACE:
            tl.store(plan.dest_idx + position, slot.to(tl.int64), mask=exists)


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
    IN_PLACE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    BLOCK_S: tl.constexpr = BLOCKS.safe
    BLOCK_C: tl.constexpr = BLOCKS.candidates
    BLOCK_D: tl.constexpr = BLOCKS.cols
    dim = features.dim
    ACC: tl.constexpr = scratch.partial.dtype.element_ty
    tiles = tl.maximum(tl.cdiv(num_safe - num_prefix, BLOCK_S), 1)
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    tokens = Tokens(tokens.safe_idx + b * num_safe, tokens.candidate_idx + b * num_candidates, tokens.sizes + b * n)
    scratch = Scratch(
        scratch.partial + b * tiles * num_candidates,
        scratch.partial_idx + b * tiles * num_candidates,
        scratch.similarity + b * num_candidates,
        scratch.nearest_idx + b * num_candidates,
        scratch.is_pruned + b * num_candidates,
        scratch.counters + b,
    )
    feature_ptr = features.ptr + b * features.stride_b
    slots = num_prefix + tile * BLOCK_S + tl.arange(0, BLOCK_S)
    position, safe = load_positions(tokens.safe_idx, slots, num_safe, n)
    safe_ptr = feature_ptr + position[:, None] * features.stride_n
    for start in range(0, num_candidates, BLOCK_C):
        offs = start + tl.arange(0, BLOCK_C)
        origin, candidate = load_positions(tokens.candidate_idx, offs, num_candidates, n)
        candidate_ptr = feature_ptr + origin[:, None] * features.stride_n
        product = tl.zeros([BLOCK_S, BLOCK_C], ACC)
        safe_square = tl.zeros([BLOCK_S], ACC)
        square = tl.zeros([BLOCK_C], ACC)
        for first in range(0, dim, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)[None, :]
            rows = tl.load(safe_ptr + cols, mask=safe[:, None] & (cols < dim), other=0.0)
            others = tl.load(candidate_ptr + cols, mask=candidate[:, None] & (cols < dim), other=0.0)
            product = tl.dot(rows, tl.trans(others), product, input_precision="ieee", out_dtype=ACC)
            safe_square += tl.sum(rows.to(ACC) * rows.to(ACC), axis=1)
            square += tl.sum(others.to(ACC) * others.to(ACC), axis=1)
        similarity = product / tl.sqrt(safe_square)[:, None] / tl.sqrt(square)[None, :]
        comparable = safe[:, None] & (similarity == similarity)  # NaN is the lowest
        similarity = tl.where(comparable, similarity, float("-inf"))
        best = tl.max(similarity, axis=0)
        slot = tl.min(tl.where(comparable & (similarity == best[None, :]), slots[:, None], num_safe), axis=0)
        partial = tile * num_candidates + offs
        tl.store(scratch.partial + partial, best, mask=offs < num_candidates)
        tl.store(scratch.partial_idx + partial, slot.to(tl.int64), mask=offs < num_candidates)
    if is_last(scratch.counters, tiles):
        num_keep = num_safe + num_candidates - num_prune
        choose_targets(
            tokens, scratch, plan_of(plan, b, n, num_keep, num_prune),
            n, tiles, num_safe, num_candidates, num_prune, num_prefix, IN_PLACE, BLOCKS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n", "num_keep", "num_prune"])
def means_kernel(
    x, plan, sizes_ptr, out_ptr, n, num_keep, num_prune,
    IN_PLACE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    dim = x.dim
    ACC: tl.constexpr = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32
    b = (pid // num_prune).to(tl.int64)
    mine = pid % num_prune
    plan = plan_of(plan, b, n, num_keep, num_prune)
    sizes_ptr += b * n
    slot = tl.load(plan.slot_idx + mine)
    earlier = 0
    for start in range(0, mine, BLOCK_R):
        offs = start + tl.arange(0, BLOCK_R)
        earlier += tl.sum((tl.load(plan.slot_idx + offs, mask=offs < mine, other=-1) == slot).to(tl.int32), axis=0)
    target = tl.load(plan.kept_idx + slot)
    if (earlier == 0) & (target >= 0) & (target < n):
        x_ptr = x.ptr + b * x.stride_b
        own = tl.load(sizes_ptr + target)
        total = own
        for start in range(0, num_prune, BLOCK_R):
            offs = start + tl.arange(0, BLOCK_R)
            origin, exists = load_positions(plan.pruned_idx, offs, num_prune, n)
            merges = exists & (tl.load(plan.slot_idx + offs, mask=exists, other=-1) == slot)
            total += tl.sum(tl.load(sizes_ptr + origin, mask=merges, other=0.0), axis=0)
        out_ptr += (b * n + target if IN_PLACE else b * num_keep + slot) * dim
        for first in range(0, dim, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)
            sums = own * tl.load(x_ptr + target * x.stride_n + cols, mask=cols < dim, other=0.0).to(ACC)
            for start in range(0, num_prune, BLOCK_R):
                offs = start + tl.arange(0, BLOCK_R)
                origin, exists = load_positions(plan.pruned_idx, offs, num_prune, n)
                merges = exists & (tl.load(plan.slot_idx + offs, mask=exists, other=-1) == slot)
                size = tl.load(sizes_ptr + origin, mask=merges, other=0.0)
                rows_ptr = x_ptr + origin[:, None] * x.stride_n + cols[None, :]
                rows = tl.load(rows_ptr, mask=merges[:, None] & (cols < dim)[None, :], other=0.0)
                sums += tl.sum(rows.to(ACC) * size[:, None], axis=0)
            tl.debug_barrier()  # in place, all threads have read the row before one stores it
            tl.store(out_ptr + cols, (sums / total).to(out_ptr.dtype.element_ty), mask=cols < dim)
        tl.store(plan.kept_sizes + slot, total)
        if IN_PLACE:
            tl.store(sizes_ptr + target, total)


def means_rows(dtype: torch.dtype) -> int:
    """Pruned tokens that a program of means_kernel reads at a time: what registers hold without spilling."""
    return 8 if dtype == torch.float64 else 16


def target_registers(dtype: torch.dtype) -> dict[str, int]:
    """Registers a thread of targets_kernel may have, where ptxas would otherwise spill to fit more warps."""
    return {"maxnreg": 168 if dtype == torch.float64 else 96}


def _launch(x, safe_idx, candidate_idx, sizes, dest, num_keep, features, num_prefix, *, in_place):
    (batch, n, dim), (num_safe, num_candidates) = x.shape, (safe_idx.shape[1], candidate_idx.shape[1])
    num_prune = num_safe + num_candidates - num_keep
    kept_idx, pruned_idx, slots = (
        x.new_empty((batch, count), dtype=torch.int64) for count in (num_keep, num_prune, num_prune)
    )
    kept_sizes = sizes.new_empty((batch, num_keep))
    if not batch:
        return gather(x, kept_idx), kept_idx, pruned_idx, kept_sizes
    features = x if features is None else dense_rows(features)
    safe_idx, candidate_idx, acc = safe_idx.contiguous(), candidate_idx.contiguous(), accumulation_dtype(features.dtype)
    blocks = TargetBlocks(32, 16, 64 if features.dtype.itemsize == 2 else 16)
    tiles = max(triton.cdiv(num_safe - num_prefix, blocks.safe), 1)
    partial = x.new_empty((batch, tiles, num_candidates), dtype=acc)
    partial_idx, nearest = x.new_empty(partial.shape, dtype=torch.int64), torch.empty_like(candidate_idx)
    is_pruned, similarity = (x.new_empty(candidate_idx.shape, dtype=dtype) for dtype in (torch.int32, acc))
    plan = Plan(kept_idx, pruned_idx, slots, kept_sizes, dest)
    launch(
        targets_kernel, batch * tiles,
        rows_of(features), Tokens(safe_idx, candidate_idx, sizes),
        Scratch(partial, partial_idx, similarity, nearest, is_pruned, block_counters(x)), plan,
        n, num_safe, num_candidates, num_prune, num_prefix, IN_PLACE=in_place, BLOCKS=blocks,
        num_warps=_NUM_WARPS, **target_registers(features.dtype),
    )  # fmt: skip
    out = x if in_place else gather(x, kept_idx)
    if num_prune and dim:
        launch(
            means_kernel, batch * num_prune,
            rows_of(x), plan, sizes, out, n, num_keep, num_prune, IN_PLACE=in_place, BLOCK_R=means_rows(x.dtype),
            BLOCK_D=width_block(dim, 1024 // accumulation_dtype(x.dtype).itemsize),
            num_warps=_NUM_WARPS,
        )  # fmt: skip
    return out, kept_idx, pruned_idx, kept_sizes


def merge(x, safe_idx, candidate_idx, sizes, num_keep, features=None, num_prefix=0):
    """Launch cropr::merge. Positions must be a partition of [0, N): they are not checked on the device."""
    check("merge", x, safe_idx, candidate_idx, sizes, num_keep, features, num_prefix)
    x = dense_rows(x)
    dest = x.new_empty(x.shape[:2], dtype=torch.int64)
    parts = (sizes.contiguous(), dest, num_keep, features, num_prefix)
    return *_launch(x, safe_idx, candidate_idx, *parts, in_place=False), dest


def merge_(x, safe_idx, candidate_idx, sizes, parent, num_keep, num_prefix=0):
    """Launch cropr::merge_. Positions must be distinct and in [0, N): they are not checked on the device."""
    check("merge_", x, safe_idx, candidate_idx, sizes, parent, num_keep, num_prefix)
    parts = (sizes, parent, num_keep, None, num_prefix)
    _, kept_idx, pruned_idx, kept_sizes = _launch(x, safe_idx, candidate_idx, *parts, in_place=True)
    return kept_idx, pruned_idx, kept_sizes
