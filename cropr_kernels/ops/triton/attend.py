"""cropr::attend and its gradient on CUDA.

One query (classification): a program per image, or several where there are few images, reads the
tokens once, with an online softmax, forward and backward. Many queries (dense tasks): tiled matrix
products with head_dim = D of any size. The logits of a few images at a time are in a scratch buffer
that is freed when the op returns; nothing of shape (B, M, N) is saved.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import accumulation_dtype
from ..validation import check
from .launching import launch
from .scores import scores
from .select import is_last
from .utils import aligned_rows, block_counters, rows_of

_REGISTERS = 224  # per thread; without a limit ptxas spills to fit more programs on a processor
_PROGRAMS = 256  # enough to fill a GPU; fixed, as the order of sums depends on it
_SCRATCH_BYTES = 64 << 20  # logits of one chunk of images: about the size of an L2 cache


# One query: a program holds full rows.


class Parts(NamedTuple):
    """Partial sums of programs that share an image, (B, parts, 2, D) and (B, parts, 3), and
    counters (B,)."""

    rows: Any
    scalars: Any
    counters: Any


@triton.jit
def store_attended(out_ptr, total, mean, out, weighted, cols, dim, BACKWARD: tl.constexpr):
    result = out / total
    if BACKWARD:
        result = (weighted - mean * result) / total
    tl.store(out_ptr + cols, result.to(out_ptr.dtype.element_ty), mask=cols < dim)


@triton.jit(do_not_specialize=["n", "part"])
def attend_one_kernel(
    x, query_ptr, grad_ptr, out_ptr, raw_ptr, parts, n, part,
    SCALE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b] = softmax(scale q.x) x, or with grad the gradient of q of this image. raw, if given:
    q.x.

    With p = softmax(scale q.x) and s_n = g.x_n: dq / scale = sum p s x - (sum p s) sum p x, three
    sums in one pass over a part of the tokens. The last program of an image adds up those of all
    its parts, in their order.
    """
    BACKWARD: tl.constexpr = grad_ptr is not None
    count = tl.cdiv(n, part)
    pid = tl.program_id(0)
    b = (pid // count).to(tl.int64)
    first = pid % count * part
    end = tl.minimum(first + part, n)
    dim = x.dim
    acc_type: tl.constexpr = query_ptr.dtype.element_ty
    cols = tl.arange(0, BLOCK_D)
    q = tl.load(query_ptr + cols, mask=cols < dim, other=0.0)
    if BACKWARD:
        g = tl.load(grad_ptr + b * dim + cols, mask=cols < dim, other=0.0).to(acc_type)
    out_ptr += b * dim
    top = tl.full([], float("-inf"), acc_type)
    total = tl.zeros([], acc_type)
    mean = tl.zeros([], acc_type)
    out = tl.zeros([BLOCK_D], acc_type)
    weighted = tl.zeros([BLOCK_D], acc_type)
    for start in range(first, end, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        tile_ptr = x.ptr + b * x.stride_b + rows.to(tl.int64)[:, None] * x.stride_n + cols[None, :]
        tile = tl.load(tile_ptr, mask=(rows[:, None] < end) & (cols[None, :] < dim), other=0.0).to(
            acc_type
        )
        raw = tl.sum(tile * q[None, :], axis=1)
        if raw_ptr is not None:
            tl.store(raw_ptr + b * n + rows, raw.to(tl.float32), mask=rows < end)
        logits = tl.where(rows < end, raw * SCALE, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=0))
        rescale = tl.exp(top - new_top)
        p = tl.exp(logits - new_top)
        total = total * rescale + tl.sum(p, axis=0)
        out = out * rescale + tl.sum(p[:, None] * tile, axis=0)
        if BACKWARD:
            slope = tl.sum(tile * g[None, :], axis=1)
            mean = mean * rescale + tl.sum(p * slope, axis=0)
            weighted = weighted * rescale + tl.sum((p * slope)[:, None] * tile, axis=0)
        top = new_top
    if parts.counters is None:
        store_attended(out_ptr, total, mean, out, weighted, cols, dim, BACKWARD)
    else:
        rows_ptr = parts.rows + pid.to(tl.int64) * 2 * dim + cols
        scalars_ptr = parts.scalars + pid * 3
        tl.store(scalars_ptr, top)
        tl.store(scalars_ptr + 1, total)
        tl.store(rows_ptr, out, mask=cols < dim)
        if BACKWARD:
            tl.store(scalars_ptr + 2, mean)
            tl.store(rows_ptr + dim, weighted, mask=cols < dim)
        if is_last(parts.counters + b, count):
            add_parts(parts, out_ptr, b, count, cols, dim, BACKWARD, BLOCK_N)


@triton.jit
def add_parts(parts, out_ptr, b, count, cols, dim, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """Combine the sums of all parts of an image, by another online softmax."""
    acc_type: tl.constexpr = parts.rows.dtype.element_ty
    top = tl.full([], float("-inf"), acc_type)
    total = tl.zeros([], acc_type)
    mean = tl.zeros([], acc_type)
    out = tl.zeros(cols.shape, acc_type)
    weighted = tl.zeros(cols.shape, acc_type)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        scalars_ptr = parts.scalars + (b * count + index) * 3
        rows_ptr = parts.rows + (b * count + index)[:, None] * 2 * dim + cols[None, :]
        inside = index < count
        mask = inside[:, None] & (cols < dim)[None, :]
        tops = tl.load(scalars_ptr, mask=inside, other=float("-inf"), cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        rescale = tl.exp(top - new_top)
        p = tl.exp(tops - new_top)
        total = total * rescale + tl.sum(
            p * tl.load(scalars_ptr + 1, inside, other=0.0, cache_modifier=".cg"), axis=0
        )
        out = out * rescale + tl.sum(
            p[:, None] * tl.load(rows_ptr, mask, other=0.0, cache_modifier=".cg"), axis=0
        )
        if BACKWARD:
            means = tl.load(scalars_ptr + 2, inside, other=0.0, cache_modifier=".cg")
            mean = mean * rescale + tl.sum(p * means, axis=0)
            rows = tl.load(rows_ptr + dim, mask, other=0.0, cache_modifier=".cg")
            weighted = weighted * rescale + tl.sum(p[:, None] * rows, axis=0)
        top = new_top
    store_attended(out_ptr, total, mean, out, weighted, cols, dim, BACKWARD)


# Many queries: products tiled over both sides and over the inner dimension.


@triton.jit(do_not_specialize=["m", "n"])
def rows_dot_rows_kernel(
    a,
    x,
    out_ptr,
    stride_om,
    m,
    n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[b, i, j] = a[b, i] . x[b, j]: logits (a = queries, the same for all images) and their
    slopes."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    b = (pid // (tiles_m * tiles_n)).to(tl.int64)
    rows = (pid // tiles_n) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    a_ptr = a.ptr + b * a.stride_b + rows.to(tl.int64)[:, None] * a.stride_n
    x_ptr = x.ptr + b * x.stride_b + tokens.to(tl.int64)[:, None] * x.stride_n
    acc = tl.zeros([BLOCK_M, BLOCK_N], out_ptr.dtype.element_ty)
    for start in range(0, x.dim, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)[None, :]
        a_tile = tl.load(a_ptr + cols, mask=(rows[:, None] < m) & (cols < x.dim), other=0.0)
        x_tile = tl.load(x_ptr + cols, mask=(tokens[:, None] < n) & (cols < x.dim), other=0.0)
        acc = tl.dot(a_tile, tl.trans(x_tile), acc, input_precision="ieee", out_dtype=acc.dtype)
    out_ptr += (b * m + rows[:, None]) * stride_om + tokens[None, :]
    tl.store(out_ptr, acc, mask=(rows[:, None] < m) & (tokens[None, :] < n))


@triton.jit(do_not_specialize=["n"])
def softmax_kernel(logits_ptr, slope_ptr, stride, n, BLOCK_N: tl.constexpr):
    """In place over one row: p = softmax(logits), or with slope p * (slope - sum p slope); zeros
    from n to stride."""
    row = tl.program_id(0).to(tl.int64) * stride
    acc_type: tl.constexpr = logits_ptr.dtype.element_ty
    top = tl.full([BLOCK_N], float("-inf"), acc_type)
    for start in range(0, n, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        top = tl.maximum(top, tl.load(logits_ptr + row + cols, mask=cols < n, other=float("-inf")))
    maximum = tl.max(top, axis=0)
    total = tl.zeros([BLOCK_N], acc_type)
    mean = tl.zeros([BLOCK_N], acc_type)
    for start in range(0, n, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        p = tl.exp(tl.load(logits_ptr + row + cols, mask=cols < n, other=float("-inf")) - maximum)
        total += p
        if slope_ptr is not None:
            mean += p * tl.load(slope_ptr + row + cols, mask=cols < n, other=0.0)
    norm = 1.0 / tl.sum(total, axis=0)
    average = tl.sum(mean, axis=0) * norm
    for start in range(0, stride, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        p = (
            tl.exp(tl.load(logits_ptr + row + cols, mask=cols < n, other=float("-inf")) - maximum)
            * norm
        )
        if slope_ptr is not None:
            slope = tl.load(slope_ptr + row + cols, mask=cols < n, other=0.0)
            p = p * (slope - average)
        tl.store(logits_ptr + row + cols, p, mask=cols < stride)


@triton.jit(do_not_specialize=["m", "n", "batch"])
def weighted_rows_kernel(
    weight_ptr, stride_wm, x, out_ptr, m, n, batch,
    SUM_BATCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[b, i] = sum_j weight[b, i, j] x[b, j]; with SUM_BATCH out[i] += the sum of that over all
    images.

    Weights past n are zero: they are masked by a multiple of 16, and so loaded 16 bytes at a time.
    """
    dim = x.dim
    tiles_m, tiles_d = tl.cdiv(m, BLOCK_M), tl.cdiv(dim, BLOCK_D)
    pid = tl.program_id(0)
    b = (pid // (tiles_m * tiles_d)).to(tl.int64)
    rows = ((pid // tiles_d) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = pid % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], weight_ptr.dtype.element_ty)
    images = batch if SUM_BATCH else 1
    for image in range(images):
        image_idx = b + image
        for start in range(0, n, BLOCK_K):
            tokens = start + tl.arange(0, BLOCK_K)
            w_ptr = weight_ptr + (image_idx * m + rows[:, None]) * stride_wm + tokens[None, :]
            w = tl.load(w_ptr, mask=(rows[:, None] < m) & (tokens[None, :] < stride_wm), other=0.0)
            tile_ptr = (
                x.ptr
                + image_idx * x.stride_b
                + tokens.to(tl.int64)[:, None] * x.stride_n
                + cols[None, :]
            )
            tile = tl.load(tile_ptr, mask=(tokens[:, None] < n) & (cols[None, :] < dim), other=0.0)
            acc = tl.dot(w.to(tile.dtype), tile, acc, input_precision="ieee", out_dtype=acc.dtype)
    out_ptr += (rows[:, None] if SUM_BATCH else b * m + rows[:, None]) * dim + cols[None, :]
    mask = (rows[:, None] < m) & (cols[None, :] < dim)
    if SUM_BATCH:
        acc += tl.load(out_ptr, mask=mask, other=0.0)
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _launch_one(x, query, scale, out, *, grad=None, raw=None):
    batch, n, dim = x.shape
    acc = accumulation_dtype(x.dtype)
    block = one_query_rows(x.dtype)
    # Parts of at least 64 tokens, in full tiles.
    part = triton.cdiv(max(64, triton.cdiv(n, max(1, _PROGRAMS // batch))), block) * block
    count = triton.cdiv(n, part)
    parts = Parts(None, None, None)
    if count > 1:
        rows, scalars = (
            x.new_empty((batch, count, *shape), dtype=acc) for shape in ((2, dim), (3,))
        )
        parts = Parts(rows, scalars, block_counters(x))
    launch(
        attend_one_kernel, batch * count,
        rows_of(x), query.to(acc).contiguous(), grad, out, raw, parts, n, part,
        SCALE=scale,  # a constant of the model: one variant
        BLOCK_N=block, BLOCK_D=max(triton.next_power_of_2(dim), 16),
        num_warps=8, maxnreg=_REGISTERS,
    )  # fmt: skip


def one_query_rows(dtype: torch.dtype) -> int:
    """Tokens that a program of attend_one_kernel holds at a time without spilling."""
    return 4 if dtype == torch.float64 else 8


def matrix_tiles(dtype: torch.dtype) -> dict[str, int]:
    """Edge and inner length of the product tiles, and warps: none spills from sm_80 on."""
    if dtype.itemsize == 2:
        return {"edge": 64, "inner": 64, "num_warps": 4}
    return {"edge": 64, "inner": 16, "num_warps": 8}


def _launch_dot(a: Tensor, x: Tensor, out: Tensor) -> None:
    count, m, n = out.shape
    tiles = matrix_tiles(x.dtype)
    edge = tiles["edge"]
    launch(
        rows_dot_rows_kernel, count * triton.cdiv(m, edge) * triton.cdiv(n, edge),
        rows_of(a), rows_of(x), out, out.stride(1), m, n, BLOCK_M=edge, BLOCK_N=edge,
        BLOCK_K=tiles["inner"],
        num_warps=tiles["num_warps"], maxnreg=_REGISTERS,
    )  # fmt: skip


def _launch_softmax(logits: Tensor, slope: Tensor | None) -> None:
    count, m, n = logits.shape
    launch(
        softmax_kernel, count * m,
        logits, slope, logits.stride(1), n, BLOCK_N=min(max(triton.next_power_of_2(n), 128), 1024),
        num_warps=4,
    )  # fmt: skip


def _launch_weighted(weight: Tensor, x: Tensor, out: Tensor, *, sum_batch: bool) -> None:
    count, m, n = weight.shape
    dim = x.shape[2]
    tiles = matrix_tiles(x.dtype)
    edge = tiles["edge"]
    grid = triton.cdiv(m, edge) * triton.cdiv(dim, edge) * (1 if sum_batch else count)
    launch(
        weighted_rows_kernel, grid,
        weight, weight.stride(1), rows_of(x), out, m, n, count,
        SUM_BATCH=sum_batch, BLOCK_M=edge, BLOCK_D=edge, BLOCK_K=tiles["inner"],
        num_warps=tiles["num_warps"], maxnreg=_REGISTERS,
    )  # fmt: skip


def _chunk(x: Tensor, m: int) -> int:
    """Number of images whose logits fit the scratch buffer, at least one."""
    return max(1, _SCRATCH_BYTES // (m * x.shape[1] * accumulation_dtype(x.dtype).itemsize))


def _scratch(x: Tensor, m: int) -> Tensor:
    """Allocate logits (B, M, N) whose rows begin at multiples of 16 elements."""
    batch, n, _ = x.shape
    return x.new_empty((batch, m, triton.cdiv(n, 16) * 16), dtype=accumulation_dtype(x.dtype))[
        :, :, :n
    ]


def _scaled(queries: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return (queries.to(accumulation_dtype(dtype)) * scale).contiguous()


def attend(x: Tensor, queries: Tensor, scale: float) -> Tensor:
    """Launch cropr::attend; shapes as in the op's contract. Products run in the dtype of x, sums in
    float32."""
    check("attend", x, queries, scale)
    return _attend(x, queries, scale, None)


def attend_scores(x: Tensor, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Launch cropr::attend_scores: with one query scores are its logits, else they take another
    pass."""
    check("attend_scores", x, queries, scale)
    if queries.shape[0] != 1:
        return _attend(x, queries, scale, None), scores(x, queries)
    raw = x.new_empty(x.shape[:2], dtype=torch.float32)
    return _attend(x, queries, scale, raw), raw


def _attend(x: Tensor, queries: Tensor, scale: float, raw: Tensor | None) -> Tensor:
    x = aligned_rows(x)
    batch, _, dim = x.shape
    m = queries.shape[0]
    out = x.new_empty((batch, m, dim))
    if not out.numel():
        return out
    if m == 1:
        _launch_one(x, queries, scale, out, raw=raw)
        return out
    queries = _scaled(queries, scale, x.dtype).to(x.dtype)
    for start in range(0, batch, step := _chunk(x, m)):
        part = x[start : start + step]
        logits = _scratch(part, m)
        _launch_dot(queries.expand(part.shape[0], m, dim), part, logits)
        _launch_softmax(logits, None)
        _launch_weighted(logits, part, out[start : start + step], sum_batch=False)
    return out


def attend_backward(grad_out: Tensor, x: Tensor, queries: Tensor, scale: float) -> Tensor:
    """Launch the gradient of cropr::attend for the queries: (M, D) in their dtype, the same bits on
    every run."""
    check("attend_backward", grad_out, x, queries, scale)
    x = aligned_rows(x)
    acc = accumulation_dtype(x.dtype)
    batch, _, dim = x.shape
    m = queries.shape[0]
    if not grad_out.numel():
        return torch.zeros_like(queries, memory_format=torch.contiguous_format)
    if m == 1:
        per_image = x.new_empty((batch, dim), dtype=acc)
        _launch_one(x, queries, scale, per_image, grad=grad_out.contiguous())
        return (per_image.sum(0, keepdim=True) * scale).to(queries.dtype)
    scaled = _scaled(queries, scale, x.dtype).to(x.dtype)
    grad = grad_out.to(x.dtype).contiguous()
    total = x.new_zeros((m, dim), dtype=acc)
    for start in range(0, batch, step := _chunk(x, m)):
        part = x[start : start + step]
        logits, slope = _scratch(part, m), _scratch(part, m)
        _launch_dot(scaled.expand(part.shape[0], m, dim), part, logits)
        _launch_dot(grad[start : start + step], part, slope)
        _launch_softmax(logits, slope)
        _launch_weighted(logits, part, total, sum_batch=True)
    return (total * scale).to(queries.dtype)
