"""Ways to merge tokens in pairs that weigh more than ToMe does: PiToMe, ATM, and Cropr's own with other weights."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.network import Context, Reducer, Reduction, take
from cropr_kernels.ops.reference import pruning_costs, size_adjusted_scores
from cropr_kernels.pruning.merging import COST_WEIGHT, SIZE_EXPONENT, Merge, checkerboard

ops = torch.ops.cropr


class PiToMe(Reducer):
    """Tokens that are like many others merge, those that are like few are protected.

    A token's energy is the mean of ELU(cosine - margin) over all patches, itself included; cosines are those of the
    keys. By energy, descending, even ranks merge into the odd ranks they are most like: in the first half of the blocks
    those of all patches that are most like one, later all of the 2 R patches with the highest energy. Source: Tran et
    al. 2024 (arXiv 2405.16148) and its code.

    Args:
        margin: that of the first block; it falls linearly to 0. 0.9 is that of ViTs trained as by Steiner et al. 2021
            (AugReg), 0.75 that of others.
        proportional: log(size) on the attention logits.
    """

    needs = frozenset({"keys"})
    place = "attention"

    def __init__(self, *, margin: float = 0.9, proportional: bool = True):
        super().__init__()
        self.margin, self.proportional = margin, proportional

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        count, keys = x.shape[1] - num_keep, unit_keys(context, num_prefix)
        order = energy(keys, self.margin * (1 - context.depth)).argsort(dim=1, descending=True, stable=True)
        may_merge = order.shape[1] if context.depth < 0.5 else 2 * count
        even, odd = order[:, :may_merge:2], order[:, 1:may_merge:2]
        similarity = ops.gather(keys, even) @ ops.gather(keys, odd).transpose(1, 2)
        protected = behind_prefix(order[:, may_merge:], num_prefix)
        return merge_matched(x, context, protected, even + num_prefix, odd + num_prefix, similarity, count)


class ATM(Reducer):
    """Pairs merge that lose least by it: n m / (n + m) (1 - cosine of the keys), n and m their sizes, as Ward has it.

    In the first half of the blocks even patches merge into odd ones, as in ToMe; later the smaller half of the patches
    into the larger half. Source: Lee and Choi 2025 (arXiv 2505.15160), without code of theirs. Theirs is that the
    choice of pairs weighs sizes too, late in the network above all. Ours, which theirs may have otherwise: the weight
    is Ward's, and counts in all blocks; the halves change in the middle of the network, and the smaller one goes; and
    as many tokens merge as the schedule says, where theirs are all that are above a threshold of the layer.

    Args:
        distinctive: False: even and odd in all blocks, so that Ward's weight is all that ToMe has not.
    """

    needs = frozenset({"keys"})
    place = "attention"

    def __init__(self, *, distinctive: bool = True):
        super().__init__()
        self.distinctive = distinctive

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        keys, sizes = unit_keys(context, num_prefix), sizes_of(x, context)[:, num_prefix:]
        batch, patches = sizes.shape
        if self.distinctive and context.depth >= 0.5:
            order = sizes.argsort(dim=1, descending=True, stable=True)
            goes, takes = order[:, patches // 2 :], order[:, : patches // 2]
        else:
            order = torch.arange(patches, device=x.device).expand(batch, -1)
            goes, takes = order[:, ::2], order[:, 1::2]
        cosine = ops.gather(keys, goes) @ ops.gather(keys, takes).transpose(1, 2)
        gain = -ward(sizes.gather(1, goes), sizes.gather(1, takes)) * (1 - cosine)
        prefix = behind_prefix(order[:, :0], num_prefix)
        return merge_matched(x, context, prefix, goes + num_prefix, takes + num_prefix, gain, x.shape[1] - num_keep)


class CroprMerge(Reducer):
    """Cropr's own merge, step by step, with parts of it left out or replaced: an experiment.

    Args:
        query: (D,), that of Cropr's module.
        merge: its options.
        merges: how many there were before.
        side: patches on a side of the image.
        checkerboard: patches of one colour are safe before others.
        cost_weight: among candidates too low scores go first; 0: those most like a safe token do.
        keep_norms: a merged token has the norm of the one that it is merged into; or that of the mean.
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
        self.query, self.merge, self.merges, self.side = query, merge, merges, side
        self.checkerboard, self.cost_weight, self.keep_norms = checkerboard, cost_weight, keep_norms
        self.size_exponent, self.ward = size_exponent, ward

    def forward(self, x: Tensor, context: Context, num_keep: int, num_prefix: int) -> Reduction:
        raw, sizes = ops.scores(x, self.query), sizes_of(x, context)
        scores = size_adjusted_scores(raw, sizes, self.merge.size_weight, num_prefix)
        priority = None
        if self.checkerboard:
            priority = checkerboard(x, (self.side, self.side), num_prefix)[self.merges % 2]
            priority = priority if context.positions is None else priority.gather(1, context.positions)
        num_safe = self.merge.num_targets(x.shape[1], num_keep, num_prefix)
        safe, may_go = ops.select(scores, num_safe, num_prefix, priority)
        prefix, safe = safe[:, :num_prefix], safe[:, num_prefix:]
        unit = F.normalize(x.detach(), dim=-1)
        loss = 1 - ops.gather(unit, may_go) @ ops.gather(unit, safe).transpose(1, 2)
        if self.ward:
            loss = ward(sizes.gather(1, may_go), sizes.gather(1, safe)) * loss
        loss = loss * pruning_costs(raw, scores, self.cost_weight, num_prefix).gather(1, may_go).unsqueeze(2)
        count = x.shape[1] - num_keep
        return merge_matched(x, context, prefix, may_go, safe, -loss, count, keep_norms=self.keep_norms)


