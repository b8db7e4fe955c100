"""cropr::scores on CUDA: one dot product per token, accumulated in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ._launch import PINNED, acc_dtype, dense_rows, width_block

# Fixed, never autotuned: the order of a float32 sum depends on them, and a near-tie must not flip with the tuner.
_BLOCK_N = 16
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["n"])
def scores_kernel(
    x_ptr,
    query_ptr,
    scores_ptr,
    stride_xb,
    stride_xn,
    n,
    dim,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    rows = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_row_ptr = x_ptr + b * stride_xb + rows.to(tl.int64)[:, None] * stride_xn
    acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=query_ptr.dtype.element_ty)
    for start in range(0, dim, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        q = tl.load(query_ptr + cols, mask=cols < dim, other=0.0)
        x = tl.load(x_row_ptr + cols[None, :], mask=(rows[:, None] < n) & (cols[None, :] < dim), other=0.0)
        acc += x.to(acc.dtype) * q[None, :]
    tl.store(scores_ptr + b * n + rows, tl.sum(acc, axis=1).to(tl.float32), mask=rows < n)


def fold_query(query: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum (M, D) queries into the one vector (D,) that gives the same scores."""
    wide = query.to(acc_dtype(query.dtype))
    folded = wide.sum(0) if wide.ndim == 2 else wide
    return folded.to(dtype).contiguous()


def launch_scores(x: Tensor, query: Tensor) -> Tensor:
    x = dense_rows(x)
    batch, n, dim = x.shape
    out = x.new_empty((batch, n), dtype=torch.float32)
    if out.numel():
        folded = fold_query(query, acc_dtype(x.dtype))
        with torch.cuda.device_of(x):
            scores_kernel[(batch * triton.cdiv(n, _BLOCK_N),)](
                x,
                folded,
                out,
                x.stride(0),
                x.stride(1),
                n,
                dim,
                BLOCK_N=_BLOCK_N,
                BLOCK_D=width_block(dim, 256),
                num_warps=_NUM_WARPS,
                **PINNED,
            )
    return out


def scores(x: Tensor, query: Tensor) -> Tensor:
    """Launch cropr::scores; shapes as in the op's contract."""
    _checks.tokens_and_query("scores", x, query)
    return launch_scores(x, query)
