"""Groups of s x s rows of a tower, which its merger or projector makes one token: the unit that is
pruned or merged."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.blocks import SizeWeightedAttention, is_attention_softmax
from ..ops.score_weights import cost_scales, size_adjusted_scores
from ..pruning.merging import COST_WEIGHT, Merge, log_sizes
from .choice import choose_highest

ops = torch.ops.cropr


class Reduced(NamedTuple):
    """The groups that are kept of one image."""

    rows: Tensor  # (K, S, D)
    idx: Tensor  # (K,), ascending
    sizes: Tensor | None  # (K,) float32, groups that each stands for


def drop_groups(groups: Tensor, count: int, query: Tensor | None) -> Reduced:
    """Keep `count` of the groups (G, S, D) by the mean score of their rows."""
    kept = choose_highest(groups.detach().float().mean(1), count, query)
    return Reduced(groups[kept], kept, None)


def merge_groups(
    groups: Tensor,
    count: int,
    query: Tensor | None,
    sizes: Tensor,
    merge: Merge,
    priority: Tensor,
) -> Reduced:
    """Merge groups into the `count` kept ones that they are most like, by the cosine of their rows
    in order: row i of a group into row i of another.

    Args:
        groups: (G, S, D).
        count: K.
        query: (D,), scores by the mean row; None: evenly spaced groups are targets.
        sizes: (G,) float32.
        merge: as in `apply`.
        priority: (G,) int8, the color that is kept first.
    """
    num_targets = merge.num_targets(len(groups), count, 0)
    means = groups.detach().float().mean(1)
    cost_scale = None
    if query is None:
        targets = choose_highest(means, num_targets, None)
        is_target = torch.zeros(len(groups), dtype=torch.bool, device=groups.device)
        candidates = (~is_target.index_fill(0, targets, True)).nonzero().squeeze(1)
        targets, candidates = targets.unsqueeze(0), candidates.unsqueeze(0)
    else:
        scores = (means @ query.to(means)).unsqueeze(0)
        adjusted = size_adjusted_scores(scores, sizes.unsqueeze(0), merge.size_weight)
        targets, candidates = ops.select(adjusted, num_targets, 0, priority.unsqueeze(0))
        cost_scale = cost_scales(scores, adjusted, COST_WEIGHT)
    kept, kept_idx, _, kept_sizes, _ = ops.merge(
        groups.flatten(1).unsqueeze(0),
        targets,
        candidates,
        sizes.unsqueeze(0),
        count,
        cost_scale=cost_scale,
    )
    return Reduced(kept[0].unflatten(1, groups.shape[1:]), kept_idx[0], kept_sizes[0])


class SegmentSizes(SizeWeightedAttention):
    """A mode in which the attention of one segment after another weighs its rows by their sizes.

    Args:
        sizes: (B, rows) float32.
        lengths: of the segments.
    """

    def __init__(self, sizes: Tensor, lengths: Sequence[int]) -> None:
        super().__init__(None)
        self.segment_log_sizes = log_sizes(sizes).split(list(lengths), 1)
        self.num_calls = 0

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        if func is F.scaled_dot_product_attention or is_attention_softmax(func, args):
            last = len(self.segment_log_sizes) - 1
            self.log_sizes = self.segment_log_sizes[min(self.num_calls, last)]
            self.num_calls += 1
        return super().__torch_function__(func, types, args, kwargs)

    def require_all(self, name: str) -> None:
        """Raise ValueError unless every segment has attended once."""
        if self.num_calls != len(self.segment_log_sizes):
            raise ValueError(
                f"cropr: merging inside {name} needs attention by scaled_dot_product_attention or "
                f"a softmax, once for each of {len(self.segment_log_sizes)} segments, got "
                f'{self.num_calls} calls; load it with attn_implementation="sdpa" or leave out '
                "merge"
            )


def packed_order(grid: Sequence[int], side: int, window: int | None) -> Tensor:
    """The group, in the order of rows and columns, at each place of a packed image.

    Args:
        grid: 1, and rows and columns of patches.
        side: s.
        window: groups on a side of the windows by which the tower orders groups, if it does.
    """
    height, width = grid[1] // side, grid[2] // side
    cells = torch.arange(height * width)
    if window is None:
        return cells
    windows = cells // width // window * width + cells % width // window
    return windows.argsort(stable=True)


def group_colors(grid: Sequence[int], side: int, order: Tensor) -> Tensor:
    """The color on a checkerboard of each group of an image, (G,) int8 of 0 and 1."""
    width = grid[2] // side
    return ((order // width + order % width) % 2).to(torch.int8)
