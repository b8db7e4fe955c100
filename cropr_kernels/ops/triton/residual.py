"""The residual buffer of the engine on CUDA: rows are read and written where they are, in one pass each.

A program holds a tile of whole rows in registers: it adds the update, stores the row, and takes the LayerNorm or the
score from what it just stored. The last program of an image to finish selects the tokens that are kept.

A width is split in two powers of two, 768 = 512 + 256, so that no lane idles at the widths Transformers have.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import accumulation_dtype
from ..validation import check
from .scores import fold_query
from .select import is_last, priority_bytes, select_blocks, select_image
from .utils import PINNED, block_counters, dense_rows, registers


@triton.jit
def load_vector(ptr, cols, dim, default: tl.constexpr, ACC: tl.constexpr):
    value = tl.full(cols.shape, default, ACC)
    if ptr is not None:
        value = tl.load(ptr + cols, mask=cols < dim, other=0.0).to(ACC)
    return value


@triton.jit
def locate_rows(idx_ptr, n, count, BLOCK_R: tl.constexpr):
    """This program's image, the active tokens it holds, which of them exist, and their rows of x and which are there.

    Returns b, index in (B * K), mask of the index, position in x, mask of the position.
    """
    tiles = tl.cdiv(count, BLOCK_R)
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    rows = (pid % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    flat, inside = b * count + rows, rows < count
    position, valid = rows.to(tl.int64), inside
    if idx_ptr is not None:
        position = tl.load(idx_ptr + flat, mask=inside, other=-1)
        valid = (position >= 0) & (position < n)
    return b, flat, inside, position, valid


@triton.jit
def load_rows(x_ptr, update_ptr, gamma_ptr, cols, valid, dim, ACC: tl.constexpr):
    """These columns of the rows, after the update if there is one, as they now stand in memory; zero outside."""
    mask = valid[:, None] & (cols < dim)[None, :]
    x = tl.load(x_ptr + cols[None, :], mask=mask, other=0.0)
    if update_ptr is not None:
        step = tl.load(update_ptr + cols[None, :], mask=mask, other=0.0).to(ACC)
        if gamma_ptr is not None:
            step = step * load_vector(gamma_ptr, cols, dim, 1.0, ACC)[None, :]
        x = (x.to(ACC) + step).to(x.dtype)
        tl.store(x_ptr + cols[None, :], x, mask=mask)
    return x.to(ACC)


@triton.jit
def store_norm(out_ptr, value, mean, scale, weight_ptr, bias_ptr, cols, inside, dim, ACC: tl.constexpr):
    weight = load_vector(weight_ptr, cols, dim, 1.0, ACC)
    bias = load_vector(bias_ptr, cols, dim, 0.0, ACC)
    out = (value - mean[:, None]) * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (cols < dim)[None, :])


@triton.jit
def squares(value, mean, cols, dim):
    """Sum of the squared distances to the mean, one per row."""
    distance = tl.where((cols < dim)[None, :], value - mean[:, None], 0.0)
    return tl.sum(distance * distance, axis=1)


@triton.jit(do_not_specialize=["n", "count"])
def add_norm_kernel(
    x_ptr, stride_xb, stride_xn, idx_ptr, update_ptr, gamma_ptr, weight_ptr, bias_ptr, eps, out_ptr, n, count, dim,
    BLOCK_R: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Rows idx of x (B, N, D) += gamma * update (B, K, D), if there is one; out (B, K, D), if asked for: LayerNorm."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    b, flat, inside, position, valid = locate_rows(idx_ptr, n, count, BLOCK_R)
    x_ptr += b * stride_xb + position[:, None] * stride_xn
    if update_ptr is not None:
        update_ptr += flat[:, None] * dim
    cols = tl.arange(0, BLOCK_A)
    value = load_rows(x_ptr, update_ptr, gamma_ptr, cols, valid, dim, ACC)
    if BLOCK_B > 0:
        more_cols = BLOCK_A + tl.arange(0, BLOCK_B)
        more = load_rows(x_ptr, update_ptr, gamma_ptr, more_cols, valid, dim, ACC)
    if out_ptr is not None:
        total = tl.sum(value, axis=1)
        if BLOCK_B > 0:
            total += tl.sum(more, axis=1)
        mean = total / dim
        spread = squares(value, mean, cols, dim)
        if BLOCK_B > 0:
            spread += squares(more, mean, more_cols, dim)
        scale = 1.0 / tl.sqrt(spread / dim + eps)
        out_ptr += flat[:, None] * dim
        store_norm(out_ptr, value, mean, scale, weight_ptr, bias_ptr, cols, inside, dim, ACC)
        if BLOCK_B > 0:
            store_norm(out_ptr, more, mean, scale, weight_ptr, bias_ptr, more_cols, inside, dim, ACC)


@triton.jit
def adjust_scores_by_size(scores_ptr, sizes_ptr, idx_ptr, count, num_prefix, size_weight, BLOCK_N: tl.constexpr):
    """scores += size_weight * their standard deviation over the patches * log(size), for one image, in place."""
    lanes = tl.arange(0, BLOCK_N)
    patches = tl.maximum(count - num_prefix, 1)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_N):
        offs = start + lanes
        sums += tl.load(scores_ptr + offs, (offs >= num_prefix) & (offs < count), other=0.0, cache_modifier=".cg")
    mean = tl.sum(sums, axis=0) / patches
    spread = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_N):
        offs = start + lanes
        inside = (offs >= num_prefix) & (offs < count)
        distance = tl.load(scores_ptr + offs, inside, other=0.0, cache_modifier=".cg") - mean
        spread += tl.where(inside, distance * distance, 0.0)
    scale = size_weight * tl.sqrt(tl.sum(spread, axis=0) / patches)
    scale = tl.where(tl.abs(scale) < float("inf"), scale, 0.0)  # scores with NaN or infinity have no spread
    for start in range(0, count, BLOCK_N):
        offs = start + lanes
        inside = offs < count
        position = offs.to(tl.int64)
        if idx_ptr is not None:
            position = tl.load(idx_ptr + offs, inside, other=0)
        score = tl.load(scores_ptr + offs, inside, other=0.0, cache_modifier=".cg")
        score += scale * tl.log(tl.load(sizes_ptr + position, inside, other=1.0))
        tl.store(scores_ptr + offs, score, inside)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["n", "count", "num_keep", "num_prefix"])
def add_select_kernel(
    x_ptr, idx_ptr, update_ptr, gamma_ptr, query_ptr, scores_ptr, counters_ptr, kept_idx_ptr, pruned_idx_ptr,
    sizes_ptr, size_weight, priority_ptr, n, count, num_keep, num_prefix, dim,
    BLOCK_R: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """Rows idx of x (B, N, D) += gamma * update (B, K, D); an image's last program selects which of them are kept."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    b, flat, inside, position, valid = locate_rows(idx_ptr, n, count, BLOCK_R)
    x_ptr += b * n * dim + position[:, None] * dim
    update_ptr += flat[:, None] * dim
    cols = tl.arange(0, BLOCK_A)
    value = load_rows(x_ptr, update_ptr, gamma_ptr, cols, valid, dim, ACC)
    score = tl.sum(value * load_vector(query_ptr, cols, dim, 0.0, ACC)[None, :], axis=1)
    if BLOCK_B > 0:
        cols = BLOCK_A + tl.arange(0, BLOCK_B)
        value = load_rows(x_ptr, update_ptr, gamma_ptr, cols, valid, dim, ACC)
        score += tl.sum(value * load_vector(query_ptr, cols, dim, 0.0, ACC)[None, :], axis=1)
    tl.store(scores_ptr + flat, score.to(tl.float32), mask=inside)
    if is_last(counters_ptr + b, tl.cdiv(count, BLOCK_R)):
        scores_ptr += b * count
        if idx_ptr is not None:
            idx_ptr += b * count
        if priority_ptr is not None:
            priority_ptr += b * n
        if sizes_ptr is not None:
            adjust_scores_by_size(scores_ptr, sizes_ptr + b * n, idx_ptr, count, num_prefix, size_weight, BLOCK_N)
        select_image(
            scores_ptr, kept_idx_ptr + b * num_keep, pruned_idx_ptr + b * (count - num_keep), count, num_keep,
            num_prefix, idx_ptr, priority_ptr, BLOCK_N, IN_REGISTERS,
        )  # fmt: skip


