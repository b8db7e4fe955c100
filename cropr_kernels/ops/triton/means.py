"""Rows of merged tokens: the second launch of merge and of ragged_merge_.

One program per pruned token: the first of those that share a target adds them all up, one after the
other, so no two programs write one row. The order of floating-point sums is fixed by the code, not
by the layout that the compiler picks.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import accumulation_dtype
from .launching import launch
from .nearest import BLOCK, sum_pairs, sum_rows
from .utils import rows_of

NUM_WARPS = 4
REGISTERS = 168  # per thread; without a limit ptxas spills to fit more warps on a processor
_UNROLL = tl.constexpr(4)  # pruned rows of a mean that are loaded at a time


class Assignment(NamedTuple):
    """Positions kept (B, K) and pruned (B, R), the kept row that each pruned token is merged into
    (B, R), new sizes (B, K), and the destination of every token (B, N).

    Ragged lists hold rows of x.view(B * N, D), image after image; starts (B + 1,), None if not
    ragged, is where the pruned ones of each image begin.
    """

    kept_idx: Any
    pruned_idx: Any
    row_idx: Any
    kept_sizes: Any
    dest_idx: Any
    starts: Any


@triton.jit
def assignment_of(assignment, b, n, num_keep, num_prune):
    """The assignment of image b."""
    return Assignment(
        assignment.kept_idx + b * num_keep,
        assignment.pruned_idx + b * num_prune,
        assignment.row_idx + b * num_prune,
        assignment.kept_sizes + b * num_keep,
        assignment.dest_idx + b * n,
        None,
    )


@triton.jit
def next_joining(row_idx_ptr, kept_row, start, num_prune, BLOCK: tl.constexpr):
    """Return the first pruned token from `start` on that is merged into kept row `kept_row`, or
    num_prune."""
    joining = num_prune
    first = num_prune * 0 + start
    while (first < num_prune) & (joining == num_prune):
        offs = first + tl.arange(0, BLOCK)
        joins = tl.load(row_idx_ptr + offs, mask=offs < num_prune, other=-1) == kept_row
        joining = tl.min(tl.where(joins, offs, num_prune), axis=0)
        first += BLOCK
    return joining


@triton.jit
def sum_of_squares(x):
    """Sum the squares of (N,), N >= 128, neighbors first: (1,)."""
    even, odd = tl.split(x.reshape(1, x.shape[0] // 2, 2))
    return sum_rows(sum_pairs(tl.fma(even, even, odd * odd), 2))


@triton.jit
def mean_of(
    x_ptr, stride, cols, inside, assignment, sizes_ptr, target, kept_row, pruned_row, num_prune,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return columns of the target and of the mean of all tokens merged into it, and the size of
    the mean."""
    target_row = tl.load(x_ptr + target * stride + cols, mask=inside, other=0.0).to(ACC)
    total = tl.load(sizes_ptr + target)
    sums = tl.fma(target_row, total.to(ACC), tl.zeros(cols.shape, ACC))
    start = pruned_row
    while start < num_prune:
        for i in tl.static_range(_UNROLL):  # in order of position
            r = start + i
            joins = tl.load(assignment.row_idx + r, mask=r < num_prune, other=-1) == kept_row
            origin = tl.load(assignment.pruned_idx + r, mask=joins, other=0)
            size = tl.load(sizes_ptr + origin, mask=joins, other=0.0)
            row = tl.load(x_ptr + origin * stride + cols, mask=joins & inside, other=0.0)
            sums = tl.fma(row.to(ACC), size.to(ACC), sums)
            total += size
        start = next_joining(assignment.row_idx, kept_row, start + _UNROLL, num_prune, BLOCK)
    return target_row, sums / total, total


