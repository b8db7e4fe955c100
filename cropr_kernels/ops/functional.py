"""The ops as typed functions. Each calls ``torch.ops.cropr.<name>`` and nothing else.

B images, N tokens, K kept, R = N - K pruned, D channels, M queries; the first P = num_prefix tokens
(class token, registers) are never pruned. Tensors are float32, float64, bfloat16 or float16 unless
said otherwise, of any strides; positions are int64. Sums run in float32, in float64 for float64
tokens. Same input, same bits, on every run.

Functions whose names end in _, and gather_norm, are for the engine: x (B, N, D) is the residual
buffer, contiguous, changed in place and without gradient; idx (B, K) holds the positions of the
active tokens, without repeats (None: all tokens).

Every function raises RuntimeError with one sentence: the op, the argument, the allowed and the
actual value. On a CPU positions are checked as well; on CUDA a position out of range reads and
writes nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Rows and positions: kept (B, K, D) at kept_idx (B, K), pruned (B, R, D) at pruned_idx (B, R).

    Both lists of positions ascend.
    """

    kept: Tensor
    kept_idx: Tensor
    pruned: Tensor
    pruned_idx: Tensor


class Merged(NamedTuple):
    """Tokens after a merge. dest (B, N) is the row of kept (B, K, D) that holds each token."""

    kept: Tensor
    kept_idx: Tensor
    pruned_idx: Tensor
    kept_sizes: Tensor
    dest: Tensor


def scores(x: Tensor, query: Tensor) -> Tensor:
    """Score every token by its product with the sum of the queries, x . sum_m query_m.

    Paper, section 3.1.

    Args:
        x: (B, N, D).
        query: (D,) or (M, D), of any dtype.

    Returns:
        (B, N) float32, unscaled, without softmax. No gradient: stop-gradient is part of the op.
    """
    return torch.ops.cropr.scores(x, query)


