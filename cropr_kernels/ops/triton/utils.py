"""Rows of a tensor and block shapes, shared by launchers and kernels.

NamedTuples are kernel arguments: a tensor with its strides, a selection with its outputs. Triton
specializes on numbers in them, so they hold those that stay the same from layer to layer (strides,
widths); counts of tokens are separate arguments. Members may be None, but not a tuple itself:
Triton 3.6 can neither compare nor return a tuple that holds None.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Launch options of kernels that stream full rows. Without a limit ptxas spills to fit more warps on
# a processor.
STREAM = {"num_warps": 4, "maxnreg": 96}

# Start second reads of rows at the last image, whose rows are still in the L2 cache, and evict data
# that is read once first. Off until measured on a GPU.
RECENT_FIRST = tl.constexpr(False)


def block_counters(x: Tensor) -> Tensor:
    """Counters of finished programs of each image, zeros (B,) int32: the last program continues.

    Allocated for every launch, also under graph capture: a longer-lived buffer could be shared by
    streams or replays.
    """
    return torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)


class Rows(NamedTuple):
    """Rows of a (B, N, D) tensor: its data, elements from image to image and from row to row, and
    D."""

    ptr: Any
    stride_b: Any
    stride_n: Any
    dim: Any


def rows_of(x: Tensor) -> Rows:
    """The rows of x as an argument of a kernel; x has a stride of one in the last dimension."""
    return Rows(x, x.stride(0), x.stride(1), x.shape[2])


def dense_rows(x: Tensor) -> Tensor:
    """Return x with a stride of one in the last dimension; every other stride stays as it is."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def aligned_rows(x: Tensor) -> Tensor:
    """Return dense_rows, copied if they cannot be loaded 16 bytes at a time as contiguous ones are.

    The layout of a tile, and so the order of its sums, depends on it. Rows of a width that is no
    multiple of 16 are never loaded so.
    """
    x = dense_rows(x)
    if x.shape[-1] % 16 == 0 and (
        x.data_ptr() % 16 or any(stride % 16 for stride in x.stride()[:-1])
    ):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def width_block(dim: int, limit: int) -> int:
    """Choose a power-of-two block for a row of `dim` elements.

    Widths are 2^k or 3 * 2^k: a block that divides them leaves no lane idle; the next power of two
    would waste a quarter.
    """
    divisor = dim & -dim
    return min(divisor if divisor >= 128 else max(triton.next_power_of_2(dim), 16), limit)


class RowBlocks(NamedTuple):
    """Rows of a program, and the two powers of two that cover their width."""

    rows: int
    first: int
    rest: int


def split_width(dim: int) -> tuple[int, int]:
    """Cover a row by the largest power of two in it and the next power of two of the rest, or 0."""
    first = max(1 << (dim.bit_length() - 1), 16)
    rest = dim - first
    return first, max(triton.next_power_of_2(rest), 16) if rest > 0 else 0


def row_blocks(dim: int, dtype: torch.dtype) -> RowBlocks:
    """Choose the rows of a program of STREAM and the two blocks of their width: 64 bytes per
    thread.

    Half of that at widths where elements move one by one, each with its own address. Every tile has
    at least 16 bytes per thread, the size of one access. No two threads may hold the same element:
    the later one would load the stored value and add the update twice.
    """
    threads = 32 * STREAM["num_warps"]
    min_elements = 16 // dtype.itemsize * threads
    first, rest = split_width(dim)
    rows = max(1, (32 if dim % 16 else 64) // dtype.itemsize * threads // (first + rest))
    rows = 1 << (rows.bit_length() - 1)
    return RowBlocks(
        rows, max(first, min_elements // rows), rest and max(rest, min_elements // rows)
    )


@triton.jit
def image_of(pid, programs, AGAIN: tl.constexpr):
    """The image of a program, of `programs` per image; AGAIN: its rows have just been read."""
    b = pid // programs
    if AGAIN and RECENT_FIRST:
        b = tl.num_programs(0) // programs - 1 - b
    return b.to(tl.int64)


@triton.jit
def ragged_image(starts_ptr, b, num_candidates, num_prefix):
    """Where the rows of image b begin, their number, and how many of them are candidates."""
    start = tl.load(starts_ptr + b)
    count = (tl.load(starts_ptr + b + 1) - start).to(tl.int32)
    return start, count, tl.minimum(num_candidates, (count - num_prefix) // 2)


@triton.jit
def load_vector(ptr, cols, dim, default: tl.constexpr, ACC: tl.constexpr):
    """Load these elements of a vector (dim,), or the default if it is None."""
    value = tl.full(cols.shape, default, ACC)
    if ptr is not None:
        value = tl.load(ptr + cols, mask=cols < dim, other=0.0).to(ACC)
    return value
