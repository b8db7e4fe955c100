"""The ops as typed functions. Each calls ``torch.ops.cropr.<name>`` and nothing else.

B images, N tokens, K kept, R = N - K pruned, D channels, M queries; the first P = num_prefix tokens (class token,
registers) are never pruned. Tensors are float32, float64, bfloat16 or float16 unless said otherwise, of any strides;
positions are int64. Sums run in float32, in float64 for float64 tokens. Same input, same bits, on every run.

Functions whose names end in _, and gather_norm, are those of the engine: x (B, N, D) is the residual buffer,
contiguous, changed in place and without gradient; idx (B, K) are the positions of the active tokens, none twice (None:
all).

Every function raises RuntimeError in one sentence that names the op, the argument, what was allowed and what came. On
a CPU positions are checked as well; on CUDA one that does not exist reads and writes nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Tokens in two parts. kept (B, K, D) at kept_idx (B, K), pruned (B, R, D) at pruned_idx (B, R), both ascending."""

    kept: Tensor
    kept_idx: Tensor
    pruned: Tensor
    pruned_idx: Tensor


class Merged(NamedTuple):
    """Tokens after a merge. dest (B, N): the row of kept (B, K, D) in which each token now is."""

    kept: Tensor
    kept_idx: Tensor
    pruned_idx: Tensor
    kept_sizes: Tensor
    dest: Tensor


def scores(x: Tensor, query: Tensor) -> Tensor:
    """Score every token by its product with the sum of the queries (paper, section 3.1): x . sum_m query_m.

    Args:
        x: (B, N, D).
        query: (D,) or (M, D), of any dtype.

    Returns:
        (B, N) float32, unscaled, without softmax. No gradient: stop-gradient is the op's own.
    """
    return torch.ops.cropr.scores(x, query)