def split_width(dim: int) -> tuple[int, int]:
    """Two blocks that cover a row: the largest power of two in it, and the next power of two over the rest, or 0."""
    first = max(1 << (dim.bit_length() - 1), 16)
    rest = dim - first
    return first, max(triton.next_power_of_2(rest), 16) if rest > 0 else 0


def row_blocks(dim: int, num_warps: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows a program holds, 64 bytes of x a thread, and the two blocks of their width."""
    block_a, block_b = split_width(dim)
    rows = max(1, 2048 // dtype.itemsize * num_warps // (block_a + block_b))
    return {"BLOCK_R": 1 << (rows.bit_length() - 1), "BLOCK_A": block_a, "BLOCK_B": block_b}


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _launch_add_norm(x, idx, update, gamma, weight, bias, eps, out):
    batch, n, dim = x.shape
    count = n if idx is None else idx.shape[1]
    if not (batch and count and dim):
        return
    blocks, num_warps = row_blocks(dim, 4, x.dtype), 4
    with torch.cuda.device_of(x):
        add_norm_kernel[(batch * triton.cdiv(count, blocks["BLOCK_R"]),)](
            x, x.stride(0), x.stride(1), _dense(idx), _dense(update), _dense(gamma), _dense(weight), _dense(bias),
            eps, out, n, count, dim, **blocks, num_warps=num_warps,
            **registers(num_warps), **PINNED,
        )  # fmt: skip


def gather_norm(x: Tensor, idx: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Launch cropr::gather_norm. Positions outside [0, N) are not checked on the device; they read nothing."""
    dims = check("gather_norm", x, idx, weight, bias, eps)
    out = x.new_empty((dims["B"], dims["K"], dims["D"]))
    _launch_add_norm(dense_rows(x), idx, None, None, weight, bias, eps, out)
    return out


def add_(x: Tensor, idx: Tensor | None, update: Tensor, gamma: Tensor | None) -> None:
    """Launch cropr::add_. Positions outside [0, N) are not checked on the device; they write nothing."""
    check("add_", x, idx, update, gamma)
    _launch_add_norm(x, idx, update, gamma, None, None, 0.0, None)


def add_norm_(x, idx, update, gamma, weight, bias, eps):
    """Launch cropr::add_norm_; positions as in add_."""
    check("add_norm_", x, idx, update, gamma, weight, bias, eps)
    out = x.new_empty(update.shape)
    _launch_add_norm(x, idx, update, gamma, weight, bias, eps, out)
    return out


def add_select_(x, idx, update, gamma, query, num_keep, num_prefix=0, sizes=None, size_weight=0.0, priority=None):
    """Launch cropr::add_select_; positions as in add_."""
    check("add_select_", x, idx, update, gamma, query, num_keep, num_prefix, sizes, size_weight, priority)
    (batch, n, dim), count = x.shape, update.shape[1]
    kept_idx, pruned_idx = (x.new_empty((batch, k), dtype=torch.int64) for k in (num_keep, count - num_keep))
    if not (batch and count and dim):
        return kept_idx, pruned_idx
    selection, num_warps = select_blocks(count, embedded=True)
    num_warps = max(num_warps, 4)
    blocks = row_blocks(dim, num_warps, x.dtype)
    with torch.cuda.device_of(x):
        add_select_kernel[(batch * triton.cdiv(count, blocks["BLOCK_R"]),)](
            x, _dense(idx), update.contiguous(), _dense(gamma), fold_query(query, accumulation_dtype(x.dtype)),
            x.new_empty((batch, count), dtype=torch.float32), block_counters(x), kept_idx, pruned_idx,
            _dense(sizes) if size_weight else None, size_weight, priority_bytes(priority),
            n, count, num_keep, num_prefix, dim, **blocks, **selection,
            num_warps=num_warps, **registers(num_warps), **PINNED,
        )  # fmt: skip
    return kept_idx, pruned_idx


@triton.jit(do_not_specialize=["count", "num_prefix"])
def rotate_kernel(
    x_ptr, stride_xb, stride_xn, stride_xh, table_ptr, idx_ptr, count, num_prefix, heads, width,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One token a program. Pairs are (c, c + 1), or with HALF (c, c + width / 2)."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    patches = count - num_prefix
    pid = tl.program_id(0)
    b = (pid // patches).to(tl.int64)
    token = num_prefix + pid % patches
    position = token.to(tl.int64)
    if idx_ptr is not None:
        position = tl.load(idx_ptr + b * count + token)
    table_ptr += (position - num_prefix) * 2 * width
    head = tl.arange(0, BLOCK_H)
    x_ptr += b * stride_xb + token.to(tl.int64) * stride_xn + head[:, None] * stride_xh
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
        tl.store(x_ptr + low[None, :], (a.to(ACC) * cos_a - c.to(ACC) * sin_a).to(a.dtype), mask=mask)
        tl.store(x_ptr + low[None, :] + distance, (c.to(ACC) * cos_c + a.to(ACC) * sin_c).to(a.dtype), mask=mask)
    else:
        cols = tl.arange(0, BLOCK_W)
        mask = (head < heads)[:, None] & (cols < width)[None, :]
        x = tl.load(x_ptr + cols[None, :], mask=mask, other=0.0)
        sin = tl.load(table_ptr + cols, mask=cols < width, other=0.0).to(ACC)
        cos = tl.load(table_ptr + width + cols, mask=cols < width, other=0.0).to(ACC)
        a, c = tl.split(tl.reshape(x.to(ACC), (BLOCK_H, BLOCK_W // 2, 2)))
        sin_a, sin_c = tl.split(tl.reshape(sin, (BLOCK_W // 2, 2)))
        cos_a, cos_c = tl.split(tl.reshape(cos, (BLOCK_W // 2, 2)))
        turned = tl.join(a * cos_a[None, :] - c * sin_a[None, :], c * cos_c[None, :] + a * sin_c[None, :])
        tl.store(x_ptr + cols[None, :], tl.reshape(turned, (BLOCK_H, BLOCK_W)).to(x.dtype), mask=mask)


def rotate_(x: Tensor, table: Tensor, idx: Tensor | None, num_prefix: int = 0, half: bool = False) -> None:
    """Launch cropr::rotate_. Positions must lie inside the table: they are not checked on the device."""
    check("rotate_", x, table, idx, num_prefix, half)
    batch, count, heads, width = x.shape
    if not x.numel() or count == num_prefix:
        return
    with torch.cuda.device_of(x):
        rotate_kernel[(batch * (count - num_prefix),)](
            x, x.stride(0), x.stride(1), x.stride(2), table.contiguous(), _dense(idx),
            count, num_prefix, heads, width, HALF=half,
            BLOCK_H=triton.next_power_of_2(heads), BLOCK_W=max(triton.next_power_of_2(width), 2),
            num_warps=4, **PINNED,
        )  # fmt: skip
