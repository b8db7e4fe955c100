"""cropr::merge and merge_ on CUDA: leaving tokens go into the most similar kept ones, in two launches.

The first compares: a program holds a tile of kept tokens against all leaving ones, and the last program of an image
settles where each of them goes. The second writes the means, one program per leaving token: the first of those that
share a target adds them all up, in order, so no two programs write one row and the bits are the same on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ._launch import PINNED, acc_dtype, dense_rows, tickets, width_block
from .rows import gather
from .select import is_last

_NUM_WARPS = 4
_TRITON_TYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def load_positions(idx_ptr, offs, count, n):
    """Positions idx[offs], and which of them exist: inside the list, and inside the n tokens."""
    position = tl.load(idx_ptr + offs, mask=offs < count, other=-1)
    exists = (position >= 0) & (position < n)
    return tl.where(exists, position, 0), exists


@triton.jit(do_not_specialize=["n", "num_keep", "num_prune", "num_prefix"])
def targets_kernel(
    feature_ptr, stride_fb, stride_fn, kept_idx_ptr, pruned_idx_ptr, partial_ptr, partial_idx_ptr, tickets_ptr,
    sizes_ptr, kept_sizes_ptr, slot_idx_ptr, dest_idx_ptr, n, num_keep, num_prune, num_prefix, dim,
    IN_PLACE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    tiles = tl.maximum(tl.cdiv(num_keep - num_prefix, BLOCK_K), 1)
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    kept_idx_ptr += b * num_keep
    pruned_idx_ptr += b * num_prune
    feature_ptr += b * stride_fb
    slots = num_prefix + tile * BLOCK_K + tl.arange(0, BLOCK_K)
    position, candidate = load_positions(kept_idx_ptr, slots, num_keep, n)
    kept_ptr = feature_ptr + position[:, None] * stride_fn
    for start in range(0, num_prune, BLOCK_R):
        leaving = start + tl.arange(0, BLOCK_R)
        origin, leaves = load_positions(pruned_idx_ptr, leaving, num_prune, n)
        gone_ptr = feature_ptr + origin[:, None] * stride_fn
        product = tl.zeros([BLOCK_K, BLOCK_R], ACC)
        square = tl.zeros([BLOCK_K], ACC)
        for first in range(0, dim, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)[None, :]
            kept = tl.load(kept_ptr + cols, mask=candidate[:, None] & (cols < dim), other=0.0)
            gone = tl.load(gone_ptr + cols, mask=leaves[:, None] & (cols < dim), other=0.0)
            product = tl.dot(kept, tl.trans(gone), product, input_precision="ieee", out_dtype=ACC)
            wide = kept.to(ACC)
            square += tl.sum(wide * wide, axis=1)
        # A leaving token's own norm does not change its order of candidates: only theirs divides. NaN is the lowest.
        similarity = product / tl.sqrt(square)[:, None]
        comparable = candidate[:, None] & (similarity == similarity)
        similarity = tl.where(comparable, similarity, float("-inf"))
        best = tl.max(similarity, axis=0)
        slot = tl.min(tl.where(comparable & (similarity == best[None, :]), slots[:, None], num_keep), axis=0)
        partial = (b * tiles + tile) * num_prune + leaving
        tl.store(partial_ptr + partial, best, mask=leaving < num_prune)
        tl.store(partial_idx_ptr + partial, slot.to(tl.int64), mask=leaving < num_prune)
    if is_last(tickets_ptr + b, tiles):
        dest_idx_ptr += b * n
        for start in range(0, num_prune, BLOCK_R):
            leaving = start + tl.arange(0, BLOCK_R)
            best = tl.full([BLOCK_R], float("-inf"), ACC)
            slot = tl.zeros([BLOCK_R], tl.int64) + num_prefix
            for other in range(0, tiles):  # tiles ascend and only more wins: the lowest of equal slots
                partial = (b * tiles + other) * num_prune + leaving
                inside = leaving < num_prune
                value = tl.load(partial_ptr + partial, mask=inside, other=float("-inf"), cache_modifier=".cg")
                where = tl.load(partial_idx_ptr + partial, mask=inside, other=0, cache_modifier=".cg")
                slot = tl.where(value > best, where, slot)
                best = tl.maximum(best, value)
            tl.store(slot_idx_ptr + b * num_prune + leaving, slot, mask=leaving < num_prune)
            origin, leaves = load_positions(pruned_idx_ptr, leaving, num_prune, n)
            if IN_PLACE:
                slot = tl.load(kept_idx_ptr + slot, mask=leaves, other=0)
            tl.store(dest_idx_ptr + origin, slot, mask=leaves)
        for start in range(0, num_keep, BLOCK_K):
            slots = start + tl.arange(0, BLOCK_K)
            position, stays = load_positions(kept_idx_ptr, slots, num_keep, n)
            size = tl.load(sizes_ptr + b * n + position, mask=stays, other=0.0)
            tl.store(kept_sizes_ptr + b * num_keep + slots, size, mask=slots < num_keep)
            if not IN_PLACE:
                tl.store(dest_idx_ptr + position, slots.to(tl.int64), mask=stays)


@triton.jit(do_not_specialize=["n", "num_keep", "num_prune"])
def means_kernel(
    x_ptr, stride_xb, stride_xn, kept_idx_ptr, pruned_idx_ptr, slot_idx_ptr, sizes_ptr, kept_sizes_ptr,
    out_ptr, n, num_keep, num_prune, dim,
    IN_PLACE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = (pid // num_prune).to(tl.int64)
    mine = pid % num_prune
    slot_idx_ptr += b * num_prune
    pruned_idx_ptr += b * num_prune
    sizes_ptr += b * n
    slot = tl.load(slot_idx_ptr + mine)
    earlier = 0
    for start in range(0, mine, BLOCK_R):
        leaving = start + tl.arange(0, BLOCK_R)
        earlier += tl.sum((tl.load(slot_idx_ptr + leaving, mask=leaving < mine, other=-1) == slot).to(tl.int32), axis=0)
    target = tl.load(kept_idx_ptr + b * num_keep + slot)
    if (earlier == 0) & (target >= 0) & (target < n):
        x_ptr += b * stride_xb
        own = tl.load(sizes_ptr + target)
        total = own
        for start in range(0, num_prune, BLOCK_R):
            leaving = start + tl.arange(0, BLOCK_R)
            origin, leaves = load_positions(pruned_idx_ptr, leaving, num_prune, n)
            comes = leaves & (tl.load(slot_idx_ptr + leaving, mask=leaves, other=-1) == slot)
            total += tl.sum(tl.load(sizes_ptr + origin, mask=comes, other=0.0), axis=0)
        out_ptr += (b * n + target if IN_PLACE else b * num_keep + slot) * dim
        for first in range(0, dim, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)
            sums = own * tl.load(x_ptr + target * stride_xn + cols, mask=cols < dim, other=0.0).to(ACC)
            for start in range(0, num_prune, BLOCK_R):
                leaving = start + tl.arange(0, BLOCK_R)
                origin, leaves = load_positions(pruned_idx_ptr, leaving, num_prune, n)
                comes = leaves & (tl.load(slot_idx_ptr + leaving, mask=leaves, other=-1) == slot)
                size = tl.load(sizes_ptr + origin, mask=comes, other=0.0)
                rows_ptr = x_ptr + origin[:, None] * stride_xn + cols[None, :]
                rows = tl.load(rows_ptr, mask=comes[:, None] & (cols < dim)[None, :], other=0.0)
                sums += tl.sum(rows.to(ACC) * size[:, None], axis=0)
            tl.store(out_ptr + cols, (sums / total).to(out_ptr.dtype.element_ty), mask=cols < dim)
        tl.store(kept_sizes_ptr + b * num_keep + slot, total)
        if IN_PLACE:
            tl.store(sizes_ptr + target, total)


def target_blocks(dtype: torch.dtype) -> dict[str, int]:
    """Kept and leaving tokens that a program of targets_kernel compares, and columns it takes at a time."""
    return {"BLOCK_K": 32, "BLOCK_R": 16, "BLOCK_D": 64 if dtype.itemsize == 2 else 16}


def _launch(
    x: Tensor,
    out: Tensor,
    kept_idx: Tensor,
    pruned_idx: Tensor,
    sizes: Tensor,
    dest: Tensor,
    held_tickets: Tensor,
    features: Tensor | None,
    num_prefix: int,
    *,
    in_place: bool,
) -> Tensor:
    batch, n, dim = x.shape
    num_keep, num_prune = kept_idx.shape[1], pruned_idx.shape[1]
    kept_sizes = sizes.new_empty((batch, num_keep))
    if not batch:
        return kept_sizes
    features = x if features is None else dense_rows(features)
    kept_idx, pruned_idx, acc = kept_idx.contiguous(), pruned_idx.contiguous(), acc_dtype(features.dtype)
    blocks = target_blocks(features.dtype)
    tiles = max(triton.cdiv(num_keep - num_prefix, blocks["BLOCK_K"]), 1)
    partial = x.new_empty((batch, tiles, num_prune), dtype=acc)
    partial_idx, slots = (x.new_empty(shape, dtype=torch.int64) for shape in (partial.shape, pruned_idx.shape))
    with torch.cuda.device_of(x):
        targets_kernel[(batch * tiles,)](
            features, features.stride(0), features.stride(1), kept_idx, pruned_idx, partial, partial_idx, held_tickets,
            sizes, kept_sizes, slots, dest, n, num_keep, num_prune, num_prefix, features.shape[2],
            IN_PLACE=in_place, **blocks, ACC=_TRITON_TYPE[acc], num_warps=_NUM_WARPS, **PINNED,
        )  # fmt: skip
        if num_prune and dim:
            means_kernel[(batch * num_prune,)](
                x, x.stride(0), x.stride(1), kept_idx, pruned_idx, slots, sizes, kept_sizes, out,
                n, num_keep, num_prune, dim,
                IN_PLACE=in_place, BLOCK_R=16, BLOCK_D=width_block(dim, 1024 // acc_dtype(x.dtype).itemsize), ACC=_TRITON_TYPE[acc_dtype(x.dtype)],
                num_warps=_NUM_WARPS, **PINNED,
            )  # fmt: skip
    return kept_sizes


def merge(
    x: Tensor,
    kept_idx: Tensor,
    pruned_idx: Tensor,
    sizes: Tensor,
    features: Tensor | None = None,
    num_prefix: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch cropr::merge. Positions must be a partition of [0, N): they are not checked on the device."""
    _checks.merge(x, kept_idx, pruned_idx, sizes, features, num_prefix)
    x = dense_rows(x)
    kept = gather(x, kept_idx)
    dest = x.new_empty(x.shape[:2], dtype=torch.int64)
    held = tickets(x.shape[0], x.device)
    parts = (sizes.contiguous(), dest, held, features, num_prefix)
    return kept, _launch(x, kept, kept_idx, pruned_idx, *parts, in_place=False), dest


def merge_(
    x: Tensor,
    kept_idx: Tensor,
    pruned_idx: Tensor,
    sizes: Tensor,
    parent: Tensor,
    tickets: Tensor,
    features: Tensor | None = None,
    num_prefix: int = 0,
) -> Tensor:
    """Launch cropr::merge_. Positions must be distinct and in [0, N): they are not checked on the device."""
    _checks.merge_in_place(x, kept_idx, pruned_idx, sizes, parent, tickets, features, num_prefix)
    return _launch(x, x, kept_idx, pruned_idx, sizes, parent, tickets, features, num_prefix, in_place=True)