def select(scores: Tensor, num_keep: int, num_prefix: int = 0, priority: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose the num_keep tokens with the highest scores, the first num_prefix among them whatever they score.

    Exact: of equal scores the lower position is kept, NaN ranks highest, -0.0 equals +0.0.

    Args:
        scores: (B, N).
        num_keep: in [num_prefix, N].
        priority: (B, N), int8 or bool. Positive tokens are kept before all others, negative ones pruned before all
            others, of these the higher positions first.

    Returns:
        Positions kept (B, K) and pruned (B, R), int64, ascending. No gradient.
    """
    return torch.ops.cropr.select(scores, num_keep, num_prefix, priority)


def prune(x: Tensor, query: Tensor, num_keep: int, num_prefix: int = 0, priority: Tensor | None = None) -> Split:
    """Score, select and take the rows apart in one op; `restore` is its inverse.

    Args:
        x: (B, N, D).
        query: (D,) or (M, D), of any dtype.
        num_keep, num_prefix, priority: as in `select`.

    Returns:
        Bit-exact copies of the rows, with their positions. Gradient for x, through the rows; none for query.
    """
    return Split(*torch.ops.cropr.prune(x, query, num_keep, num_prefix, priority))


def split(x: Tensor, scores: Tensor, num_keep: int, num_prefix: int = 0, priority: Tensor | None = None) -> Split:
    """`prune` by scores (B, N), float32, that are known already."""
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
    """Cross-attention with keys = values = x and one head of width D: softmax(scale * queries x^T) x.

    The aggregator of training (paper, section 3.1). Nothing of shape (B, M, N) is saved for backward.

    Args:
        x: (B, N, D), N >= 1; read as detached.
        queries: (M, D), of any dtype.

    Returns:
        (B, M, D). Gradient for queries only.
    """
    return torch.ops.cropr.attend(x, queries, scale)


def attend_scores(x: Tensor, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`attend`, and `scores` of the same tokens: training then prunes with `split` and reads x no second time."""
    return torch.ops.cropr.attend_scores(x, queries, scale)


def merge(
    x: Tensor,
    safe_idx: Tensor,
    candidate_idx: Tensor,
    sizes: Tensor,
    num_keep: int,
    num_prefix: int = 0,
    costs: Tensor | None = None,
) -> Merged:
    """Prune the candidates most like a safe token, and merge each into it: a mean that sizes weight, of its norm.

        mean[k] = (sizes[k] x[k] + sum_r sizes[r] x[r]) / (sizes[k] + sum_r sizes[r]), over all r merged into k
        kept[k] = mean[k] |x[k]| / |mean[k]|

    Rows that none is merged into do not change. The factor is 1 where |mean| is 0, or its square or the factor is not
    finite. Similarity is the cosine of x; NaN is the lowest. Pruned are the candidates with the lowest
    max(1 - similarity, 0) * cost. Of equal safe tokens the lower position is the target, of equal candidates the higher
    position is pruned. The first num_prefix are no targets.

    Args:
        x: (B, N, D).
        safe_idx, candidate_idx: (B, S) and (B, C), ascending as from `select`, S + C = N.
        sizes: (B, N) float32, positive: how many tokens each token stands for.
        num_keep: in [S, S + C].
        costs: (B, N) float32, positive: how much a token is worth; one if None.

    Returns:
        kept_sizes (B, K) is float32. Gradient for x, through means and norms; the choice has none.
    """
    return Merged(*torch.ops.cropr.merge(x, safe_idx, candidate_idx, sizes, num_keep, num_prefix, costs))


def host_offsets(x: Tensor, kept_idx: Tensor, pruned_idx: Tensor, num_prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Find the host of every pruned token, the kept token it is most like, and how far it is from it.

        offset[r] = x[pruned_idx[r]] - x[host_idx[r]]

    A pruned token that is restored with what its host became, host + offset, lives through what its host does.
    Similarity is the cosine; NaN is the lowest. Of equal tokens the lower position is the host. The first num_prefix
    are none.

    Args:
        x: (B, N, D).
        kept_idx, pruned_idx: (B, K) and (B, R), ascending as from `select`; K + R may be less than N.
        num_prefix: in [0, K]; less than K where R > 0.

    Returns:
        Offsets (B, R, D), and positions of the hosts in x (B, R). Gradient for x, through the offsets; the choice has
        none.
    """
    return torch.ops.cropr.host_offsets(x, kept_idx, pruned_idx, num_prefix)


def add_hosts(x: Tensor, parent: Tensor) -> Tensor:
    """Add up each token, its host, the host of that, and so on: tokens from offsets.

        out[n] = x[n] + x[parent[n]] + x[parent[parent[n]]] + ..., up to the token that is its own parent

    Args:
        x: (B, N, D); offsets from the host where a token was pruned.
        parent: (B, N) int64 in [0, N): where the host is; its own position for a token that has none.

    Returns:
        (B, N, D), rounded once; rows of tokens without a host are exact copies. Gradient for x.
    """
    return torch.ops.cropr.add_hosts(x, parent)


def gather_norm(x: Tensor, idx: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of the rows at idx, (B, K, D); weight and bias are (D,) or None."""
    return torch.ops.cropr.gather_norm(x, idx, weight, bias, eps)


def add_(x: Tensor, idx: Tensor | None, update: Tensor, gamma: Tensor | None) -> None:
    """x[b, idx[b, i]] += gamma * update[b, i], in place, rounded once.

    Args:
        update: (B, K, D).
        gamma: (D,), that of LayerScale, or None.
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
) -> Tensor:
    """`add_`, then `gather_norm` of the rows it wrote: (B, K, D)."""
    return torch.ops.cropr.add_norm_(x, idx, update, gamma, weight, bias, eps)


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
    costs: Tensor | None = None,
    cost_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`add_`, then `select` by the scores of the rows it wrote.

    With sizes (B, N) float32, by position in x, the scores are size-adjusted: scores + size_weight * their standard
    deviation over the patches * log(sizes). What stands for many tokens is then pruned later.

    costs (B, N) float32, contiguous, receives at the position of every active patch what it costs `merge_` to prune it:

        exp(cost_weight * (adjusted score - mean) / standard deviation)

    Mean and deviation are those of the scores over the patches before sizes count. Where there is no deviation, or no
    finite one, costs are one; no exponent is beyond 60.

    Returns:
        Positions in x kept (B, num_keep) and pruned (B, K - num_keep), ascending.
    """
    return torch.ops.cropr.add_select_(
        x, idx, update, gamma, query, num_keep, num_prefix, sizes, size_weight, priority, costs, cost_weight
    )


def merge_(
    x: Tensor,
    safe_idx: Tensor,
    candidate_idx: Tensor,
    sizes: Tensor,
    parent: Tensor,
    num_keep: int,
    num_prefix: int = 0,
    offsets: bool = False,
    costs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`merge` in place, in the kept rows of x. Rows in neither list, and pruned rows, do not change.

    Args:
        safe_idx, candidate_idx: (B, S) and (B, C), ascending; S + C may be less than N.
        sizes: (B, N) float32, contiguous; those of kept tokens change.
        parent: (B, N) int64, contiguous; receives for each pruned token the position it is merged into.
        offsets: pruned rows become their offset from the row they are merged into, for `add_hosts`.
        costs: as in `merge`, by position in x.

    Returns:
        Positions kept and pruned, ascending, and the sizes (B, K) of the kept tokens.
    """
    return torch.ops.cropr.merge_(x, safe_idx, candidate_idx, sizes, parent, num_keep, num_prefix, offsets, costs)


def host_offsets_(x: Tensor, kept_idx: Tensor, pruned_idx: Tensor, parent: Tensor, num_prefix: int = 0) -> None:
    """`host_offsets` in place: pruned rows of x become their offsets; parent (B, N), contiguous, receives the hosts."""
    torch.ops.cropr.host_offsets_(x, kept_idx, pruned_idx, parent, num_prefix)


def rotate_(x: Tensor, table: Tensor, idx: Tensor | None, num_prefix: int = 0, half: bool = False) -> None:
    """Rotary positions, in place, on queries or keys; the first num_prefix tokens have none.

    Args:
        x: (B, K, H, C), C even, with a stride of 1 in the last dimension.
        table: (patches, 2 C), sines then cosines. Token i of image b is patch idx[b, i] - num_prefix.
        idx: (B, K); None: i itself.
        half: channels pair up as (0, C / 2), (1, C / 2 + 1), ..., in place of (0, 1), (2, 3), ...
    """
    torch.ops.cropr.rotate_(x, table, idx, num_prefix, half)
