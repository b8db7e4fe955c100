"""What launchers and kernels share: rows of a tensor, block shapes.

A tensor travels with its strides, a selection with its outputs: NamedTuples are arguments of kernels. Numbers in them
are specialised, so they hold what a model keeps from layer to layer (strides, widths); counts of tokens stand alone.
Any of their members may be None, never the tuple: Triton 3.6 cannot compare one that holds None, nor return it.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


def registers(num_warps: int) -> dict[str, int]:
    """Registers a thread may have, for kernels that ptxas would otherwise spill to fit more warps on a processor."""
    return {"maxnreg": 96 if num_warps <= 8 else 128}


def block_counters(x: Tensor) -> Tensor:
    """Zeros (B,), int32: how many programs of each image are done, so that the last one knows itself.

    New for every launch, under a graph's capture too: whatever outlived one could be shared by streams or replays.
    """
    return torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)


class Rows(NamedTuple):
    """Rows of a (B, N, D) tensor: its data, elements from image to image and from row to row, and D."""

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


def width_block(dim: int, limit: int) -> int:
    """Choose a power-of-two block for a row of `dim` elements.

    Widths are 2^k or 3 * 2^k: a block that divides them leaves no lane idle, where the next power of two
    would waste a quarter of them.
    """
    divisor = dim & -dim
    return min(divisor if divisor >= 64 else max(triton.next_power_of_2(dim), 16), limit)
