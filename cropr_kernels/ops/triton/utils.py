"""What every launcher shares: block shapes and dense rows."""

import torch
import triton
from torch import Tensor

# Compiler options that decide the bits of a sum, so that they do not follow Triton's defaults.
PINNED = {"enable_fp_fusion": True}


def registers(num_warps: int) -> dict[str, int]:
    """Registers a thread may have, for kernels that ptxas would otherwise spill to fit more warps on a processor."""
    return {"maxnreg": 96 if num_warps <= 8 else 128}


def block_counters(x: Tensor) -> Tensor:
    """Zeros (B,), int32: how many programs of each image are done, so that the last one knows itself.

    New for every launch, under a graph's capture too: whatever outlived one could be shared by streams or replays.
    """
    return torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)


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
