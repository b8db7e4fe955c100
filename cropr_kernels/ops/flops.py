"""FLOP formulas for torch.utils.flop_counter: they take shapes, and count a multiply-add as two."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

_Shape = torch.Size


def no_flops(*_: object, **__: object) -> int:
    """Count nothing: selection, copies and normalization."""
    return 0


def _scores(x: _Shape, *_: object, **__: object) -> int:
    return 2 * math.prod(x)


def _add_select(x: _Shape, idx: _Shape | None, update: _Shape, *_: object, **__: object) -> int:
    return _scores(update)


def _similarities(x: _Shape, targets: _Shape, candidates: _Shape, *_: object, **__: object) -> int:
    return 2 * x[0] * targets[1] * candidates[1] * x[2]


def _ragged_add_select(
    x: _Shape, rows: _Shape, starts: _Shape, update: _Shape, *_: object, **__: object
) -> int:
    return _scores(update)


def _ragged_similarities(
    x: _Shape, order: _Shape, starts: _Shape, num_candidates: int, *_: object, **__: object
) -> int:
    """Those of images with equally many tokens."""
    count = min(num_candidates, order[0] // (2 * max(x[0], 1)))
    return 2 * count * (order[0] - x[0] * count) * x[2]


def _attend(x: _Shape, queries: _Shape, *_: object, **__: object) -> int:
    return 4 * math.prod(x) * queries[0]  # logits and weighted sum


def _attend_backward(grad_out: _Shape, x: _Shape, queries: _Shape, *_: object, **__: object) -> int:
    return 6 * math.prod(x) * queries[0]  # logits, and gradients of logits and queries


def _attend_segments(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, *_: object, **__: object
) -> int:
    """Count logits and weighted sums from tensors: exact if starts can be read without waiting for
    a GPU, else as if every image had `longest` tokens."""
    num_tokens, heads, width = q.shape
    num_pairs = num_tokens * longest
    if type(starts) is Tensor and starts.device.type == "cpu":
        num_pairs = int(starts.diff().square().sum())
    return 4 * num_pairs * heads * width


FLOPS: dict[str, Callable[..., int]] = {
    "scores": _scores,
    "prune": _scores,
    "add_select_": _add_select,
    "merge": _similarities,
    "merge_": _similarities,
    "parent_offsets": _similarities,
    "parent_offsets_": _similarities,
    "ragged_add_select_": _ragged_add_select,
    "ragged_nearest": _ragged_similarities,
    "attend": _attend,
    "attend_scores": _attend,
    "attend_backward": _attend_backward,
    "attend_segments": _attend_segments,
}
TAKES_TENSORS = ("attend_segments",)  # not shapes