def select(
    scores: Tensor, num_keep: int, num_prefix: int = 0, priority: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Select the num_keep tokens of the highest scores, always with the first num_prefix.

    Exact: of equal scores the lower position is kept, NaN ranks highest, -0.0 equals +0.0.

    Args:
        scores: (B, N).
        num_keep: in [num_prefix, N].
        priority: (B, N), int8 or bool. Positive tokens are kept before all others, negative ones
            pruned before all others, of these the higher positions first.

    Returns:
        Positions kept (B, K) and pruned (B, R), int64, ascending. No gradient.
    """
    return torch.ops.cropr.select(scores, num_keep, num_prefix, priority)


def prune(
    x: Tensor, query: Tensor, num_keep: int, num_prefix: int = 0, priority: Tensor | None = None
) -> Split:
    """Score, select and split the rows in one op; `restore` is its inverse.

    Args:
        x: (B, N, D).
        query: (D,) or (M, D), of any dtype.
        num_keep, num_prefix, priority: as in `select`.

    Returns:
        Bit-exact copies of the rows, with their positions. Gradient for x, through the rows; none
        for query.
    """
    return Split(*torch.ops.cropr.prune(x, query, num_keep, num_prefix, priority))


def split(
    x: Tensor, scores: Tensor, num_keep: int, num_prefix: int = 0, priority: Tensor | None = None
) -> Split:
    """`prune` by known scores (B, N), float32."""
    return Split(*torch.ops.cropr.split(x, scores, num_keep, num_prefix, priority))


def gather(x: Tensor, idx: Tensor) -> Tensor:
    """Take rows by position: out[b, i] = x[b, idx[b, i]].

    Args:
        x: (B, N, D).
        idx: (B, K) int64 in [0, N); may repeat.

    Returns:
        (B, K, D). Gradient for x.
    """
    return torch.ops.cropr.gather(x, idx)


def restore(kept: Tensor, kept_idx: Tensor, pruned: Tensor, pruned_idx: Tensor) -> Tensor:
    """Put every row back at its position: the inverse of `prune`, and its gradient.

    Args:
        kept, pruned: (B, K, D) and (B, R, D), of one dtype.
        kept_idx, pruned_idx: (B, K) and (B, R); together every position in [0, K + R) once.

    Returns:
        (B, K + R, D). Gradient for kept and pruned.
    """
    return torch.ops.cropr.restore(kept, kept_idx, pruned, pruned_idx)


def attend(x: Tensor, queries: Tensor, scale: float) -> Tensor:
    """Cross-attention of one head with keys = values = x: softmax(scale * queries x^T) x.

    The aggregator of training (paper, section 3.1). Nothing of shape (B, M, N) is saved for
    backward.

    Args:
        x: (B, N, D), N >= 1; read as detached.
        queries: (M, D), of any dtype.

    Returns:
        (B, M, D). Gradient for queries only.
    """
    return torch.ops.cropr.attend(x, queries, scale)


def attend_scores(x: Tensor, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return `attend` and `scores` of the same tokens: training then prunes with `split`."""
    return torch.ops.cropr.attend_scores(x, queries, scale)


def attend_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    log_sizes: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend within each image of a ragged batch: softmax(scale q k^T + log_sizes) v.

    For the engine: no gradient.

    Args:
        q, k, v: (T, H, C), the tokens of all images in one row.
        starts: (B + 1,) int64, ascending from 0 to T: image b has tokens starts[b] to starts[b + 1]
            - 1, or none. On CUDA rows from starts[B] on are not written.
        longest: in [0, T], at least the tokens of every image.
        log_sizes: (T,) float32, finite: a token of size s weighs as much as s equal ones.
        scale: C^-0.5 if None.

    Returns:
        (T, H, C).
    """
    return torch.ops.cropr.attend_segments(q, k, v, starts, longest, log_sizes, scale)


def merge(
    x: Tensor,
    target_idx: Tensor,
    candidate_idx: Tensor,
    sizes: Tensor,
    num_keep: int,
    num_prefix: int = 0,
    cost_scale: Tensor | None = None,
) -> Merged:
    """Prune the candidates most similar to a target, and merge each into it.

        mean[k] = (sizes[k] x[k] + sum_r sizes[r] x[r]) / (sizes[k] + sum_r sizes[r])
        kept[k] = mean[k] |x[k]| / |mean[k]|

    Sums are over all r merged into k; other rows do not change. The factor of a mean is 1 if |mean|
    is 0, or its square or the factor is not finite. Similarity is the cosine of x; NaN is the
    lowest. The candidates with the lowest max(1 - similarity, 0) * cost_scale are pruned. Of equal
    targets the lower position is chosen, of equal candidates the higher position is pruned. Tokens
    are not merged into the first num_prefix.

    Args:
        x: (B, N, D).
        target_idx, candidate_idx: (B, T) and (B, C), ascending as from `select`, T + C = N.
        sizes: (B, N) float32, positive: how many tokens each token stands for.
        num_keep: in [T, T + C].
        cost_scale: (B, N) float32, positive: a factor on the cost of pruning each token; 1 if None.

    Returns:
        kept_sizes (B, K) is float32. Gradient for x, through means and norms; the choice has none.
    """
    return Merged(
        *torch.ops.cropr.merge(
            x, target_idx, candidate_idx, sizes, num_keep, num_prefix, cost_scale
        )
    )


def parent_offsets(
    x: Tensor, kept_idx: Tensor, pruned_idx: Tensor, num_prefix: int = 0
) -> tuple[Tensor, Tensor]:
    """Find the parent of every pruned token, the most similar kept token, and the offset from it.

        offset[r] = x[pruned_idx[r]] - x[parent_idx[r]]

    Restoring a pruned token as parent + offset later adds the change of its parent. Similarity is
    the cosine; NaN is the lowest. Of equal tokens the lower position is the parent. The first
    num_prefix are not parents.

    Args:
        x: (B, N, D).
        kept_idx, pruned_idx: (B, K) and (B, R), ascending as from `select`; K + R may be less than
            N.
        num_prefix: in [0, K]; less than K if R > 0.

    Returns:
        offset (B, R, D), and parent_idx (B, R), positions in x. Gradient for x, through the
        offsets; the choice has none.
    """
    return torch.ops.cropr.parent_offsets(x, kept_idx, pruned_idx, num_prefix)


def add_parents(x: Tensor, parent: Tensor) -> Tensor:
    """Add to each token all its ancestors: the inverse of `parent_offsets_`.

        out[n] = x[n] + x[parent[n]] + x[parent[parent[n]]] + ...

    Args:
        x: (B, N, D); offsets from the parent for pruned tokens.
        parent: (B, N) int64 in [0, N): the position of the parent. Paths end at tokens that are
            their own parents.

    Returns:
        (B, N, D), rounded once; rows of tokens without a parent are exact copies. Gradient for x.
    """
    return torch.ops.cropr.add_parents(x, parent)


def gather_norm(
    x: Tensor,
    idx: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool = False,
) -> Tensor:
    """LayerNorm of the rows at idx, (B, K, D), with rms their RMSNorm; weight and bias are (D,) or
    None."""
    return torch.ops.cropr.gather_norm(x, idx, weight, bias, eps, rms)


def add_(x: Tensor, idx: Tensor | None, update: Tensor, gamma: Tensor | None) -> None:
    """x[b, idx[b, i]] += gamma * update[b, i], in place, rounded once.

    Args:
        update: (B, K, D).
        gamma: (D,), the scale of LayerScale, or None.
    """
    torch.ops.cropr.add_(x, idx, update, gamma)


def add_norm_(
    x: Tensor,
    idx: Tensor | None,
    update: Tensor,
    gamma: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool = False,
) -> Tensor:
    """`add_`, then `gather_norm` of the rows it wrote: (B, K, D)."""
    return torch.ops.cropr.add_norm_(x, idx, update, gamma, weight, bias, eps, rms)


def add_select_(
    x: Tensor,
    idx: Tensor | None,
    update: Tensor,
    gamma: Tensor | None,
    query: Tensor,
    num_keep: int,
    num_prefix: int = 0,
    sizes: Tensor | None = None,
    size_weight: float = 0.0,
    priority: Tensor | None = None,
    cost_scale: Tensor | None = None,
    cost_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`add_`, then `select` by the scores of the rows it wrote.

    With sizes (B, N) float32, by position in x, the scores are size-adjusted: scores + size_weight
    * their standard deviation over the patches * log(sizes). Tokens that stand for many are then
    pruned later.

    cost_scale (B, N) float32, contiguous, receives at the position of every active patch its scale
    for `merge_`:

        exp(cost_weight * (adjusted score - mean) / standard deviation)

    Mean and deviation are those of the scores over the patches before the adjustment. Without a
    finite deviation the scales are 1; exponents are limited to 60.

    Returns:
        Positions in x kept (B, num_keep) and pruned (B, K - num_keep), ascending.
    """
    return torch.ops.cropr.add_select_(
        x,
        idx,
        update,
        gamma,
        query,
        num_keep,
        num_prefix,
        sizes,
        size_weight,
        priority,
        cost_scale,
        cost_weight,
    )


def merge_(
    x: Tensor,
    target_idx: Tensor,
    candidate_idx: Tensor,
    sizes: Tensor,
    parent: Tensor,
    num_keep: int,
    num_prefix: int = 0,
    offsets: bool = False,
    cost_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`merge` in place, in the kept rows of x; other rows do not change.

    Args:
        target_idx, candidate_idx: (B, T) and (B, C), ascending; T + C may be less than N.
        sizes: (B, N) float32, contiguous; those of kept tokens change.
        parent: (B, N) int64, contiguous; receives for each pruned token the position it is merged
            into.
        offsets: pruned rows become their offset from the row they are merged into, for
            `add_parents`.
        cost_scale: as in `merge`, by position in x.

    Returns:
        Positions kept and pruned, ascending, and the sizes (B, K) of the kept tokens.
    """
    return torch.ops.cropr.merge_(
        x, target_idx, candidate_idx, sizes, parent, num_keep, num_prefix, offsets, cost_scale
    )


def parent_offsets_(
    x: Tensor, kept_idx: Tensor, pruned_idx: Tensor, parent: Tensor, num_prefix: int = 0
) -> None:
    """`parent_offsets` in place: pruned rows of x become their offsets.

    parent (B, N), contiguous, receives parent_idx at the pruned positions.
    """
    torch.ops.cropr.parent_offsets_(x, kept_idx, pruned_idx, parent, num_prefix)


def rotate_(
    x: Tensor, table: Tensor, idx: Tensor | None, num_prefix: int = 0, half: bool = False
) -> None:
    """Rotary positions, in place, on queries or keys; the first num_prefix tokens have none.

    Args:
        x: (B, K, H, C), C even, with a stride of 1 in the last dimension.
        table: (patches, 2 C), sines then cosines. Token i of image b is patch idx[b, i] -
            num_prefix.
        idx: (B, K); None: i itself.
        half: channels pair up as (0, C / 2), (1, C / 2 + 1), ..., in place of (0, 1), (2, 3), ...
    """
    torch.ops.cropr.rotate_(x, table, idx, num_prefix, half)
