"""The engine's ops where each image has as many active tokens as it needs, as typed functions.

x (B, N, D) is the residual buffer. rows (T,) int64 holds the active rows of x.view(B * N, D), image
after image and ascending; image b has rows[starts[b] : starts[b + 1]], K_b of them, of which the
first P = num_prefix are its tokens 0 to P - 1. starts (B + 1,) int64 begins with 0 and ends with T.

Selection splits the rows of an image into targets and C_b = min(num_candidates, (K_b - P) // 2)
candidates. order (T,) holds those of each image: its targets, then its candidates, both ascending.
Errors, dtypes and the checks of rows are those of `functional`. `gather_norm`, `add_` and
`add_norm_` take x.view(1, B * N, D) and rows.view(1, T).
"""

import torch
from torch import Tensor


def ragged_add_select_(
    x: Tensor,
    rows: Tensor,
    starts: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    query: Tensor,
    num_candidates: int,
    num_prefix: int = 0,
    sizes: Tensor | None = None,
    size_weight: float = 0.0,
    priority: Tensor | None = None,
    cost_scale: Tensor | None = None,
    cost_weight: float = 0.0,
) -> Tensor:
    """`add_select_` of each image, with num_keep = K_b - C_b.

    Args:
        update: (T, D).
        num_candidates: in [0, N].
        sizes, priority, cost_scale: (B, N), by position, as in `add_select_`.

    Returns:
        order (T,).
    """
    return torch.ops.cropr.ragged_add_select_(
        x,
        rows,
        starts,
        update,
        gamma,
        query,
        num_candidates,
        num_prefix,
        sizes,
        size_weight,
        priority,
        cost_scale,
        cost_weight,
    )


def ragged_nearest(
    x: Tensor,
    order: Tensor,
    starts: Tensor,
    num_candidates: int,
    num_prefix: int = 0,
    cost_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the nearest target of each candidate, and the cost of merging into it, as `merge_`
    does.

    Args:
        cost_scale: (B, N) float32, by position: a factor on costs; 1 if None.

    Returns:
        costs (B, num_candidates), max(1 - cosine, 0) * cost_scale, float32 (float64 for float64
        tokens), and nearest (B, num_candidates) int64, rows of x.view(B * N, D). NaN costs
        infinity; past C_b costs are infinity and nearest is -1. No gradient.
    """
    return torch.ops.cropr.ragged_nearest(x, order, starts, num_candidates, num_prefix, cost_scale)


def ragged_merge_(
    x: Tensor,
    order: Tensor,
    starts: Tensor,
    prune: Tensor,
    nearest: Tensor,
    sizes: Tensor,
    parent: Tensor,
    num_kept: int,
    num_prefix: int = 0,
    offsets: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`merge_` of a given choice: each candidate i of image b with prune[b, i] into nearest[b, i].

    Args:
        prune: (B, num_candidates) bool, false past C_b.
        nearest: (B, num_candidates), from `ragged_nearest`.
        sizes, parent: (B, N), contiguous, as in `merge_`; parent receives positions in the image.
        num_kept: T - prune.sum(), so that shapes do not depend on the data. Checked on a CPU; on
            CUDA no row past it is written, and rows that are missing up to it are -1.
        offsets: as in `merge_`.

    Returns:
        rows (num_kept,), starts (B + 1,) and the sizes (num_kept,) of the rows that are left.
    """
    return torch.ops.cropr.ragged_merge_(
        x, order, starts, prune, nearest, sizes, parent, num_kept, num_prefix, offsets
    )
