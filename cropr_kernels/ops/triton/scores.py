"""cropr::scores on CUDA: one dot product per token, accumulated in float32.

For prune, the last program of an image also selects.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import fold_queries
from ..validation import check
from .launching import launch
from .select import (
    KeyBlocks,
    Selection,
    embedded_keys,
    is_last,
    launch_select,
    priority_bytes,
    select_image,
)
from .utils import STREAM, aligned_rows, block_counters, load_vector, row_blocks, rows_of


@triton.jit
def score_columns(x_ptr, query_ptr, cols, valid, dim, ACC: tl.constexpr):
    """Partial scores of the rows, of these columns."""
    value = tl.load(
        x_ptr + cols[None, :], mask=valid[:, None] & (cols < dim)[None, :], other=0.0
    ).to(ACC)
    return tl.sum(value * load_vector(query_ptr, cols, dim, 0.0, ACC)[None, :], axis=1)


@triton.jit(do_not_specialize=["n", "num_keep", "num_prefix"])
def scores_kernel(
    x, query_ptr, selection, n, num_keep, num_prefix, BLOCKS: tl.constexpr, KEYS: tl.constexpr
):
    ACC: tl.constexpr = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32
    tiles = tl.cdiv(n, BLOCKS.rows)
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    rows = (pid % tiles) * BLOCKS.rows + tl.arange(0, BLOCKS.rows)
    x_ptr = x.ptr + b * x.stride_b + rows.to(tl.int64)[:, None] * x.stride_n
    score = score_columns(x_ptr, query_ptr, tl.arange(0, BLOCKS.first), rows < n, x.dim, ACC)
    if BLOCKS.rest > 0:
        score += score_columns(
            x_ptr, query_ptr, BLOCKS.first + tl.arange(0, BLOCKS.rest), rows < n, x.dim, ACC
        )
    tl.store(selection.scores + b * n + rows, score.to(tl.float32), mask=rows < n)
    if selection.counters is not None:  # noqa: SIM102  (Triton would evaluate both sides of `and`)
        if is_last(selection.counters + b, tiles):
            select_image(
                selection.scores + b * n, selection, b, None, n, n, num_keep, num_prefix, KEYS
            )


def fold_query(query: Tensor) -> Tensor:
    """Return the folded query, contiguous and of any dtype, without a launch if it already is."""
    return fold_queries(query).contiguous() if query.ndim == 2 else query.contiguous()


def _launch(
    x: Tensor, query: Tensor, selection: Selection, num_prefix: int, keys: KeyBlocks | None
) -> None:
    # The order of a float32 sum depends on block shape and warps. So these are not autotuned, or
    # near-ties would flip with the tuner, and are the same with and without selection, or prune
    # would disagree with scores.
    blocks = row_blocks(x.shape[2], x.dtype)
    num_keep = 0 if selection.kept_idx is None else selection.kept_idx.shape[1]
    launch(
        scores_kernel, x.shape[0] * triton.cdiv(x.shape[1], blocks.rows),
        rows_of(x), fold_query(query), selection, x.shape[1], num_keep, num_prefix, blocks, keys,
        **STREAM,
    )  # fmt: skip


def launch_scores_select(x, query, num_keep, num_prefix, priority):
    """Return positions kept and pruned, in one launch, or in two for many tokens."""
    x = aligned_rows(x)
    batch, n, _ = x.shape
    kept_idx = x.new_empty((batch, num_keep), dtype=torch.int64)
    pruned_idx = x.new_empty((batch, n - num_keep), dtype=torch.int64)
    out = x.new_empty((batch, n), dtype=torch.float32)
    if out.numel():
        keys = embedded_keys(n)
        counters = None if keys is None else block_counters(x)
        selection = Selection(out, priority_bytes(priority), counters, kept_idx, pruned_idx, None)
        _launch(x, query, selection, num_prefix, keys)
        if keys is None:
            launch_select(selection, num_prefix)
    return kept_idx, pruned_idx


def scores(x: Tensor, query: Tensor) -> Tensor:
    """Launch cropr::scores; shapes as in the op's contract."""
    check("scores", x, query)
    x = aligned_rows(x)
    out = x.new_empty(x.shape[:2], dtype=torch.float32)
    if out.numel():
        _launch(x, query, Selection(out, None, None, None, None, None), 0, None)
    return out
