"""cropr::prune, gather and restore on CUDA: rows move once, bit for bit.

A program moves a tile of rows of one part, kept or pruned, so its pointers are uniform. Positions
are checked against the buffer: an index out of range moves nothing.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..validation import check
from .launching import launch
from .scores import launch_scores_select
from .select import select
from .utils import Rows, dense_rows, image_of, rows_of, width_block

_BLOCK_R = 8
_NUM_WARPS = 4


@triton.jit
def move_tile(source, source_rows, target, target_rows, b, valid, BLOCK_D: tl.constexpr):
    source_ptr = source.ptr + b * source.stride_b + source_rows[:, None] * source.stride_n
    target_ptr = target.ptr + b * target.stride_b + target_rows[:, None] * target.stride_n
    for start in range(0, source.dim, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)[None, :]
        mask = valid[:, None] & (cols < source.dim)
        tl.store(target_ptr + cols, tl.load(source_ptr + cols, mask=mask), mask=mask)


@triton.jit
def move_side(
    full,
    part,
    idx_ptr,
    b,
    tile,
    count,
    n,
    SCATTER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Move the rows of one part: part[i] = full[idx[i]], or the inverse with SCATTER."""
    rows = (tile * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    positions = tl.load(idx_ptr + b * count + rows, mask=rows < count, other=-1)
    valid = (positions >= 0) & (positions < n)
    if SCATTER:
        move_tile(part, rows, full, positions, b, valid, BLOCK_D)
    else:
        move_tile(full, positions, part, rows, b, valid, BLOCK_D)


@triton.jit(do_not_specialize=["n", "num_keep"])
def split_kernel(
    full, kept, kept_idx_ptr, pruned, pruned_idx_ptr, n, num_keep,
    SCATTER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    kept_tiles = tl.cdiv(num_keep, BLOCK_R)
    tiles = kept_tiles + tl.cdiv(n - num_keep, BLOCK_R)
    pid = tl.program_id(0)
    b = image_of(pid, tiles, not SCATTER)
    tile = pid % tiles
    if tile < kept_tiles:
        move_side(full, kept, kept_idx_ptr, b, tile, num_keep, n, SCATTER, BLOCK_R, BLOCK_D)
    else:
        move_side(
            full,
            pruned,
            pruned_idx_ptr,
            b,
            tile - kept_tiles,
            n - num_keep,
            n,
            SCATTER,
            BLOCK_R,
            BLOCK_D,
        )


def _launch_split(full, kept, kept_idx, pruned, pruned_idx, *, scatter):
    batch, n, dim = full.shape
    num_keep = kept.shape[1]
    tiles = triton.cdiv(num_keep, _BLOCK_R) + triton.cdiv(n - num_keep, _BLOCK_R)
    if not full.numel():
        return
    launch(
        split_kernel, batch * tiles,
        rows_of(full), rows_of(kept), kept_idx, rows_of(pruned), pruned_idx, n, num_keep,
        SCATTER=scatter, BLOCK_R=_BLOCK_R, BLOCK_D=width_block(dim, 512), num_warps=_NUM_WARPS,
    )  # fmt: skip


def prune(x, query, num_keep, num_prefix=0, priority=None):
    """Launch cropr::prune: scores, with the selection or before it, and one pass that moves every
    row."""
    check("prune", x, query, num_keep, num_prefix, priority)
    return _split(x, *launch_scores_select(x, query, num_keep, num_prefix, priority))


def split(x, scores, num_keep, num_prefix=0, priority=None):
    """Launch cropr::split in two: the selection, and one pass that moves every row."""
    check("split", x, scores, num_keep, num_prefix, priority)
    return _split(x, *select(scores, num_keep, num_prefix, priority))


def _split(
    x: Tensor, kept_idx: Tensor, pruned_idx: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = dense_rows(x)
    kept, pruned = (
        x.new_empty((x.shape[0], idx.shape[1], x.shape[2])) for idx in (kept_idx, pruned_idx)
    )
    _launch_split(x, kept, kept_idx, pruned, pruned_idx, scatter=False)
    return kept, kept_idx, pruned, pruned_idx


def restore(kept: Tensor, kept_idx: Tensor, pruned: Tensor, pruned_idx: Tensor) -> Tensor:
    """Launch cropr::restore. Positions outside [0, N) move nothing: they are not checked on the
    device."""
    check("restore", kept, kept_idx, pruned, pruned_idx)
    kept, pruned = dense_rows(kept), dense_rows(pruned)
    out = kept.new_empty((kept.shape[0], kept.shape[1] + pruned.shape[1], kept.shape[2]))
    _launch_split(out, kept, kept_idx.contiguous(), pruned, pruned_idx.contiguous(), scatter=True)
    return out


@triton.jit(do_not_specialize=["n", "count"])
def gather_kernel(x, idx_ptr, out_ptr, n, count, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    tiles = tl.cdiv(count, BLOCK_R)
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    out = Rows(out_ptr, count.to(tl.int64) * x.dim, x.dim, x.dim)
    move_side(x, out, idx_ptr, b, pid % tiles, count, n, False, BLOCK_R, BLOCK_D)


def gather(x: Tensor, idx: Tensor) -> Tensor:
    """Launch cropr::gather. Positions must lie in [0, N): they are not checked on the device."""
    check("gather", x, idx)
    x = dense_rows(x)
    idx = idx.contiguous()
    batch, n, dim = x.shape
    count = idx.shape[1]
    out = x.new_empty((batch, count, dim))
    if out.numel():
        launch(
            gather_kernel, batch * triton.cdiv(count, _BLOCK_R),
            rows_of(x), idx, out, n, count,
            BLOCK_R=_BLOCK_R, BLOCK_D=width_block(dim, 512), num_warps=_NUM_WARPS,
        )  # fmt: skip
    return out
