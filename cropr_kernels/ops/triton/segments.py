"""cropr::attend_segments on CUDA: a program per block of queries of an image and head.

It reads the keys of its image once, with an online softmax. Blocks past the end of a short image
return at once: the grid follows from `longest`, as reading starts would wait for the GPU.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..validation import check
from .launching import launch
from .utils import dense_rows

LOG2E = tl.constexpr(math.log2(math.e))


class Heads(NamedTuple):
    """Queries, keys or values (T, H, C): data, and elements from token to token and from head to
    head."""

    ptr: Any
    stride_t: Any
    stride_h: Any


class Tiles(NamedTuple):
    """Queries, keys and channels of a product, the power of two that covers a head, and launch
    options: warps, tiles of keys that are loaded ahead, and registers of a thread."""

    queries: int
    keys: int
    channels: int
    width: int
    warps: int
    stages: int
    registers: int


@triton.jit
def load_tile(heads, h, rows, end, cols, dim):
    """Load these rows before `end` and columns of head h; others are zero."""
    ptr = heads.ptr + h * heads.stride_h + rows[:, None] * heads.stride_t + cols[None, :]
    return tl.load(ptr, mask=(rows < end)[:, None] & (cols < dim)[None, :], other=0.0)


@triton.jit
def add_products(queries, keys, logits):
    """logits + queries keys^T, in the dtype of the logits."""
    return tl.dot(queries, tl.trans(keys), logits, input_precision="ieee", out_dtype=logits.dtype)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def attend_segments_kernel(
    q, k, v, out, starts_ptr, log_sizes_ptr, num_tokens, num_blocks, num_heads, dim,
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[t, h] = softmax(scale q.k + log_sizes) v over the image of t; SCALE is times log2(e)."""
    ACC: tl.constexpr = tl.float64 if q.ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    block = pid % num_blocks
    h = (pid // num_blocks % num_heads).to(tl.int64)
    b = (pid // num_blocks // num_heads).to(tl.int64)
    # Starts out of range read and write nothing
    begin = tl.maximum(tl.load(starts_ptr + b), 0)
    end = tl.minimum(tl.load(starts_ptr + b + 1), num_tokens)
    rows = begin + block * BLOCK_M + tl.arange(0, BLOCK_M)
    if begin + block * BLOCK_M >= end:
        return
    cols = tl.arange(0, BLOCK_C)
    if BLOCK_K == BLOCK_C:
        queries = load_tile(q, h, rows, end, cols, dim)
    top = tl.full([BLOCK_M], float("-inf"), ACC)
    total = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    for first in range(begin, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        logits = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        if BLOCK_K == BLOCK_C:
            logits = add_products(queries, load_tile(k, h, tokens, end, cols, dim), logits)
        else:  # products of 32 and 64 bits hold what they multiply in registers
            for channel in range(0, dim, BLOCK_K):
                channels = channel + tl.arange(0, BLOCK_K)
                queries = load_tile(q, h, rows, end, channels, dim)
                logits = add_products(queries, load_tile(k, h, tokens, end, channels, dim), logits)
        logits *= SCALE
        if log_sizes_ptr is not None:
            log_sizes = tl.load(log_sizes_ptr + tokens, mask=tokens < end, other=0.0)
            logits += log_sizes.to(ACC)[None, :] * LOG2E
        logits = tl.where((tokens < end)[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        rescale = tl.exp2(top - new_top)
        p = tl.exp2(logits - new_top[:, None])
        total = total * rescale + tl.sum(p, axis=1)
        values = load_tile(v, h, tokens, end, cols, dim)
        acc = acc * rescale[:, None]
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision="ieee", out_dtype=ACC)
        top = new_top
    out_ptr = out.ptr + h * out.stride_h + rows[:, None] * out.stride_t + cols[None, :]
    mask = (rows < end)[:, None] & (cols < dim)[None, :]
    tl.store(out_ptr, (acc / total[:, None]).to(out.ptr.dtype.element_ty), mask=mask)


def tiles_of(dtype: torch.dtype, width: int) -> Tiles:
    """Choose tiles that fit into registers and shared memory without spilling."""
    block = max(triton.next_power_of_2(width), 16)
    if dtype.itemsize > 2:
        queries = 16 if block > 256 else 32 if block == 256 or dtype.itemsize == 8 else 64
        return Tiles(queries, 16, 16, block, 8, 3, 224)
    if block > 256:
        return Tiles(16, 16, 64, block, 8, 1, 224)
    if block == 256:
        return Tiles(64, 32, block, block, 8, 2, 224)
    return Tiles(64, 32, block, block, 4, 3, 255)


def attend_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    log_sizes: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Launch cropr::attend_segments; shapes as in the op's contract. Products run in the dtype of
    q, sums in float32."""
    check("attend_segments", q, k, v, starts, longest, log_sizes, scale)
    num_tokens, num_heads, width = q.shape
    out = q.new_empty(q.shape)
    num_images = starts.shape[0] - 1
    if not out.numel() or not num_images or not longest:
        return out
    tiles = tiles_of(q.dtype, width)
    num_blocks = triton.cdiv(longest, tiles.queries)
    heads = [Heads(x, x.stride(0), x.stride(1)) for x in (*map(dense_rows, (q, k, v)), out)]
    launch(
        attend_segments_kernel, num_images * num_heads * num_blocks,
        *heads, starts.contiguous(), None if log_sizes is None else log_sizes.contiguous(),
        num_tokens, num_blocks, num_heads, width,
        SCALE=(width**-0.5 if scale is None else scale) * LOG2E.value,  # a constant of the model
        BLOCK_M=tiles.queries, BLOCK_N=tiles.keys, BLOCK_K=tiles.channels,
        BLOCK_C=tiles.width,
        num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.registers,
    )  # fmt: skip
    return out
