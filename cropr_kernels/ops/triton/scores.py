"""cropr::scores on CUDA: one dot product per token, accumulated in float32; and the scores of prune, whose last
program of an image selects.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import accumulation_dtype, fold_queries
from ..validation import check
from .launching import launch
from .select import Selection, is_last, key_blocks, priority_bytes, select_image
from .utils import block_counters, dense_rows, registers, rows_of, width_block


@triton.jit(do_not_specialize=["n", "num_keep", "num_prefix"])
def scores_kernel(
    x, query_ptr, selection, n, num_keep, num_prefix,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n, BLOCK_R)
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    rows = (pid % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    x_row_ptr = x.ptr + b * x.stride_b + rows.to(tl.int64)[:, None] * x.stride_n
    acc = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32)
    for start in range(0, x.dim, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        q = tl.load(query_ptr + cols, mask=cols < x.dim, other=0.0)
        tile = tl.load(x_row_ptr + cols[None, :], mask=(rows[:, None] < n) & (cols[None, :] < x.dim), other=0.0)
        acc += tile.to(acc.dtype) * q.to(acc.dtype)[None, :]
    tl.store(selection.scores + b * n + rows, tl.sum(acc, axis=1).to(tl.float32), mask=rows < n)
    if selection.kept_idx is not None:  # noqa: SIM102  (Triton would evaluate both sides of `and`)
        if is_last(selection.counters + b, tiles):
            select_image(selection.scores + b * n, selection, b, None, n, n, num_keep, num_prefix, KEYS)


def row_blocks(dim: int, num_warps: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows a program scores and columns it takes at a time: 64 bytes of sums a thread."""
    return {"BLOCK_R": 4 * num_warps, "BLOCK_D": width_block(dim, 512 // accumulation_dtype(dtype).itemsize)}


def fold_query(query: Tensor) -> Tensor:
    """The folded query as kernels read it, of any dtype; no launch for one that is that already."""
    return fold_queries(query).contiguous() if query.ndim == 2 else query.contiguous()


def _launch(x, query, kept_idx, pruned_idx, num_prefix, priority=None):
    x = dense_rows(x)
    batch, n, dim = x.shape
    out = x.new_empty((batch, n), dtype=torch.float32)
    if not out.numel():
        return out
    # The order of a float32 sum depends on block shape and warps: never autotuned, or a near-tie would flip with the
    # tuner, and the same with selection as without, or prune would disagree with scores.
    blocks, num_warps = key_blocks(n, embedded=True)
    num_warps = max(num_warps, 4)
    num_keep, counters = 0, None
    if kept_idx is not None:
        num_keep, counters = kept_idx.shape[1], block_counters(x)
    launch(
        scores_kernel, batch * triton.cdiv(n, 4 * num_warps),
        rows_of(x), fold_query(query),
        Selection(out, priority_bytes(priority), counters, kept_idx, pruned_idx), n, num_keep, num_prefix,
        **row_blocks(dim, num_warps, x.dtype), KEYS=blocks, num_warps=num_warps, **registers(num_warps),
    )  # fmt: skip
    return out


def launch_scores_select(x, query, num_keep, num_prefix, priority):
    """Positions kept and pruned, in one launch."""
    batch, n, _ = x.shape
    kept_idx = x.new_empty((batch, num_keep), dtype=torch.int64)
    pruned_idx = x.new_empty((batch, n - num_keep), dtype=torch.int64)
    _launch(x, query, kept_idx, pruned_idx, num_prefix, priority)
    return kept_idx, pruned_idx


def scores(x: Tensor, query: Tensor) -> Tensor:
    """Launch cropr::scores; shapes as in the op's contract."""
    check("scores", x, query)
    return _launch(x, query, None, None, 0)
