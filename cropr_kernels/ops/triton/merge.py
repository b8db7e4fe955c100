"""cropr::merge and merge_ on CUDA: pruned tokens are merged into their most similar targets, in two
launches.

The first compares: a program compares a tile of targets with a tile of candidates. The last of
those that share candidates finds the nearest target of each; the last of an image chooses the
pruned candidates, and their targets. The second (`means`) writes the merged rows. The order of
floating-point sums is fixed by the code, not by the layout that the compiler picks: the bits are
the same on every run and for every alignment.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..reference import accumulation_dtype
from ..validation import check
from .launching import launch
from .means import NUM_WARPS, REGISTERS, Assignment, assignment_of, launch_means
from .nearest import load_positions, nearest_in_image, nearest_in_tile, target_blocks
from .prune import gather
from .select import Selection, is_last, select_image
from .utils import dense_rows, rows_of


class Tokens(NamedTuple):
    """Positions of the targets (B, T) and of the candidates (B, C), sizes of all tokens (B, N), and
    their cost scales (B, N) or None for 1."""

    target_idx: Any
    candidate_idx: Any
    sizes: Any
    cost_scale: Any


class Scratch(NamedTuple):
    """Best similarity of each candidate and the target it is with, by tile of targets (B, tiles,
    C); the cost of pruning each and its nearest target of all tiles (B, C); kept, then pruned
    candidates (B, C); and zeros (B, N + groups + 1): N become the kept rows by position, the others
    count finished programs of each group of candidates, then groups."""

    partial: Any
    partial_idx: Any
    cost: Any
    nearest_idx: Any
    order: Any
    zeros: Any


@triton.jit
def load_costs(best, tokens, candidates, num_candidates, n):
    """Return the cost of pruning candidates, max(1 - best, 0) * cost_scale; NaN becomes the
    highest."""
    cost = tl.maximum(1.0 - best, 0.0)
    if tokens.cost_scale is not None:
        origin, exists = load_positions(tokens.candidate_idx, candidates, num_candidates, n)
        cost *= tl.load(tokens.cost_scale + origin, mask=exists, other=1.0).to(best.dtype)
    return tl.where(cost == cost, cost, float("inf"))


@triton.jit
def choose_targets(
    tokens, scratch, assignment, n, num_targets, num_candidates, num_prune,
    IN_PLACE: tl.constexpr, BLOCKS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Choose the pruned candidates of one image and the kept rows they are merged into; lists
    ascend by position."""
    # Candidates of the highest cost are kept, of equals the lower position.
    num_stay = num_candidates - num_prune
    order = Selection(scratch.cost, None, None, scratch.order, scratch.order + num_stay, None)
    select_image(scratch.cost, order, 0, None, num_candidates, num_candidates, num_stay, 0, KEYS)
    # Mark every kept position with 1; the number of marks before it is its row.
    BLOCK: tl.constexpr = BLOCKS.positions
    lanes = tl.arange(0, BLOCK)
    for start in range(0, num_targets, BLOCK):
        position, exists = load_positions(tokens.target_idx, start + lanes, num_targets, n)
        tl.store(scratch.zeros + position, 1, mask=exists)
    tl.debug_barrier()
    for start in range(0, num_stay, BLOCK):
        offs = start + lanes
        chosen = tl.load(
            scratch.order + offs, mask=offs < num_stay, other=num_candidates, cache_modifier=".cg"
        )
        position, exists = load_positions(tokens.candidate_idx, chosen, num_candidates, n)
        tl.store(scratch.zeros + position, 1, mask=exists)
    tl.debug_barrier()
    kept_before = num_targets * 0
    for start in range(0, n, BLOCK):
        position = start + lanes
        kept = tl.load(scratch.zeros + position, mask=position < n, other=0, cache_modifier=".cg")
        kept_row = kept_before + tl.cumsum(kept, axis=0) - kept
        size = tl.load(tokens.sizes + position, mask=kept == 1, other=0.0)
        tl.store(assignment.kept_idx + kept_row, position.to(tl.int64), mask=kept == 1)
        tl.store(assignment.kept_sizes + kept_row, size, mask=kept == 1)
        tl.store(scratch.zeros + position, kept_row, mask=kept == 1)
        if not IN_PLACE:
            tl.store(assignment.dest_idx + position, kept_row.to(tl.int64), mask=kept == 1)
        kept_before += tl.sum(kept, axis=0)
    tl.debug_barrier()
    for start in range(0, num_prune, BLOCK):
        offs = start + lanes
        inside = offs < num_prune
        chosen = tl.load(
            scratch.order + num_stay + offs, mask=inside, other=num_candidates, cache_modifier=".cg"
        )
        position, exists = load_positions(tokens.candidate_idx, chosen, num_candidates, n)
        nearest = tl.load(
            scratch.nearest_idx + chosen, mask=inside, other=num_targets, cache_modifier=".cg"
        )
        target, has_target = load_positions(tokens.target_idx, nearest, num_targets, n)
        moves = exists & has_target
        kept_row = tl.load(scratch.zeros + target, mask=moves, other=-1, cache_modifier=".cg")
        tl.store(assignment.pruned_idx + offs, position, mask=exists)
        tl.store(assignment.row_idx + offs, kept_row, mask=inside)
        tl.store(
            assignment.dest_idx + position,
            target if IN_PLACE else kept_row.to(tl.int64),
            mask=moves,
        )


