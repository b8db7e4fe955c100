"""cropr::select on CUDA: exact top-k of each image in one launch, both index lists ascending.

One program per image: that of select_kernel, or up to _MAX_EMBEDDED tokens the last that wrote its
scores (`is_last`). Scores become integers of the same order; the threshold, the K-th largest key,
is found two bits at a time by counting; equal keys are ordered by position. Every step is an
integer operation, so the result is the same on every run. Up to _MAX_BLOCK tokens stay in
registers; above, they are re-read in chunks.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..validation import check
from .launching import launch
from .utils import dense_rows, ragged_image

_MAX_BLOCK = 4096
_MAX_EMBEDDED = 1024
_MOST_EXPONENT = tl.constexpr(60.0)  # so that cost scales are finite and positive
_COUNT_BITS = tl.constexpr(21)  # three counts travel through one 64-bit sum
_COUNT_MASK = tl.constexpr((1 << 21) - 1)


class Selection(NamedTuple):
    """Scores (B, N) and the outputs of a selection. May be None: priority; counters (B,) of
    finished programs, if one program selects alone; positions, if only scores are computed;
    pruned_idx, to write pruned positions of an image behind its kept ones; starts (B + 1,), if not
    ragged. Ragged scores are (T,), and kept_idx (T,) is the order of rows."""

    scores: Any
    priority: Any
    counters: Any
    kept_idx: Any
    pruned_idx: Any
    starts: Any


class Weights(NamedTuple):
    """Sizes (B, N), or None to leave scores as they are, and their weight; cost scales (B, N) to be
    written, or None, and the weight of scores in them."""

    sizes: Any
    size_weight: Any
    cost_scale: Any
    cost_weight: Any


class KeyBlocks(NamedTuple):
    """Number of keys that a program holds at a time, and whether these are all of an image."""

    tokens: int
    in_registers: bool


@triton.jit
def load_priority(priority_ptr, from_idx_ptr, offs, n):
    """Load priorities of tokens, zero past n; by their positions from_idx, if given."""
    positions = offs.to(tl.int64)
    if from_idx_ptr is not None:
        positions = tl.load(from_idx_ptr + offs, mask=offs < n, other=0)
    return tl.load(priority_ptr + positions, mask=offs < n, other=0)


@triton.jit
def is_crowded(priority_ptr, from_idx_ptr, n, num_keep, num_prefix, BLOCK_N: tl.constexpr):
    """Return true if more tokens have priority than are kept: then only they are, by score."""
    crowded = n < 0
    if priority_ptr is not None:
        num_preferred = tl.zeros([BLOCK_N], tl.int32)
        for start in range(0, n, BLOCK_N):
            offs = start + tl.arange(0, BLOCK_N)
            priority = load_priority(priority_ptr, from_idx_ptr, offs, n)
            num_preferred += ((priority > 0) & (offs >= num_prefix)).to(tl.int32)
        crowded = tl.sum(num_preferred, axis=0) > num_keep - num_prefix
    return crowded


@triton.jit
def load_keys(scores_ptr, priority_ptr, from_idx_ptr, offs, n, num_prefix, crowded):
    """Load monotone keys: prefix and priority are the maximum, NaN the next lower, zero past n."""
    value = tl.load(
        scores_ptr + offs, mask=offs < n, other=0.0, cache_modifier=".cg"
    )  # past L1: other programs wrote them
    if scores_ptr.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
        value = tl.where(value == 0.0, 0.0, value)
        bits = value.to(tl.uint32, bitcast=True)
        sign: tl.constexpr = 0x80000000
        all_ones: tl.constexpr = 0xFFFFFFFF
    else:
        value = tl.where(value == 0.0, 0.0, value)
        bits = value.to(tl.uint64, bitcast=True)
        sign: tl.constexpr = 0x8000000000000000
        all_ones: tl.constexpr = 0xFFFFFFFFFFFFFFFF
    keys = tl.where((bits & sign) != 0, bits ^ all_ones, bits ^ sign)
    highest = tl.full(keys.shape, all_ones, keys.dtype)
    lowest = tl.zeros_like(keys)
    keys = tl.where(value != value, highest - 1, keys)
    if priority_ptr is not None:
        priority = load_priority(priority_ptr, from_idx_ptr, offs, n)
        keys = tl.where((priority > 0) & (crowded == 0), highest, keys)
        keys = tl.where((priority < 0) | ((priority <= 0) & crowded), lowest, keys)
    keys = tl.where(offs < num_prefix, highest, keys)
    return tl.where(offs < n, keys, lowest)


@triton.jit
def count_three(keys, threshold, shift):
    """Flag per key each of the three candidates above `threshold` that it reaches, in one int64."""
    unit = threshold * 0 + 1
    first = (keys >= (threshold | (unit << shift))).to(tl.int64)
    second = (keys >= (threshold | ((unit + 1) << shift))).to(tl.int64)
    third = (keys >= (threshold | ((unit + 2) << shift))).to(tl.int64)
    return first + (second << _COUNT_BITS) + (third << (2 * _COUNT_BITS))


@triton.jit
def select_image(
    scores_ptr, selection, b, from_idx_ptr, num_tokens, n, num_keep, num_prefix, KEYS: tl.constexpr
):
    """Split the n positions of image b, or with from_idx n positions of its `num_tokens` tokens."""
    BLOCK_N: tl.constexpr = KEYS.tokens
    IN_REGISTERS: tl.constexpr = KEYS.in_registers
    kept_idx_ptr = selection.kept_idx + b * num_keep
    pruned_idx_ptr = selection.pruned_idx
    if pruned_idx_ptr is not None:
        pruned_idx_ptr += b * (n - num_keep)
    priority_ptr = selection.priority
    if priority_ptr is not None:
        priority_ptr += b * num_tokens
    lanes = tl.arange(0, BLOCK_N)
    crowded = is_crowded(priority_ptr, from_idx_ptr, n, num_keep, num_prefix, BLOCK_N)
    keys = load_keys(scores_ptr, priority_ptr, from_idx_ptr, lanes, n, num_prefix, crowded)

    # The largest threshold that at least num_keep keys reach.
    threshold = tl.min(keys, axis=0) * 0
    BITS: tl.constexpr = 64 if scores_ptr.dtype.element_ty == tl.float64 else 32
    shift = threshold + BITS
    for _ in range(BITS // 2):
        shift -= 2
        counts = count_three(keys, threshold, shift)
        if not IN_REGISTERS:
            for start in range(BLOCK_N, n, BLOCK_N):
                chunk = load_keys(
                    scores_ptr, priority_ptr, from_idx_ptr, start + lanes, n, num_prefix, crowded
                )
                counts += count_three(chunk, threshold, shift)
        packed = tl.sum(counts, axis=0)
        digit = (
            ((packed & _COUNT_MASK) >= num_keep).to(tl.int32)
            + (((packed >> _COUNT_BITS) & _COUNT_MASK) >= num_keep).to(tl.int32)
            + (((packed >> (2 * _COUNT_BITS)) & _COUNT_MASK) >= num_keep).to(tl.int32)
        )
        threshold = threshold | (digit.to(threshold.dtype) << shift)

    above = (keys > threshold).to(tl.int32)
    if not IN_REGISTERS:
        for start in range(BLOCK_N, n, BLOCK_N):
            chunk = load_keys(
                scores_ptr, priority_ptr, from_idx_ptr, start + lanes, n, num_prefix, crowded
            )
            above += (chunk > threshold).to(tl.int32)
    ties_left = num_keep - tl.sum(above, axis=0)

    kept_before = tl.zeros_like(ties_left)
    for start in range(0, n, BLOCK_N):
        offs = start + lanes
        if not IN_REGISTERS:
            keys = load_keys(scores_ptr, priority_ptr, from_idx_ptr, offs, n, num_prefix, crowded)
        tied = (keys == threshold).to(tl.int32)
        keep = (keys > threshold) | ((tied == 1) & (tl.cumsum(tied, axis=0) <= ties_left))
        keep = keep & (offs < n)
        # Kept tokens up to and with this one
        rank = kept_before + tl.cumsum(keep.to(tl.int32), axis=0)
        positions = offs.to(tl.int64)
        if from_idx_ptr is not None:
            positions = tl.load(from_idx_ptr + offs, mask=offs < n, other=0)
        if pruned_idx_ptr is None:
            order = tl.where(keep, rank - 1, num_keep + offs - rank)
            tl.store(kept_idx_ptr + order, positions, mask=offs < n)
        else:
            tl.store(kept_idx_ptr + rank - 1, positions, mask=keep)
            tl.store(pruned_idx_ptr + offs - rank, positions, mask=(offs < n) & (keep == 0))
        kept_before += tl.sum(keep.to(tl.int32), axis=0)
        ties_left -= tl.sum(tied, axis=0)


@triton.jit
def weigh_scores(
    scores_ptr, weights, b, idx_ptr, num_tokens, count, num_prefix, BLOCK_N: tl.constexpr
):
    """Weigh the scores of image b in place, and write cost scales of patches, 1 without a spread.

    scores += size_weight * standard deviation over the patches * log(size)
    cost_scale = exp(cost_weight * (new score - mean) / standard deviation)
    """
    lanes = tl.arange(0, BLOCK_N)
    patches = tl.maximum(count - num_prefix, 1)
    # Distances to a score, so that equal scores have no spread.
    first = tl.load(scores_ptr + num_prefix, num_prefix < count, other=0.0, cache_modifier=".cg")
    sums = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_N):
        offs = start + lanes
        inside = (offs >= num_prefix) & (offs < count)
        distance = tl.load(scores_ptr + offs, inside, other=0.0, cache_modifier=".cg") - first
        sums += tl.where(inside, distance, 0.0)
    mean = first + tl.sum(sums, axis=0) / patches
    spread = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_N):
        offs = start + lanes
        inside = (offs >= num_prefix) & (offs < count)
        distance = tl.load(scores_ptr + offs, inside, other=0.0, cache_modifier=".cg") - mean
        spread += tl.where(inside, distance * distance, 0.0)
    deviation = tl.sqrt(tl.sum(spread, axis=0) / patches)
    scale = weights.size_weight * deviation
    # Scores with NaN or infinity have no spread
    scale = tl.where(tl.abs(scale) < float("inf"), scale, 0.0)
    has_spread = (deviation > 0.0) & (deviation < float("inf"))
    for start in range(0, count, BLOCK_N):
        offs = start + lanes
        inside = offs < count
        position = offs.to(tl.int64)
        if idx_ptr is not None:
            position = tl.load(idx_ptr + offs, inside, other=0)
        exists = inside & (position >= 0) & (position < num_tokens)
        score = tl.load(scores_ptr + offs, inside, other=0.0, cache_modifier=".cg")
        if weights.sizes is not None:
            # Threads that share an element must all load it before one stores it
            tl.debug_barrier()
            score += scale * tl.log(
                tl.load(weights.sizes + b * num_tokens + position, exists, other=1.0)
            )
            tl.store(scores_ptr + offs, score, inside)
        if weights.cost_scale is not None:
            exponent = weights.cost_weight * ((score - mean) / deviation)
            exponent = tl.minimum(tl.maximum(exponent, -_MOST_EXPONENT), _MOST_EXPONENT)
            cost = tl.exp(tl.where(has_spread, exponent, 0.0))
            tl.store(
                weights.cost_scale + b * num_tokens + position, cost, exists & (offs >= num_prefix)
            )
    tl.debug_barrier()


@triton.jit
def weigh_and_select(
    scores_ptr,
    weights,
    selection,
    b,
    idx_ptr,
    num_tokens,
    n,
    num_keep,
    num_prefix,
    KEYS: tl.constexpr,
):
    """Weigh scores if asked for, then select_image; tokens are at idx (B, n), if given."""
    if idx_ptr is not None:
        idx_ptr += b * n
    if (weights.sizes is not None) or (weights.cost_scale is not None):
        weigh_scores(scores_ptr, weights, b, idx_ptr, num_tokens, n, num_prefix, KEYS.tokens)
    select_image(scores_ptr, selection, b, idx_ptr, num_tokens, n, num_keep, num_prefix, KEYS)


@triton.jit
def select_ragged(
    selection, weights, b, rows_ptr, num_rows, num_candidates, num_prefix, KEYS: tl.constexpr
):
    """weigh_and_select of image b, as part of one image of all `num_rows` rows."""
    start, count, present = ragged_image(selection.starts, b, num_candidates, num_prefix)
    num_keep = count - present
    image = Selection(
        selection.scores, selection.priority, None, selection.kept_idx + start, None, None
    )
    weigh_and_select(
        selection.scores + start,
        weights,
        image,
        0,
        rows_ptr + start,
        num_rows,
        count,
        num_keep,
        num_prefix,
        KEYS,
    )


@triton.jit
def is_last(counter_ptr, programs):
    """Return true in the last of the programs of an image, where the stores of all are visible.

    The barrier orders the stores of this program before its count; the count (release, acquire)
    orders programs.
    """
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1


@triton.jit(do_not_specialize=["stride_sb", "num_tokens", "n", "num_keep", "num_prefix"])
def select_kernel(
    selection, stride_sb, weights, idx_ptr, num_tokens, n, num_keep, num_prefix, KEYS: tl.constexpr
):
    """Select from one image per program; if ragged, num_keep is the number of candidates."""
    b = tl.program_id(0).to(tl.int64)
    if selection.starts is not None:
        select_ragged(selection, weights, b, idx_ptr, num_tokens, num_keep, num_prefix, KEYS)
    else:
        scores_ptr = selection.scores + b * stride_sb
        weigh_and_select(
            scores_ptr, weights, selection, b, idx_ptr, num_tokens, n, num_keep, num_prefix, KEYS
        )


def key_blocks(n: int) -> tuple[KeyBlocks, int]:
    """Blocks of select_kernel for n tokens, and the number of warps that hold the keys without
    spilling."""
    if n > _COUNT_MASK.value:
        raise RuntimeError(f"select: N must be at most {_COUNT_MASK.value} on CUDA, got {n}")
    block = min(max(triton.next_power_of_2(n), 32), _MAX_BLOCK)
    return KeyBlocks(block, n <= block), min(max(block // 128, 1), 16)


def embedded_keys(n: int) -> KeyBlocks | None:
    """Blocks of select_image in a kernel of STREAM; None if it would spill: select_kernel
    follows."""
    blocks, _ = key_blocks(n)
    return blocks if n <= _MAX_EMBEDDED else None


def priority_bytes(priority: Tensor | None) -> Tensor | None:
    """Priorities as contiguous int8."""
    if priority is None:
        return None
    priority = priority.contiguous()
    return priority.view(torch.int8) if priority.dtype == torch.bool else priority


def select(
    scores: Tensor, num_keep: int, num_prefix: int = 0, priority: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launch cropr::select; shapes as in the op's contract."""
    check("select", scores, num_keep, num_prefix, priority)
    scores = dense_rows(scores)
    batch, n = scores.shape
    kept_idx = scores.new_empty((batch, num_keep), dtype=torch.int64)
    pruned_idx = scores.new_empty((batch, n - num_keep), dtype=torch.int64)
    if batch and n:
        launch_select(
            Selection(scores, priority_bytes(priority), None, kept_idx, pruned_idx, None),
            num_prefix,
        )
    return kept_idx, pruned_idx


def launch_select(
    selection: Selection,
    num_prefix: int,
    *,
    weights: Weights | None = None,
    idx: Tensor | None = None,
    num_tokens: int = 0,
) -> None:
    """Select by scores (B, N) of all tokens, or of those at idx (B, N) among `num_tokens`."""
    scores = selection.scores
    batch, n = scores.shape
    blocks, num_warps = key_blocks(n)
    launch(
        select_kernel, batch,
        selection, scores.stride(0), weights or Weights(None, 0.0, None, 0.0), idx,
        num_tokens or n, n,
        selection.kept_idx.shape[1], num_prefix, blocks, num_warps=num_warps,
    )  # fmt: skip
