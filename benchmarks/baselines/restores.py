"""Ways to restore pruned tokens before the last blocks, for networks that were not trained for it.

The blocks before the fusion run once for all of them: `run_trunk` records the departures of tokens,
from which each restore computes all tokens.

B images; N tokens, the first P = num_prefix never pruned; D channels. R tokens are pruned after a
block, K kept. Buffers (B, N, D) hold a row for each position; the row of a pruned token is as it
was when pruned.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cropr_kernels.models.blocks import project_heads, proportional_attention
from cropr_kernels.ops.score_weights import cost_scales, size_adjusted_scores
from cropr_kernels.pruning.merging import COST_WEIGHT, Merge, checkerboard, log_sizes

ops = torch.ops.cropr
TEMPERATURE = 0.05  # of the softmax that weighs several parents by their cosine; chosen on seed 0


class Departure(NamedTuple):
    """The tokens pruned after one block."""

    idx: Tensor  # (B, R), positions pruned
    kept_idx: Tensor  # (B, K), positions kept, ascending
    before: Tensor  # (B, N, D), the output of the block
    after: Tensor  # (B, N, D), the same after the merge, if tokens merge
    keys: Tensor  # (B, N, C), keys of that block, mean over heads; zeros for tokens pruned earlier
    target: Tensor | None = None  # (B, R), the positions merged into, if tokens merge


class Trunk(NamedTuple):
    """Input of the fusion: all tokens (B, N, D), and the departures in order."""

    x: Tensor
    departures: list[Departure]
    num_prefix: int


def with_rows(x: Tensor, idx: Tensor, rows: Tensor) -> Tensor:
    """Copy x (B, N, D) with rows (B, K, D) at positions idx (B, K)."""
    return x.scatter(1, idx.unsqueeze(-1).expand_as(rows), rows)


def run_block(block: Any, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run a block of the reference ViT on x (B, K, D); also return its keys (B, K, C)."""
    q, k, v = project_heads(block.attn, block.norm1(x))
    heads = proportional_attention(q, k, v, None if sizes is None else log_sizes(sizes))
    x = x + block.ls1(block.attn.proj(heads.transpose(1, 2).flatten(2)))
    return x + block.ls2(block.mlp(block.norm2(x))), k.mean(1)


def run_trunk(
    model: Any,
    queries: Sequence[Tensor],
    images: Tensor,
    counts: Sequence[int],
    merge: Merge | None = None,
) -> list[Departure]:
    """Run all blocks but the last of the reference ViT, keeping counts[l] tokens after block l.

    Tokens are pruned as by `cropr.apply(model, keep=counts, merge=merge)` with queries (D,) of the
    modules.
    """
    x, _ = model.embed(images)
    batch, tokens = x.shape[:2]
    prefix = model.num_prefix_tokens
    active = torch.arange(tokens).repeat(batch, 1)
    sizes = torch.ones(batch, tokens)
    parent = active.clone()
    colours = checkerboard(x, (model.grid, model.grid), prefix)
    departures: list[Departure] = []
    for block, query, count in zip(model.blocks, queries, counts):
        active_sizes = sizes.gather(1, active) if merge is not None and departures else None
        rows, keys = run_block(block, ops.gather(x, active), active_sizes)
        before = after = with_rows(x, active, rows)
        raw_scores = scores = ops.scores(rows, query)
        target = None
        if merge is None:
            kept_idx, idx = (active.gather(1, part) for part in ops.select(scores, count, prefix))
        else:
            scores = size_adjusted_scores(
                scores, sizes.gather(1, active), merge.size_weight, prefix
            )
            priority = colours[len(departures) % 2].gather(1, active)
            split = ops.select(
                scores, merge.num_targets(rows.shape[1], count, prefix), prefix, priority
            )
            target_idx, candidate_idx = (active.gather(1, part) for part in split)
            cost_scale = torch.ones_like(sizes).scatter(
                1, active, cost_scales(raw_scores, scores, COST_WEIGHT, prefix)
            )
            after = before.clone()
            kept_idx, idx, _ = ops.merge_(
                after,
                target_idx,
                candidate_idx,
                sizes,
                parent,
                count,
                prefix,
                cost_scale=cost_scale,
            )
            target = parent.gather(1, idx)
        keys = with_rows(keys.new_zeros(batch, tokens, keys.shape[2]), active, keys)
        departures.append(Departure(idx, kept_idx, before, after, keys, target))
        x = after
        active = kept_idx
    return departures


def entering(model: Any, departures: list[Departure], blocks: int) -> Trunk:
    """Return the input of the last `blocks` blocks; tokens pruned right before them stay.

    With blocks = 0 the last block runs on the kept tokens, and its output is restored.
    """
    num_prefix = model.num_prefix_tokens
    if blocks == 0:
        return Trunk(run_last(model, departures), departures, num_prefix)
    return Trunk(departures[-blocks].before, departures[:-blocks], num_prefix)


def run_fusion(model: Any, x: Tensor, blocks: int = 1) -> Tensor:
    """Run the last blocks on all tokens (B, N, D), and the last norm."""
    for block in model.blocks[len(model.blocks) - blocks :]:
        x = block(x)
    return model.norm(x)


def run_without_fusion(model: Any, departures: list[Departure]) -> Tensor:
    """Run the last block on the kept tokens, and the last norm: (B, K, D).

    If tokens merged, each is copied to all positions merged into it: (B, N, D).
    """
    last = departures[-1]
    idx = last.kept_idx if last.target is None else roots(departures)
    return model.norm(ops.gather(run_last(model, departures), idx))


