"""The residual buffer of the engine on CUDA: rows are read and written in place, in one pass each.

A program holds a tile of full rows in registers: it adds the update, stores the rows, and computes
the norm or the scores of the stored values. The last program of an image selects the kept
tokens. A width is split into two powers of two, 768 = 512 + 256, so that no lane is idle.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..validation import check
from .launching import launch
from .scores import fold_query
from .select import (
    Selection,
    Weights,
    embedded_keys,
    is_last,
    launch_select,
    priority_bytes,
    select_ragged,
    weigh_and_select,
)
from .utils import (
    RECENT_FIRST,
    STREAM,
    Rows,
    aligned_rows,
    block_counters,
    image_of,
    load_vector,
    ragged_image,
    row_blocks,
    rows_of,
)


class Update(NamedTuple):
    """The update of the rows, (B, K, D) or None, and a factor (D,) on it, or None."""

    ptr: Any
    gamma: Any


class Norm(NamedTuple):
    """A LayerNorm or RMSNorm: weight and bias, (D,) or None, and eps."""

    weight: Any
    bias: Any
    eps: Any


@triton.jit
def locate_rows(idx_ptr, starts_ptr, n, count, BLOCK_R: tl.constexpr, AGAIN: tl.constexpr):
    """Locate the active tokens of this program, of at most `count` an image.

    Returns the image, indices in (B * K) or ragged in (T,) and their mask, positions in x and their
    mask.
    """
    tiles = tl.cdiv(count, BLOCK_R)
    pid = tl.program_id(0)
    b = image_of(pid, tiles, AGAIN)
    rows = (pid % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    flat = b * count + rows
    if starts_ptr is not None:
        start, count, _ = ragged_image(starts_ptr, b, 0, 0)
        flat = start + rows
    inside = rows < count
    position = rows.to(tl.int64)
    valid = inside
    if idx_ptr is not None:
        position = tl.load(idx_ptr + flat, mask=inside, other=-1)
        valid = (position >= 0) & (position < n)
    return b, flat, inside, position, valid


@triton.jit
def load_rows(x_ptr, update, flat, cols, valid, dim, ACC: tl.constexpr):
    """Load these columns of the rows, after adding and storing the update if given; zero
    outside."""
    mask = valid[:, None] & (cols < dim)[None, :]
    x = tl.load(x_ptr + cols[None, :], mask=mask, other=0.0)
    if update.ptr is not None:
        step_ptr = update.ptr + flat[:, None] * dim + cols[None, :]
        step = tl.load(
            step_ptr, mask=mask, other=0.0, eviction_policy="evict_first" if RECENT_FIRST else ""
        ).to(ACC)
        if update.gamma is not None:
            step = step * load_vector(update.gamma, cols, dim, 1.0, ACC)[None, :]
        x = (x.to(ACC) + step).to(x.dtype)
        tl.store(x_ptr + cols[None, :], x, mask=mask)
    return x.to(ACC)


@triton.jit
def store_norm(out_ptr, value, mean, scale, norm, cols, inside, dim, ACC: tl.constexpr):
    weight = load_vector(norm.weight, cols, dim, 1.0, ACC)
    bias = load_vector(norm.bias, cols, dim, 0.0, ACC)
    out = (value - mean[:, None]) * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(
        out_ptr + cols[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (cols < dim)[None, :],
    )


@triton.jit
def squares(value, mean, cols, dim):
    """Sum of the squared distances to the mean, one per row."""
    distance = tl.where((cols < dim)[None, :], value - mean[:, None], 0.0)
    return tl.sum(distance * distance, axis=1)


@triton.jit(do_not_specialize=["n", "count"])
def add_norm_kernel(
    x, idx_ptr, update, norm, out_ptr, n, count, BLOCKS: tl.constexpr, RMS: tl.constexpr
):
    """x[idx] += gamma * update (B, K, D), if given; out (B, K, D) = LayerNorm of x[idx], or with
    RMS its RMSNorm, if given."""
    ACC: tl.constexpr = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32
    dim = x.dim
    b, flat, inside, position, valid = locate_rows(
        idx_ptr, None, n, count, BLOCKS.rows, update.ptr is None
    )
    x_ptr = x.ptr + b * x.stride_b + position[:, None] * x.stride_n
    cols = tl.arange(0, BLOCKS.first)
    value = load_rows(x_ptr, update, flat, cols, valid, dim, ACC)
    if BLOCKS.rest > 0:
        rest_cols = BLOCKS.first + tl.arange(0, BLOCKS.rest)
        rest = load_rows(x_ptr, update, flat, rest_cols, valid, dim, ACC)
    if out_ptr is not None:
        mean = tl.zeros((BLOCKS.rows,), ACC)
        if not RMS:
            total = tl.sum(value, axis=1)
            if BLOCKS.rest > 0:
                total += tl.sum(rest, axis=1)
            mean = total / dim
        spread = squares(value, mean, cols, dim)
        if BLOCKS.rest > 0:
            spread += squares(rest, mean, rest_cols, dim)
        scale = 1.0 / tl.sqrt(spread / dim + norm.eps)
        out_ptr += flat[:, None] * dim
        store_norm(out_ptr, value, mean, scale, norm, cols, inside, dim, ACC)
        if BLOCKS.rest > 0:
            store_norm(out_ptr, rest, mean, scale, norm, rest_cols, inside, dim, ACC)


@triton.jit(do_not_specialize=["n", "count", "num_keep", "num_prefix"])
def add_select_kernel(
    x, idx_ptr, update, query_ptr, selection, weights, n, count, num_keep, num_prefix,
    BLOCKS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """x[idx] += gamma * update (B, K, D), then scores (B, K); the last program of an image may
    select.

    If ragged, idx are rows of x.view(1, n, D), at most `count` an image, and num_keep is the number
    of candidates.
    """
    ACC: tl.constexpr = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32
    dim = x.dim
    b, flat, inside, position, valid = locate_rows(
        idx_ptr, selection.starts, n, count, BLOCKS.rows, False
    )
    x_ptr = x.ptr + b * x.stride_b + position[:, None] * x.stride_n
    cols = tl.arange(0, BLOCKS.first)
    value = load_rows(x_ptr, update, flat, cols, valid, dim, ACC)
    score = tl.sum(value * load_vector(query_ptr, cols, dim, 0.0, ACC)[None, :], axis=1)
    if BLOCKS.rest > 0:
        cols = BLOCKS.first + tl.arange(0, BLOCKS.rest)
        value = load_rows(x_ptr, update, flat, cols, valid, dim, ACC)
        score += tl.sum(value * load_vector(query_ptr, cols, dim, 0.0, ACC)[None, :], axis=1)
    tl.store(selection.scores + flat, score.to(tl.float32), mask=inside)
    if selection.starts is not None:
        if selection.counters is not None:
            _, active, _ = ragged_image(selection.starts, b, 0, 0)
            tile = tl.program_id(0) % tl.cdiv(count, BLOCKS.rows)
            tiles = tl.cdiv(active, BLOCKS.rows)
            if tile < tiles:  # noqa: SIM102
                if is_last(selection.counters + b, tiles):
                    select_ragged(selection, weights, b, idx_ptr, n, num_keep, num_prefix, KEYS)
    elif selection.counters is not None:  # noqa: SIM102  (Triton evaluates both sides of `and`)
        if is_last(selection.counters + b, tl.cdiv(count, BLOCKS.rows)):
            scores_ptr = selection.scores + b * count
            weigh_and_select(
                scores_ptr, weights, selection, b, idx_ptr, n, count, num_keep, num_prefix, KEYS
            )


def dense(vector: Tensor | None) -> Tensor | None:
    """An optional tensor, contiguous."""
    return None if vector is None else vector.contiguous()


def _launch_add_norm(x, idx, update, norm, out, rms=False):
    batch, n, dim = x.shape
    count = n if idx is None else idx.shape[1]
    if not (batch and count and dim):
        return
    blocks = row_blocks(dim, x.dtype)
    launch(
        add_norm_kernel, batch * triton.cdiv(count, blocks.rows),
        rows_of(x), dense(idx), update, norm, out, n, count, blocks, rms, **STREAM,
    )  # fmt: skip


def gather_norm(
    x: Tensor,
    idx: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool = False,
) -> Tensor:
    """Launch cropr::gather_norm. Positions outside [0, N) are not checked on the device; they read
    nothing."""
    dims = check("gather_norm", x, idx, weight, bias, eps, rms)
    out = x.new_empty((dims["B"], dims["K"], dims["D"]))
    _launch_add_norm(
        aligned_rows(x),
        idx,
        Update(None, None),
        Norm(dense(weight), dense(bias), eps),
        out,
        rms,
    )
    return out


def add_(x: Tensor, idx: Tensor | None, update: Tensor, gamma: Tensor | None) -> None:
    """Launch cropr::add_. Positions outside [0, N) are not checked on the device; they write
    nothing."""
    check("add_", x, idx, update, gamma)
    _launch_add_norm(x, idx, Update(dense(update), dense(gamma)), Norm(None, None, 0.0), None)


def add_norm_(x, idx, update, gamma, weight, bias, eps, rms=False):
    """Launch cropr::add_norm_; positions as in add_."""
    check("add_norm_", x, idx, update, gamma, weight, bias, eps, rms)
    out = x.new_empty(update.shape)
    parts = (
        Update(aligned_rows(update.contiguous()), dense(gamma)),
        Norm(dense(weight), dense(bias), eps),
    )
    _launch_add_norm(x, idx, *parts, out, rms)
    return out


def add_select_(
    x, idx, update, gamma, query, num_keep, num_prefix=0, sizes=None, size_weight=0.0,
    priority=None, cost_scale=None,
    cost_weight=0.0,
):  # fmt: skip
    """Launch cropr::add_select_; positions as in add_."""
    parts = (sizes, size_weight, priority, cost_scale, cost_weight)
    check("add_select_", x, idx, update, gamma, query, num_keep, num_prefix, *parts)
    batch, n, dim = x.shape
    count = update.shape[1]
    kept_idx, pruned_idx = (
        x.new_empty((batch, k), dtype=torch.int64) for k in (num_keep, count - num_keep)
    )
    if not (batch and count and dim):
        return kept_idx, pruned_idx
    blocks = row_blocks(dim, x.dtype)
    keys = embedded_keys(count)
    scores = x.new_empty((batch, count), dtype=torch.float32)
    counters = None if keys is None else block_counters(x)
    selection = Selection(scores, priority_bytes(priority), counters, kept_idx, pruned_idx, None)
    sizes = dense(sizes) if size_weight else None
    idx = dense(idx)
    weights = Weights(sizes, float(size_weight), cost_scale, float(cost_weight))
    launch(
        add_select_kernel, batch * triton.cdiv(count, blocks.rows),
        rows_of(x), idx, Update(aligned_rows(update.contiguous()), dense(gamma)),
        fold_query(query), selection,
        weights, n, count, num_keep, num_prefix, blocks, keys, **STREAM,
    )  # fmt: skip
    if keys is None:
        launch_select(selection, num_prefix, weights=weights, idx=idx, num_tokens=n)
    return kept_idx, pruned_idx


@triton.jit(do_not_specialize=["count", "num_prefix"])
def rotate_kernel(
    x, stride_xh, table_ptr, idx_ptr, count, num_prefix, heads,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Rotate one token per program. Pairs are (c, c + 1), or with HALF (c, c + width / 2)."""
    width = x.dim
    ACC: tl.constexpr = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32
    patches = count - num_prefix
    pid = tl.program_id(0)
    b = (pid // patches).to(tl.int64)
    token = num_prefix + pid % patches
    position = token.to(tl.int64)
    if idx_ptr is not None:
        position = tl.load(idx_ptr + b * count + token)
    table_ptr += (position - num_prefix) * 2 * width
    head = tl.arange(0, BLOCK_H)
    x_ptr = x.ptr + b * x.stride_b + token.to(tl.int64) * x.stride_n + head[:, None] * stride_xh
    if HALF:
        low = tl.arange(0, BLOCK_W // 2)
        distance = width // 2
        inside = low < distance
        mask = (head < heads)[:, None] & inside[None, :]
        a = tl.load(x_ptr + low[None, :], mask=mask, other=0.0)
        c = tl.load(x_ptr + low[None, :] + distance, mask=mask, other=0.0)
        sin_a = tl.load(table_ptr + low, mask=inside, other=0.0).to(ACC)[None, :]
        sin_c = tl.load(table_ptr + low + distance, mask=inside, other=0.0).to(ACC)[None, :]
        cos_a = tl.load(table_ptr + width + low, mask=inside, other=0.0).to(ACC)[None, :]
        cos_c = tl.load(table_ptr + width + low + distance, mask=inside, other=0.0).to(ACC)[None, :]
        tl.store(
            x_ptr + low[None, :], (a.to(ACC) * cos_a - c.to(ACC) * sin_a).to(a.dtype), mask=mask
        )
        tl.store(
            x_ptr + low[None, :] + distance,
            (c.to(ACC) * cos_c + a.to(ACC) * sin_c).to(a.dtype),
            mask=mask,
        )
    else:
        cols = tl.arange(0, BLOCK_W)
        mask = (head < heads)[:, None] & (cols < width)[None, :]
        pairs = tl.load(x_ptr + cols[None, :], mask=mask, other=0.0)
        sin = tl.load(table_ptr + cols, mask=cols < width, other=0.0).to(ACC)
        cos = tl.load(table_ptr + width + cols, mask=cols < width, other=0.0).to(ACC)
        a, c = tl.split(tl.reshape(pairs.to(ACC), (BLOCK_H, BLOCK_W // 2, 2)))
        sin_a, sin_c = tl.split(tl.reshape(sin, (BLOCK_W // 2, 2)))
        cos_a, cos_c = tl.split(tl.reshape(cos, (BLOCK_W // 2, 2)))
        rotated = tl.join(
            a * cos_a[None, :] - c * sin_a[None, :], c * cos_c[None, :] + a * sin_c[None, :]
        )
        tl.store(
            x_ptr + cols[None, :],
            tl.reshape(rotated, (BLOCK_H, BLOCK_W)).to(pairs.dtype),
            mask=mask,
        )


def rotate_(
    x: Tensor, table: Tensor, idx: Tensor | None, num_prefix: int = 0, half: bool = False
) -> None:
    """Launch cropr::rotate_. Positions must lie inside the table: they are not checked on the
    device."""
    check("rotate_", x, table, idx, num_prefix, half)
    batch, count, heads, width = x.shape
    if not x.numel() or count == num_prefix:
        return
    block_h, block_w = triton.next_power_of_2(heads), max(triton.next_power_of_2(width), 2)
    launch(
        rotate_kernel, batch * (count - num_prefix),
        Rows(x, x.stride(0), x.stride(1), width), x.stride(2), table.contiguous(), dense(idx),
        count, num_prefix, heads, HALF=half, BLOCK_H=block_h, BLOCK_W=block_w,
        num_warps=min(max(block_h * block_w // 64, 1), 4),  # at most one thread per pair
    )  # fmt: skip
