"""Pairwise merging with more criteria than ToMe: PiToMe, ATM, and variants of Cropr's merge."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.network import Context, Reducer, Reduction, gather_rows
from cropr_kernels.ops.score_weights import cost_scales, size_adjusted_scores
from cropr_kernels.pruning.merging import COST_WEIGHT, SIZE_EXPONENT, Merge, checkerboard

ops = torch.ops.cropr


class Pairs(NamedTuple):
    """Tokens at source_idx (B, A), each of which may merge into one at target_idx (B, C)."""

    source_idx: Tensor
    target_idx: Tensor
    gain: Tensor  # (B, A, C), the higher, the sooner


class PiToMe(Reducer):
    """Tokens similar to many others merge; tokens similar to few are protected.

    A token's energy is the mean of ELU(cosine - margin) over all patches, itself included, with the
    cosine of the keys. By energy, descending, even ranks merge into the odd ranks they are most
    similar to: in the first half of the blocks the most similar of all patches, later all of the 2
    R patches with the highest energy. Source: Tran et al. 2024 (arXiv 2405.16148) and its code.

    Args:
        margin: of the first block; it falls linearly to 0. 0.9 for ViTs trained as by Steiner et
            al. 2021 (AugReg), 0.75 for others.
        proportional: log(size) on the attention logits.
    """

    needs = frozenset({"keys"})
    insertion_point = "attention"

    def __init__(self, *, margin: float = 0.9, proportional: bool = True):
        super().__init__()
        self.margin = margin
        self.proportional = proportional

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        count = x.shape[1] - num_keep
        keys = unit_keys(context, num_prefix)
        order = energy(keys, self.margin * (1 - context.depth)).argsort(
            dim=1, descending=True, stable=True
        )
        may_merge = order.shape[1] if context.depth < 0.5 else 2 * count
        even, odd = order[:, :may_merge:2], order[:, 1:may_merge:2]
        similarity = ops.gather(keys, even) @ ops.gather(keys, odd).transpose(1, 2)
        protected = after_prefix(order[:, may_merge:], num_prefix)
        return merge_matched(
            x, context, protected, even + num_prefix, odd + num_prefix, similarity, count
        )


class ATM(Reducer):
    """Merge the pairs with the least Ward loss n m / (n + m) (1 - cosine of the keys), n, m their
    sizes.

    In the first half of the blocks even patches merge into odd ones, as in ToMe; later the smaller
    half of the patches into the larger half. Source: Lee and Choi 2025 (arXiv 2505.15160); no code
    is published. From the paper: sizes weigh in the choice of pairs, above all late in the network.
    Our choices, which may differ from the authors': the weight is Ward's, in all blocks; the halves
    change in the middle of the network, and the smaller one merges into the larger; the schedule
    sets the number of merges, where the paper merges all pairs above a threshold of the layer
    (`adaptive.AdaptiveATM`).

    Args:
        distinctive: False: even and odd in all blocks, so that Ward's weight is the only difference
            from ToMe.
    """

    needs = frozenset({"keys"})
    insertion_point = "attention"

    def __init__(self, *, distinctive: bool = True):
        super().__init__()
        self.distinctive = distinctive

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        source_idx, target_idx, gain = self.pairs(x, context, num_prefix)
        prefix_idx = after_prefix(source_idx[:, :0], num_prefix)
        count = x.shape[1] - num_keep
        return merge_matched(x, context, prefix_idx, source_idx, target_idx, gain, count)

    def pairs(self, x: Tensor, context: Context, num_prefix: int) -> Pairs:
        """Pairs that may merge, with less than no gain: minus their loss."""
        keys = unit_keys(context, num_prefix)
        sizes = sizes_of(x, context)[:, num_prefix:]
        batch, patches = sizes.shape
        if self.distinctive and context.depth >= 0.5:
            order = sizes.argsort(dim=1, descending=True, stable=True)
            source_idx = order[:, patches // 2 :]
            target_idx = order[:, : patches // 2]
        else:
            order = torch.arange(patches, device=x.device).expand(batch, -1)
            source_idx = order[:, ::2]
            target_idx = order[:, 1::2]
        cosine = ops.gather(keys, source_idx) @ ops.gather(keys, target_idx).transpose(1, 2)
        gain = -ward(sizes.gather(1, source_idx), sizes.gather(1, target_idx)) * (1 - cosine)
        return Pairs(source_idx + num_prefix, target_idx + num_prefix, gain)


class CroprMerge(Reducer):
    """Cropr's merge, step by step, for experiments that leave parts of it out or replace them.

    Args:
        query: (D,), of the Cropr module.
        merge: options of the merge.
        merges: number of merges before.
        side: patches on a side of the image.
        checkerboard: patches of one colour become targets first.
        cost_weight: low scores merge first among the candidates too; 0: those most similar to a
            target do.
        keep_norms: a merged token keeps the norm of its target; False: the norm of the mean.
        size_exponent: attention weighs tokens by this power of their sizes.
        ward: pairs are chosen by Ward's loss, as in `ATM`, in place of the cosine of the tokens.
    """

    def __init__(
        self,
        query: Tensor,
        merge: Merge,
        merges: int,
        side: int,
        *,
        checkerboard: bool = True,
        cost_weight: float = COST_WEIGHT,
        keep_norms: bool = True,
        size_exponent: float = SIZE_EXPONENT,
        ward: bool = False,
    ):
        super().__init__()
        self.query = query
        self.merge = merge
        self.merges = merges
        self.side = side
        self.checkerboard = checkerboard
        self.cost_weight = cost_weight
        self.keep_norms = keep_norms
        self.size_exponent = size_exponent
        self.ward = ward

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        raw = ops.scores(x, self.query)
        sizes = sizes_of(x, context)
        scores = size_adjusted_scores(raw, sizes, self.merge.size_weight, num_prefix)
        priority = None
        if self.checkerboard:
            priority = checkerboard(x, (self.side, self.side), num_prefix)[self.merges % 2]
            priority = (
                priority if context.positions is None else priority.gather(1, context.positions)
            )
        num_targets = self.merge.num_targets(x.shape[1], num_keep, num_prefix)
        target_idx, candidate_idx = ops.select(scores, num_targets, num_prefix, priority)
        prefix_idx = target_idx[:, :num_prefix]
        target_idx = target_idx[:, num_prefix:]
        unit = F.normalize(x.detach(), dim=-1)
        loss = 1 - ops.gather(unit, candidate_idx) @ ops.gather(unit, target_idx).transpose(1, 2)
        if self.ward:
            loss = ward(sizes.gather(1, candidate_idx), sizes.gather(1, target_idx)) * loss
        loss = loss * cost_scales(raw, scores, self.cost_weight, num_prefix).gather(
            1, candidate_idx
        ).unsqueeze(2)
        count = x.shape[1] - num_keep
        return merge_matched(
            x,
            context,
            prefix_idx,
            candidate_idx,
            target_idx,
            -loss,
            count,
            keep_norms=self.keep_norms,
        )


def unit_keys(context: Context, num_prefix: int) -> Tensor:
    """Keys of the patches, mean over heads, of unit norm: (B, N - P, C), at least float32."""
    keys = context.require("keys").detach()[:, :, num_prefix:]
    return F.normalize(keys.mean(1, dtype=torch.promote_types(keys.dtype, torch.float32)), dim=-1)


def energy(keys: Tensor, margin: float) -> Tensor:
    """Mean over all N of ELU(cosine - margin), of keys of unit norm: (B, N)."""
    excess = (keys @ keys.transpose(1, 2)).sub_(margin)
    # ELU(y) = max(y, 0) + exp(min(y, 0)) - 1; on a CPU F.elu takes four times as long
    return excess.clamp_min(0).add_(excess.clamp_max_(0).exp_()).mean(2) - 1


def sizes_of(x: Tensor, context: Context) -> Tensor:
    """(B, N) float32."""
    return x.new_ones(x.shape[:2], dtype=torch.float32) if context.sizes is None else context.sizes


def ward(sizes: Tensor, other_sizes: Tensor) -> Tensor:
    """n m / (n + m) of sizes (B, A) and (B, C): (B, A, C)."""
    n = sizes.unsqueeze(2)
    m = other_sizes.unsqueeze(1)
    return n * m / (n + m)


def after_prefix(patches: Tensor, num_prefix: int) -> Tensor:
    """Positions (B, P + K) of the prefix and of patches (B, K) that count from its end."""
    prefix = torch.arange(num_prefix, device=patches.device).expand(patches.shape[0], -1)
    return torch.cat([prefix, patches + num_prefix], 1)


def merge_matched(
    x: Tensor,
    context: Context,
    bystanders: Tensor,
    source_idx: Tensor,
    target_idx: Tensor,
    similarity: Tensor,
    count: int,
    *,
    keep_norms: bool = False,
) -> Reduction:
    """Merge `count` tokens of source_idx (B, A) into the most similar ones of target_idx (B, C).

    Order of the result: bystanders, sources that stay, targets.

    Args:
        bystanders: (B, O), positions that take no part; O + A + C = N.
        similarity: (B, A, C).

    Raises:
        ValueError: count exceeds A.
    """
    if count > source_idx.shape[1]:
        raise ValueError(
            f"of {x.shape[1]} tokens at most {source_idx.shape[1]} can merge into others, not "
            f"{count}"
        )
    best, partner = similarity.max(2)
    staying, leaving = ops.select(-best.float(), source_idx.shape[1] - count, 0)
    kept = torch.cat([bystanders, source_idx.gather(1, staying), target_idx], 1)
    target = partner.gather(1, leaving) + (kept.shape[1] - target_idx.shape[1])
    return absorb(x, context, kept, source_idx.gather(1, leaving), target, keep_norms=keep_norms)


def absorb(
    x: Tensor,
    context: Context,
    kept: Tensor,
    moved: Tensor,
    target: Tensor,
    *,
    keep_norms: bool = False,
) -> Reduction:
    """Merge tokens at `moved` (B, R) into those at `kept` (B, K), by means weighted with the sizes.

    Only changes are computed: mean = kept + sum of (moved - kept) * (size of moved / size of all).

    Args:
        target: (B, R), the index in `kept` into which each merges.
        keep_norms: scale the mean to the norm of the token at `kept`.
    """
    sizes = sizes_of(x, context)
    tokens = gather_rows(x, kept)
    moved_sizes = sizes.gather(1, moved)
    moved_tokens = gather_rows(x, moved)
    total = sizes.gather(1, kept).scatter_add(1, target, moved_sizes)
    share = (moved_sizes.double() / total.gather(1, target)).unsqueeze(2).type_as(x)
    change = (moved_tokens - gather_rows(tokens, target)) * share
    means = tokens.scatter_add(1, target.unsqueeze(2).expand_as(moved_tokens), change)
    if keep_norms:
        means = means * (tokens.norm(dim=2) / means.norm(dim=2)).unsqueeze(2)
    return Reduction(
        means, position_idx=kept, sizes=total, rows=lambda: rows_of(kept, moved, target)
    )


def rows_of(kept: Tensor, moved: Tensor, target: Tensor) -> Tensor:
    """Index in `kept` (B, K) of the token that holds each of N tokens, as in `absorb`: (B, N)."""
    rows = torch.empty_like(torch.cat([kept, moved], 1))
    rows.scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
    return rows.scatter_(1, moved, target)
