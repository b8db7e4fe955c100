"""Ways to restore pruned tokens before the last blocks, for networks that were not trained for it.

The blocks before the fusion run once for all of them: `run_trunk` notes what happened, and of that a restore makes all
tokens.

B images; N tokens, the first P = num_prefix never pruned; D channels. R tokens are pruned after a block, K kept.
Buffers (B, N, D) hold a row for each position: of a token that was pruned, the row as it left.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cropr_kernels.models.blocks import project_heads, proportional_attention
from cropr_kernels.ops.reference import pruning_costs, size_adjusted_scores
from cropr_kernels.pruning.merging import COST_WEIGHT, Merge, checkerboard, log_sizes

ops = torch.ops.cropr
TEMPERATURE = 0.05  # of the softmax that weighs several hosts by their cosine; chosen on seed 0


class Departure(NamedTuple):
    """What was pruned after one block."""

    idx: Tensor  # (B, R), positions pruned
    kept_idx: Tensor  # (B, K), positions kept, ascending
    before: Tensor  # (B, N, D), as the block left it
    after: Tensor  # (B, N, D): where tokens merge, kept rows hold what they took in
    keys: Tensor  # (B, N, C), keys of that block, mean over heads; zeros where a token was gone
    target: Tensor | None = None  # (B, R): where tokens merge, the positions they merged into


class Trunk(NamedTuple):
    """What reaches the fusion: all tokens (B, N, D), those pruned as they left, and all departures in order."""

    x: Tensor
    departures: list[Departure]
    num_prefix: int


def put(x: Tensor, idx: Tensor, rows: Tensor) -> Tensor:
    """x (B, N, D) with these rows (B, K, D) at positions idx (B, K)."""
    return x.scatter(1, idx.unsqueeze(-1).expand_as(rows), rows)


def run_block(block: Any, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What a block of the reference ViT gives for x (B, K, D), and its keys (B, K, C), mean over heads."""
    q, k, v = project_heads(block.attn, block.norm1(x))
    heads = proportional_attention(q, k, v, None if sizes is None else log_sizes(sizes))
    x = x + block.ls1(block.attn.proj(heads.transpose(1, 2).flatten(2)))
    return x + block.ls2(block.mlp(block.norm2(x))), k.mean(1)


def run_trunk(
    model: Any, queries: Sequence[Tensor], images: Tensor, counts: Sequence[int], merge: Merge | None = None
) -> list[Departure]:
    """All blocks but the last of the reference ViT, without rotary positions: counts[l] tokens are kept after block l.

    Pruned as by `cropr.apply(model, keep=counts, merge=merge)` with modules of these queries, (D,) each.
    """
    x, _ = model.embed(images)
    (batch, tokens), prefix = x.shape[:2], model.num_prefix_tokens
    active = torch.arange(tokens).repeat(batch, 1)
    sizes, parent = torch.ones(batch, tokens), active.clone()
    colours = checkerboard(x, (model.grid, model.grid), prefix)
    departures: list[Departure] = []
    for block, query, count in zip(model.blocks, queries, counts):
        weighed = sizes.gather(1, active) if merge is not None and departures else None
        rows, keys = run_block(block, ops.gather(x, active), weighed)
        before = after = put(x, active, rows)
        own = scores = ops.scores(rows, query)
        target = None
        if merge is None:
            kept_idx, idx = (active.gather(1, part) for part in ops.select(scores, count, prefix))
        else:
            scores = size_adjusted_scores(scores, sizes.gather(1, active), merge.size_weight, prefix)
            priority = colours[len(departures) % 2].gather(1, active)
            split = ops.select(scores, merge.num_targets(rows.shape[1], count, prefix), prefix, priority)
            safe, candidates = (active.gather(1, part) for part in split)
            costs = torch.ones_like(sizes).scatter(1, active, pruning_costs(own, scores, COST_WEIGHT, prefix))
            after = before.clone()
            kept_idx, idx, _ = ops.merge_(after, safe, candidates, sizes, parent, count, prefix, costs=costs)
            target = parent.gather(1, idx)
        keys = put(keys.new_zeros(batch, tokens, keys.shape[2]), active, keys)
        departures.append(Departure(idx, kept_idx, before, after, keys, target))
        x, active = after, kept_idx
    return departures


def entering(model: Any, departures: list[Departure], blocks: int) -> Trunk:
    """What the last so many blocks see: what was pruned right before them would come straight back, so it stayed."""
    num_prefix = model.num_prefix_tokens
    if blocks == 0:
        return Trunk(run_last(model, departures), departures, num_prefix)
    return Trunk(departures[-blocks].before, departures[:-blocks], num_prefix)


def run_fusion(model: Any, x: Tensor, blocks: int = 1) -> Tensor:
    """The last blocks on all tokens (B, N, D), and the last norm."""
    for block in model.blocks[len(model.blocks) - blocks :]:
        x = block(x)
    return model.norm(x)


def run_without_fusion(model: Any, departures: list[Departure]) -> Tensor:
    """The last block on the kept tokens, and the last norm: (B, K, D), (B, N, D) where tokens merged.

    Then each is copied to all positions that it stands for.
    """
    last = departures[-1]
    return model.norm(
        ops.gather(run_last(model, departures), last.kept_idx if last.target is None else roots(departures))
    )


