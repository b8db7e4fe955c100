"""What launchers and kernels share: rows of a tensor, block shapes.

A tensor travels with its strides, a selection with its outputs: NamedTuples are arguments of
    kernels. Numbers in them
are specialised, so they hold what a model keeps from layer to layer (strides, widths); counts of
tokens stand alone. Any of their members may be None, never the tuple: Triton 3.6 cannot compare one
that holds None, nor return it.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Launch options of kernels that stream full rows. Without a limit ptxas spills to fit more warps on
# a processor.
STREAM = {"num_warps": 4, "maxnreg": 96}

# Whether what reads rows a second time begins with the last image, whose rows are still in the L2
# cache, and what is read but once leaves it first. Off until a GPU says that it pays.
RECENT_FIRST = tl.constexpr(False)


def block_counters(x: Tensor) -> Tensor:
    """Zeros (B,), int32: how many programs of each image are done, so that the last one knows
    itself.

    New for every launch, under a graph's capture too: whatever outlived one could be shared by
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
    """dense_rows, copied where they could not be loaded 16 bytes at a time, as those of a
    contiguous tensor are.

    The layout of a tile, and so the order of its sums, follows from that; at other widths no row is
    loaded so.
    """
    x = dense_rows(x)
    if x.shape[-1] % 16 == 0 and (x.data_ptr() % 16 or any(stride % 16 for stride in x.stride()[:-1])):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def width_block(dim: int, limit: int) -> int:
    """Choose a power-of-two block for a row of `dim` elements.

    Widths are 2^k or 3 * 2^k: a block that divides them leaves no lane idle, where the next power
    of two would waste a quarter of them.
    """
    divisor = dim & -dim
    return min(divisor if divisor >= 128 else max(triton.next_power_of_2(dim), 16), limit)


class RowBlocks(NamedTuple):
    """Rows that a program holds, and the two powers of two that cover their width."""

    rows: int
    first: int
    rest: int


def split_width(dim: int) -> tuple[int, int]:
    """Two blocks that cover a row: the largest power of two in it, and the next power of two over
    the rest, or 0."""
    first = max(1 << (dim.bit_length() - 1), 16)
    rest = dim - first
    return first, max(triton.next_power_of_2(rest), 16) if rest > 0 else 0


def row_blocks(dim: int, dtype: torch.dtype) -> RowBlocks:
    """Rows a program of STREAM holds, and the two blocks of their width: 64 bytes of x a thread, or
    half of it where elements move one by one, each with an address of its own.

    Every tile has 16 bytes for each thread, so that this is what they move at a time. In none may
    several threads hold one element: those that load it late would find what another has stored,
    and add the update twice.
    """
    threads = 32 * STREAM["num_warps"]
    least = 16 // dtype.itemsize * threads
    first, rest = split_width(dim)
    rows = max(1, (32 if dim % 16 else 64) // dtype.itemsize * threads // (first + rest))
    rows = 1 << (rows.bit_length() - 1)
    return RowBlocks(rows, max(first, least // rows), rest and max(rest, least // rows))


@triton.jit
def image_of(pid, programs, AGAIN: tl.constexpr):
    """The image of a program, of which each has so many; AGAIN: its rows have just been read."""
    b = pid // programs
    if AGAIN and RECENT_FIRST:
        b = tl.num_programs(0) // programs - 1 - b
    return b.to(tl.int64)


@triton.jit
def load_vector(ptr, cols, dim, default: tl.constexpr, ACC: tl.constexpr):
    """These elements of a vector (dim,), or where there is none, the default."""
    value = tl.full(cols.shape, default, ACC)
    if ptr is not None:
        value = tl.load(ptr + cols, mask=cols < dim, other=0.0).to(ACC)
    return value