@triton.jit(do_not_specialize=["n", "num_keep", "num_prune"])
def means_kernel(
    x, assignment, sizes_ptr, out_ptr, n, num_keep, num_prune,
    IN_PLACE: tl.constexpr, OFFSETS: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write one merged row per program; with OFFSETS, in place, pruned rows become their offsets
    from it.

    The norm takes a pass over all columns; with ONE_BLOCK the mean is then still in registers.
    """
    pid = tl.program_id(0)
    dim = x.dim
    ACC: tl.constexpr = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32
    if assignment.starts is not None:  # one image of all rows, whose pruned ones are near
        b = tl.maximum(tl.load(assignment.pruned_idx + pid), 0) // n
        pruned_start = tl.load(assignment.starts + b)
        num_prune = (tl.load(assignment.starts + b + 1) - pruned_start).to(tl.int32)
        pruned_row = pid - pruned_start.to(tl.int32)
        b *= 0
        assignment = Assignment(
            assignment.kept_idx,
            assignment.pruned_idx + pruned_start,
            assignment.row_idx + pruned_start,
            assignment.kept_sizes,
            assignment.dest_idx,
            None,
        )
    else:
        b = (pid // num_prune).to(tl.int64)
        pruned_row = pid % num_prune
        assignment = assignment_of(assignment, b, n, num_keep, num_prune)
    sizes_ptr += b * n
    kept_row = tl.load(assignment.row_idx + pruned_row)
    if (kept_row >= 0) & (
        next_joining(assignment.row_idx, kept_row, 0, num_prune, BLOCK) == pruned_row
    ):
        x_ptr = x.ptr + b * x.stride_b
        target = tl.load(assignment.kept_idx + kept_row)
        out_ptr += (b * n + target if IN_PLACE else b * num_keep + kept_row) * dim
        total = 0.0
        mean = tl.zeros([BLOCK_D], ACC)
        target_square = tl.zeros([1], ACC)
        square = tl.zeros([1], ACC)
        for first in range(0, dim, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)
            row, mean, total = mean_of(
                x_ptr,
                x.stride_n,
                cols,
                cols < dim,
                assignment,
                sizes_ptr,
                target,
                kept_row,
                pruned_row,
                num_prune,
                ACC,
                BLOCK,
            )
            target_square += sum_of_squares(row)
            square += sum_of_squares(mean)
        factor = tl.sqrt(target_square) / tl.sqrt(square)
        fits = (square > 0) & (square < float("inf")) & (factor < float("inf"))
        factor = tl.where(fits, factor, 1.0)
        for first in range(0, dim, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)
            inside = cols < dim
            if not ONE_BLOCK:
                _, mean, _ = mean_of(
                    x_ptr,
                    x.stride_n,
                    cols,
                    inside,
                    assignment,
                    sizes_ptr,
                    target,
                    kept_row,
                    pruned_row,
                    num_prune,
                    ACC,
                    BLOCK,
                )
            # In place, all threads must have read the row and the size before one stores them
            tl.debug_barrier()
            # Rounded here, so that offsets subtract the stored value.
            merged = tl.fma(mean, factor, tl.zeros([BLOCK_D], ACC)).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + cols, merged, mask=inside)
            if OFFSETS:
                start = pruned_row
                while start < num_prune:
                    pruned_row_ptr = (
                        x_ptr + tl.load(assignment.pruned_idx + start) * x.stride_n + cols
                    )
                    row = tl.load(pruned_row_ptr, mask=inside, other=0.0)
                    tl.debug_barrier()
                    tl.store(
                        pruned_row_ptr, (row.to(ACC) - merged.to(ACC)).to(row.dtype), mask=inside
                    )
                    start = next_joining(assignment.row_idx, kept_row, start + 1, num_prune, BLOCK)
        tl.store(assignment.kept_sizes + kept_row, total)
        if IN_PLACE:
            tl.store(sizes_ptr + target, total)


def launch_means(
    x: Tensor,
    n: int,
    assignment: Assignment,
    sizes: Tensor,
    out: Tensor,
    counts: tuple[int, int, int],
    *,
    in_place: bool,
    offsets: bool,
) -> None:
    """Merge the rows of x (B, N, D), or ragged of x.view(1, B * N, D), into `out`.

    Args:
        counts: programs, and kept and pruned tokens of an image.
    """
    programs, num_keep, num_prune = counts
    dim = x.shape[2]
    if not (programs and dim):
        return
    # Registers
    limit = 1024 if accumulation_dtype(x.dtype) == torch.float32 else 256
    block_d = min(max(triton.next_power_of_2(dim), 128), limit)
    launch(
        means_kernel, programs,
        rows_of(x), assignment, sizes, out, n, num_keep, num_prune, IN_PLACE=in_place,
        OFFSETS=offsets,
        ONE_BLOCK=dim <= block_d, BLOCK=BLOCK, BLOCK_D=block_d, num_warps=NUM_WARPS,
        maxnreg=REGISTERS,
    )  # fmt: skip