def run_last(model: Any, departures: list[Departure]) -> Tensor:
    """Run the last block on the kept tokens, and return all rows (B, N, D)."""
    last = departures[-1]
    sizes = None
    if last.target is not None:
        rows = roots(departures)
        sizes = (
            torch.zeros(rows.shape)
            .scatter_add(1, rows, torch.ones(rows.shape))
            .gather(1, last.kept_idx)
        )
    kept, _ = run_block(model.blocks[-1], ops.gather(last.after, last.kept_idx), sizes)
    return with_rows(last.after, last.kept_idx, kept)


def roots(departures: list[Departure]) -> Tensor:
    """Position of the kept token that holds each merged token, (B, N)."""
    root = torch.arange(departures[0].after.shape[1]).repeat(len(departures[0].idx), 1)
    for departure in reversed(departures):
        root = root.scatter(1, departure.idx, root.gather(1, departure.target))
    return root


# Restores: trunk -> all tokens (B, N, D), the input of the last blocks.


def as_pruned(trunk: Trunk) -> Tensor:
    """Every token as it was when pruned: Last Layer Fusion as published."""
    return trunk.x


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines (B, R, K) of rows (B, R, C) and (B, K, C)."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(1, 2)


def parents(
    departure: Departure, num_prefix: int, count: int = 1, *, keys: bool = False
) -> tuple[Tensor, Tensor]:
    """Positions (B, R, count) of the kept patches most similar to each pruned token, and weights.

    Similarity is the cosine of the tokens when pruned, or of their keys; weights are its softmax
    over TEMPERATURE. If tokens merged, the merge target comes first, unless keys decide.
    """
    patches = departure.kept_idx[:, num_prefix:].contiguous()
    features = departure.keys if keys else departure.before
    similarity = cosines(ops.gather(features, departure.idx), ops.gather(features, patches))
    ranked = similarity
    if departure.target is not None and not keys:
        first = torch.searchsorted(patches, departure.target)
        ranked = similarity.scatter(2, first.unsqueeze(2), 2.0)  # above every cosine
    chosen = ranked.topk(min(count, patches.shape[1]), dim=2).indices
    weights = (similarity.gather(2, chosen) / TEMPERATURE).softmax(2)
    return patches.unsqueeze(1).expand_as(similarity).gather(2, chosen), weights


def parent_copied(trunk: Trunk) -> Tensor:
    """Every pruned token as a copy of its parent."""
    x = trunk.x
    for departure in reversed(trunk.departures):
        parent, _ = parents(departure, trunk.num_prefix)
        x = with_rows(x, departure.idx, ops.gather(x, parent.squeeze(2)))
    return x


def parent_changed(trunk: Trunk, count: int = 1, *, keys: bool = False) -> Tensor:
    """Every pruned token plus the change of its parent since then, or a weighted one of several.

    Last departure first, so that a parent that was itself pruned later is already restored.
    """
    x = trunk.x
    for departure in reversed(trunk.departures):
        parent, weights = parents(departure, trunk.num_prefix, count, keys=keys)
        change = ops.gather(x, parent.flatten(1)) - ops.gather(departure.after, parent.flatten(1))
        change = (change.unflatten(1, parent.shape[1:]) * weights.unsqueeze(3)).sum(2)
        x = with_rows(x, departure.idx, ops.gather(trunk.x, departure.idx) + change)
    return x


def change_scaled(trunk: Trunk, factors: Tensor) -> Tensor:
    """The change of `parent_changed` times a factor for each channel, (D,)."""
    return trunk.x + factors * (parent_changed(trunk) - trunk.x)


def channel_factors(trunks: Sequence[Trunk], unpruned: Sequence[Tensor]) -> Tensor:
    """Least-squares factors (D,) of `change_scaled` for the unpruned tokens (B, N, D)."""
    product = torch.zeros(())
    square = torch.zeros(())
    for trunk, expected in zip(trunks, unpruned):
        change = parent_changed(trunk) - trunk.x  # zero for tokens that were never pruned
        product = product + (change * (expected - trunk.x)).sum((0, 1))
        square = square + change.square().sum((0, 1))
    return product / square.clamp_min(torch.finfo(square.dtype).tiny)


def parent_rechosen(trunk: Trunk, first: int = 0) -> Tensor:
    """`parent_changed` with parents chosen anew at each departure from `first` on.

    The parent is the kept patch with the highest cosine to the token restored so far; for tokens
    that merge at this departure it is the merge target.
    """
    departures = trunk.departures
    prefix = trunk.num_prefix
    start = parent_changed(Trunk(departures[first].before, departures[:first], prefix))
    absent = torch.cat(
        [departure.idx for departure in departures[:first]] or [departures[0].idx[:, :0]], 1
    )
    restored = ops.gather(start, absent)
    parent = absent[:, :0]
    chosen_rows = start[:, :0]  # of the parents, when they were chosen
    for departure in departures[first:]:
        if parent.shape[1]:
            restored = restored + ops.gather(departure.before, parent) - chosen_rows
        absent = torch.cat([absent, departure.idx], 1)
        restored = torch.cat([restored, ops.gather(departure.before, departure.idx)], 1)
        patches = departure.kept_idx[:, prefix:]
        parent = patches.gather(
            1, cosines(restored, ops.gather(departure.after, patches)).argmax(2)
        )
        if departure.target is not None:
            parent = torch.cat(
                [parent[:, : parent.shape[1] - departure.target.shape[1]], departure.target], 1
            )
        chosen_rows = ops.gather(departure.after, parent)
    return with_rows(trunk.x, absent, restored + ops.gather(trunk.x, parent) - chosen_rows)