def run_last(model: Any, departures: list[Departure]) -> Tensor:
    """All rows (B, N, D), those of kept tokens as the last block gives them."""
    last, sizes = departures[-1], None
    if last.target is not None:
        rows = roots(departures)
        sizes = torch.zeros(rows.shape).scatter_add(1, rows, torch.ones(rows.shape)).gather(1, last.kept_idx)
    kept, _ = run_block(model.blocks[-1], ops.gather(last.after, last.kept_idx), sizes)
    return put(last.after, last.kept_idx, kept)


def roots(departures: list[Departure]) -> Tensor:
    """(B, N): where tokens merged, the position of the kept token in which each is."""
    root = torch.arange(departures[0].after.shape[1]).repeat(len(departures[0].idx), 1)
    for departure in reversed(departures):
        root = root.scatter(1, departure.idx, root.gather(1, departure.target))
    return root


# Restores: all tokens (B, N, D) that the last blocks shall see.


def left(trunk: Trunk) -> Tensor:
    """Every token as it left: Last Layer Fusion as published."""
    return trunk.x


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """(B, R, K), of rows (B, R, C) and (B, K, C)."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(1, 2)


def hosts(departure: Departure, num_prefix: int, count: int = 1, *, keys: bool = False) -> tuple[Tensor, Tensor]:
    """Positions (B, R, count) of the kept patches most like each pruned token, and their weights, which sum to one.

    By the cosine of the tokens when they were pruned, or of their keys; weights are its softmax over TEMPERATURE. Where
    tokens merged, the one merged into comes first, unless keys decide.
    """
    patches = departure.kept_idx[:, num_prefix:].contiguous()
    features = departure.keys if keys else departure.before
    likeness = cosines(ops.gather(features, departure.idx), ops.gather(features, patches))
    ranked = likeness
    if departure.target is not None and not keys:
        first = torch.searchsorted(patches, departure.target)
        ranked = likeness.scatter(2, first.unsqueeze(2), 2.0)  # above every cosine
    chosen = ranked.topk(min(count, patches.shape[1]), dim=2).indices
    weights = (likeness.gather(2, chosen) / TEMPERATURE).softmax(2)
    return patches.unsqueeze(1).expand_as(likeness).gather(2, chosen), weights


def host_copied(trunk: Trunk) -> Tensor:
    """A pruned token is what its host has become."""
    x = trunk.x
    for departure in reversed(trunk.departures):
        host, _ = hosts(departure, trunk.num_prefix)
        x = put(x, departure.idx, ops.gather(x, host.squeeze(2)))
    return x


def host_changed(trunk: Trunk, count: int = 1, *, keys: bool = False) -> Tensor:
    """left + (host now - host then): a pruned token lives through what its host has, or several, by their weights.

    Last departure first: a host that was pruned later is restored by then.
    """
    x = trunk.x
    for departure in reversed(trunk.departures):
        host, weights = hosts(departure, trunk.num_prefix, count, keys=keys)
        change = ops.gather(x, host.flatten(1)) - ops.gather(departure.after, host.flatten(1))
        change = (change.unflatten(1, host.shape[1:]) * weights.unsqueeze(3)).sum(2)
        x = put(x, departure.idx, ops.gather(trunk.x, departure.idx) + change)
    return x


def change_scaled(trunk: Trunk, factors: Tensor) -> Tensor:
    """The whole change of `host_changed` times a factor for each channel, (D,)."""
    return trunk.x + factors * (host_changed(trunk) - trunk.x)


def channel_factors(trunks: Sequence[Trunk], unpruned: Sequence[Tensor]) -> Tensor:
    """The factors (D,) of `change_scaled` that come closest to the unpruned tokens (B, N, D) there: least squares."""
    product, square = torch.zeros(()), torch.zeros(())
    for trunk, expected in zip(trunks, unpruned):
        change = host_changed(trunk) - trunk.x  # none, and so without influence, where a token was never pruned
        product = product + (change * (expected - trunk.x)).sum((0, 1))
        square = square + change.square().sum((0, 1))
    return product / square.clamp_min(torch.finfo(square.dtype).tiny)


def host_rechosen(trunk: Trunk, first: int = 0) -> Tensor:
    """`host_changed`, but from departure `first` on hosts are chosen anew at each, for all tokens pruned by then.

    By the cosine of left + change so far with the patches kept; tokens that merge right then have the one they merge
    into.
    """
    departures, prefix = trunk.departures, trunk.num_prefix
    start = host_changed(Trunk(departures[first].before, departures[:first], prefix))
    absent = torch.cat([departure.idx for departure in departures[:first]] or [departures[0].idx[:, :0]], 1)
    restored, host, then = ops.gather(start, absent), absent[:, :0], start[:, :0]
    for departure in departures[first:]:
        if host.shape[1]:
            restored = restored + ops.gather(departure.before, host) - then
        absent = torch.cat([absent, departure.idx], 1)
        restored = torch.cat([restored, ops.gather(departure.before, departure.idx)], 1)
        patches = departure.kept_idx[:, prefix:]
        host = patches.gather(1, cosines(restored, ops.gather(departure.after, patches)).argmax(2))
        if departure.target is not None:
            host = torch.cat([host[:, : host.shape[1] - departure.target.shape[1]], departure.target], 1)
        then = ops.gather(departure.after, host)
    return put(trunk.x, absent, restored + ops.gather(trunk.x, host) - then)