def unit_keys(context: Context, num_prefix: int) -> Tensor:
    """The keys of the patches, mean over heads, of length one: (B, N - P, C), at least float32."""
    keys = context.need("keys").detach()[:, :, num_prefix:]
    return F.normalize(keys.mean(1, dtype=torch.promote_types(keys.dtype, torch.float32)), dim=-1)


def energy(keys: Tensor, margin: float) -> Tensor:
    """(B, N), of keys of length one: the mean over all N of ELU(cosine - margin)."""
    above = (keys @ keys.transpose(1, 2)).sub_(margin)
    # ELU(y) = max(y, 0) + exp(min(y, 0)) - 1; on a CPU F.elu takes four times as long
    return above.clamp_min(0).add_(above.clamp_max_(0).exp_()).mean(2) - 1


def sizes_of(x: Tensor, context: Context) -> Tensor:
    """(B, N) float32."""
    return x.new_ones(x.shape[:2], dtype=torch.float32) if context.sizes is None else context.sizes


def ward(sizes: Tensor, others: Tensor) -> Tensor:
    """n m / (n + m) of sizes (B, A) and (B, C): (B, A, C)."""
    n, m = sizes.unsqueeze(2), others.unsqueeze(1)
    return n * m / (n + m)


def behind_prefix(patches: Tensor, num_prefix: int) -> Tensor:
    """Positions of the prefix tokens, and of patches (B, K) that count from behind it: (B, P + K)."""
    prefix = torch.arange(num_prefix, device=patches.device).expand(patches.shape[0], -1)
    return torch.cat([prefix, patches + num_prefix], 1)


def merge_matched(
    x: Tensor,
    context: Context,
    others: Tensor,
    goes: Tensor,
    takes: Tensor,
    similarity: Tensor,
    count: int,
    *,
    keep_norms: bool = False,
) -> Reduction:
    """Of the tokens at `goes` (B, A), the `count` that are most like one at `takes` (B, C) merge into that one.

    Tokens stay in the order: others, those that might have gone, those that take.

    Args:
        others: (B, O), what has no part in it; O + A + C = N.
        similarity: (B, A, C).

    Raises:
        ValueError: more have to go than there are at `goes`.
    """
    if count > goes.shape[1]:
        raise ValueError(f"of {x.shape[1]} tokens at most {goes.shape[1]} can merge into others, not {count}")
    best, partner = similarity.max(2)
    stays, chosen = ops.select(-best.float(), goes.shape[1] - count, 0)
    kept = torch.cat([others, goes.gather(1, stays), takes], 1)
    target = partner.gather(1, chosen) + (kept.shape[1] - takes.shape[1])
    return absorb(x, context, kept, goes.gather(1, chosen), target, keep_norms=keep_norms)


def absorb(
    x: Tensor, context: Context, kept: Tensor, moved: Tensor, target: Tensor, *, keep_norms: bool = False
) -> Reduction:
    """Tokens at `moved` (B, R) go into those at `kept` (B, K), by means that sizes weight.

    Only what changes is computed: mean = kept + sum of (moved - kept) * (size of moved / size of all).

    Args:
        target: (B, R), the index in `kept` of the one that each goes into.
        keep_norms: the mean then gets the norm of the token that others go into.
    """
    sizes, tokens = sizes_of(x, context), take(x, kept)
    own, coming = sizes.gather(1, moved), take(x, moved)
    total = sizes.gather(1, kept).scatter_add(1, target, own)
    share = (own.double() / total.gather(1, target)).unsqueeze(2).type_as(x)
    change, rows = (coming - take(tokens, target)) * share, target.unsqueeze(2).expand_as(coming)
    means = tokens.scatter_add(1, rows, change)
    if keep_norms:
        means = means * (tokens.norm(dim=2) / means.norm(dim=2)).unsqueeze(2)
    return Reduction(means, places=kept, sizes=total, rows=lambda: rows_of(kept, moved, target))


def rows_of(kept: Tensor, moved: Tensor, target: Tensor) -> Tensor:
    """For each of N tokens the index in `kept` (B, K) of the one it is in, as in `absorb`: (B, N)."""
    rows = torch.empty_like(torch.cat([kept, moved], 1))
    rows.scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
    return rows.scatter_(1, moved, target)