@triton.jit(do_not_specialize=["n", "num_targets", "num_candidates", "num_prune", "num_prefix"])
def targets_kernel(
    features, tokens, scratch, assignment, n, num_targets, num_candidates, num_prune, num_prefix,
    IN_PLACE: tl.constexpr, BLOCKS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    BLOCK_T: tl.constexpr = BLOCKS.targets
    BLOCK_C: tl.constexpr = BLOCKS.candidates
    tiles = tl.maximum(tl.cdiv(num_targets - num_prefix, BLOCK_T), 1)
    groups = tl.maximum(tl.cdiv(num_candidates, BLOCK_C), 1)
    pid = tl.program_id(0)
    b = (pid // (tiles * groups)).to(tl.int64)
    group = pid // tiles % groups
    tile = pid % tiles
    cost_scale = tokens.cost_scale
    if cost_scale is not None:
        cost_scale += b * n
    target_idx, candidate_idx = (
        tokens.target_idx + b * num_targets,
        tokens.candidate_idx + b * num_candidates,
    )
    tokens = Tokens(target_idx, candidate_idx, tokens.sizes + b * n, cost_scale)
    scratch = Scratch(
        scratch.partial + b * tiles * num_candidates,
        scratch.partial_idx + b * tiles * num_candidates,
        scratch.cost + b * num_candidates,
        scratch.nearest_idx + b * num_candidates,
        scratch.order + b * num_candidates,
        scratch.zeros + b * (n + groups + 1),
    )
    target_rows = num_prefix + tile * BLOCK_T + tl.arange(0, BLOCK_T)
    candidates = group * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = candidates < num_candidates
    best, nearest = nearest_in_tile(
        features, b, tokens, target_rows, candidates, num_targets, num_candidates, n, BLOCKS
    )
    partial_offs = tile.to(tl.int64) * num_candidates + candidates
    tl.store(scratch.partial + partial_offs, best, mask=inside)
    tl.store(scratch.partial_idx + partial_offs, nearest, mask=inside)
    counters = scratch.zeros + n
    if is_last(counters + group, tiles):
        best, nearest = nearest_in_image(
            scratch, candidates, tiles, num_candidates, num_prefix, BLOCKS
        )
        cost = load_costs(best, tokens, candidates, num_candidates, n)
        tl.store(scratch.cost + candidates, cost, mask=inside)
        tl.store(scratch.nearest_idx + candidates, nearest, mask=inside)
        if is_last(counters + groups, groups):
            assignment = assignment_of(
                assignment, b, n, num_targets + num_candidates - num_prune, num_prune
            )
            choose_targets(
                tokens,
                scratch,
                assignment,
                n,
                num_targets,
                num_candidates,
                num_prune,
                IN_PLACE,
                BLOCKS,
                KEYS,
            )


def _launch(
    x,
    target_idx,
    candidate_idx,
    sizes,
    cost_scale,
    dest,
    num_keep,
    num_prefix,
    *,
    in_place,
    offsets=False,
):
    batch, n, _ = x.shape
    num_targets, num_candidates = target_idx.shape[1], candidate_idx.shape[1]
    num_prune = num_targets + num_candidates - num_keep
    kept_idx, pruned_idx = (
        x.new_empty((batch, count), dtype=torch.int64) for count in (num_keep, num_prune)
    )
    kept_sizes = sizes.new_empty((batch, num_keep))
    if not batch:
        return gather(x, kept_idx), kept_idx, pruned_idx, kept_sizes
    cost_scale = None if cost_scale is None else cost_scale.contiguous()
    target_idx = target_idx.contiguous()
    candidate_idx = candidate_idx.contiguous()
    acc = accumulation_dtype(x.dtype)
    blocks, keys = target_blocks(x.dtype, num_candidates)
    tiles = max(triton.cdiv(num_targets - num_prefix, blocks.targets), 1)
    groups = max(triton.cdiv(num_candidates, blocks.candidates), 1)
    partial, cost = (x.new_empty((batch, count, num_candidates), dtype=acc) for count in (tiles, 1))
    partial_idx, nearest = (x.new_empty(part.shape, dtype=torch.int32) for part in (partial, cost))
    order = x.new_empty(candidate_idx.shape, dtype=torch.int64)
    zeros = x.new_zeros((batch, n + groups + 1), dtype=torch.int32)
    scratch = Scratch(partial, partial_idx, cost, nearest, order, zeros)
    assignment = Assignment(
        kept_idx,
        pruned_idx,
        x.new_empty((batch, num_prune), dtype=torch.int32),
        kept_sizes,
        dest,
        None,
    )
    launch(
        targets_kernel, batch * tiles * groups,
        rows_of(x), Tokens(target_idx, candidate_idx, sizes, cost_scale), scratch, assignment,
        n, num_targets, num_candidates, num_prune, num_prefix, IN_PLACE=in_place, BLOCKS=blocks,
        KEYS=keys,
        num_warps=NUM_WARPS, maxnreg=REGISTERS,
    )  # fmt: skip
    out = x if in_place else gather(x, kept_idx)
    counts = (batch * num_prune, num_keep, num_prune)
    launch_means(x, n, assignment, sizes, out, counts, in_place=in_place, offsets=offsets)
    return out, kept_idx, pruned_idx, kept_sizes


def merge(x, target_idx, candidate_idx, sizes, num_keep, num_prefix=0, cost_scale=None):
    """Launch cropr::merge. Positions must be a partition of [0, N): they are not checked on the
    device."""
    check("merge", x, target_idx, candidate_idx, sizes, num_keep, num_prefix, cost_scale)
    x = dense_rows(x)
    dest = x.new_empty(x.shape[:2], dtype=torch.int64)
    parts = (sizes.contiguous(), cost_scale, dest, num_keep, num_prefix)
    return *_launch(x, target_idx, candidate_idx, *parts, in_place=False), dest


def merge_(
    x,
    target_idx,
    candidate_idx,
    sizes,
    parent,
    num_keep,
    num_prefix=0,
    offsets=False,
    cost_scale=None,
):
    """Launch cropr::merge_. Positions must be distinct and in [0, N): they are not checked on the
    device."""
    check(
        "merge_",
        x,
        target_idx,
        candidate_idx,
        sizes,
        parent,
        num_keep,
        num_prefix,
        offsets,
        cost_scale,
    )
    parts = (sizes, cost_scale, parent, num_keep, num_prefix)
    parts = _launch(x, target_idx, candidate_idx, *parts, in_place=True, offsets=offsets)
    _, kept_idx, pruned_idx, kept_sizes = parts
    return kept_idx, pruned_idx, kept_sizes
