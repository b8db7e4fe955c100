"""What each op accepts. Shared by the fake and the CUDA kernels; csrc/ states the same for the CPU kernels."""

from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _fail(message: str) -> NoReturn:
    raise RuntimeError(message)


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def floating(op: str, name: str, t: Tensor) -> None:
    if t.dtype not in FLOATS:
        _fail(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {_dtype(t)}")


def rank(op: str, name: str, t: Tensor, ndim: int, shape: str) -> None:
    if t.ndim != ndim:
        _fail(f"{op}: {name} must have shape {shape}, got {_shape(t)}")


def index(op: str, name: str, t: Tensor) -> None:
    if t.dtype != torch.int64:
        _fail(f"{op}: {name} must be int64, got {_dtype(t)}")


def same_device(op: str, name: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        _fail(f"{op}: {name} must be on the same device as the other tensors, {device}, got {t.device}")


def counts(op: str, n: int, num_keep: int, num_prefix: int) -> None:
    if not 0 <= num_prefix <= n:
        _fail(f"{op}: num_prefix must be in [0, N] = [0, {n}], got {num_prefix}")
    if not num_prefix <= num_keep <= n:
        _fail(f"{op}: num_keep must be in [num_prefix, N] = [{num_prefix}, {n}], got {num_keep}")


def priority(op: str, priority: Tensor | None, like: Tensor, batch: int, n: int) -> None:
    """Who stays and who leaves before the scores are asked."""
    if priority is None:
        return
    same_device(op, "priority", priority, like.device)
    if priority.dtype not in (torch.int8, torch.bool):
        _fail(f"{op}: priority must be int8 or bool, got {_dtype(priority)}")
    if tuple(priority.shape) != (batch, n):
        _fail(f"{op}: priority must have shape (B, N) = ({batch}, {n}), got {_shape(priority)}")


def tokens_and_query(op: str, x: Tensor, query: Tensor) -> None:
    same_device(op, "query", query, x.device)
    rank(op, "x", x, 3, "(B, N, D)")
    floating(op, "x", x)
    if query.ndim not in (1, 2):
        _fail(f"{op}: query must have shape (D,) or (M, D), got {_shape(query)}")
    floating(op, "query", query)
    if query.shape[-1] != x.shape[2]:
        _fail(f"{op}: query must have the width of x, D = {x.shape[2]}, got shape {_shape(query)}")


def prune(x: Tensor, query: Tensor, num_keep: int, num_prefix: int, priority_: Tensor | None) -> None:
    tokens_and_query("prune", x, query)
    counts("prune", x.shape[1], num_keep, num_prefix)
    priority("prune", priority_, x, *x.shape[:2])


def split(x: Tensor, scores: Tensor, num_keep: int, num_prefix: int, priority_: Tensor | None) -> None:
    same_device("split", "scores", scores, x.device)
    rank("split", "x", x, 3, "(B, N, D)")
    floating("split", "x", x)
    if scores.dtype != torch.float32:
        _fail(f"split: scores must be float32, got {_dtype(scores)}")
    if scores.shape != x.shape[:2]:
        _fail(f"split: scores must have shape (B, N) = {tuple(x.shape[:2])}, got {_shape(scores)}")
    counts("split", x.shape[1], num_keep, num_prefix)
    priority("split", priority_, x, *x.shape[:2])


def select(scores: Tensor, num_keep: int, num_prefix: int, priority_: Tensor | None) -> None:
    rank("select", "scores", scores, 2, "(B, N)")
    floating("select", "scores", scores)
    counts("select", scores.shape[1], num_keep, num_prefix)
    priority("select", priority_, scores, *scores.shape)


def gather(x: Tensor, idx: Tensor) -> None:
    same_device("gather", "idx", idx, x.device)
    rank("gather", "x", x, 3, "(B, N, D)")
    floating("gather", "x", x)
    rank("gather", "idx", idx, 2, "(B, K)")
    index("gather", "idx", idx)
    if idx.shape[0] != x.shape[0]:
        _fail(f"gather: idx must have the batch size of x, B = {x.shape[0]}, got shape {_shape(idx)}")


def restore(kept: Tensor, kept_idx: Tensor, pruned: Tensor, pruned_idx: Tensor) -> None:
    for name, part, idx in (("kept", kept, kept_idx), ("pruned", pruned, pruned_idx)):
        same_device("restore", name, part, kept.device)
        same_device("restore", f"{name}_idx", idx, kept.device)
        rank("restore", name, part, 3, "(B, tokens, D)")
        floating("restore", name, part)
        rank("restore", f"{name}_idx", idx, 2, "(B, tokens)")
        index("restore", f"{name}_idx", idx)
        if idx.shape != part.shape[:2]:
            _fail(f"restore: {name}_idx must have the first two sizes of {name}, {_shape(part)}, got {_shape(idx)}")
        if part.shape[0] != kept.shape[0] or part.shape[2] != kept.shape[2]:
            _fail(f"restore: {name} must have the batch and width of kept, {_shape(kept)}, got {_shape(part)}")
        if part.dtype != kept.dtype:
            _fail(f"restore: {name} must have the dtype of kept, {_dtype(kept)}, got {_dtype(part)}")


def _positions(op: str, name: str, shape: str, x: Tensor, idx: Tensor) -> None:
    same_device(op, name, idx, x.device)
    rank(op, name, idx, 2, shape)
    index(op, name, idx)
    if idx.shape[0] != x.shape[0]:
        _fail(f"{op}: {name} must have the batch size of x, B = {x.shape[0]}, got shape {_shape(idx)}")


def sizes(op: str, x: Tensor, sizes: Tensor) -> None:
    """How many tokens each token of x stands for."""
    same_device(op, "sizes", sizes, x.device)
    if sizes.dtype != torch.float32:
        _fail(f"{op}: sizes must be float32, got {_dtype(sizes)}")
    if sizes.shape != x.shape[:2]:
        _fail(f"{op}: sizes must have shape (B, N) = {tuple(x.shape[:2])}, got {_shape(sizes)}")


def _merge(
    op: str,
    x: Tensor,
    safe_idx: Tensor,
    candidate_idx: Tensor,
    sizes_: Tensor,
    num_keep: int,
    features: Tensor | None,
    num_prefix: int,
) -> None:
    rank(op, "x", x, 3, "(B, N, D)")
    floating(op, "x", x)
    _positions(op, "safe_idx", "(B, S)", x, safe_idx)
    _positions(op, "candidate_idx", "(B, C)", x, candidate_idx)
    safe = safe_idx.shape[1]
    total = safe + candidate_idx.shape[1]
    if not 0 <= num_prefix <= safe:
        _fail(f"{op}: num_prefix must be in [0, S] = [0, {safe}], got {num_prefix}")
    if not safe <= num_keep <= total:
        _fail(f"{op}: num_keep must be in [S, S + C] = [{safe}, {total}], got {num_keep}")
    if num_keep < total and safe == num_prefix:
        _fail(f"{op}: safe_idx must hold a token behind the prefix to merge into, got S = num_prefix = {safe}")
    sizes(op, x, sizes_)
    if features is None:
        return
    same_device(op, "features", features, x.device)
    rank(op, "features", features, 3, "(B, N, C)")
    floating(op, "features", features)
    if features.shape[:2] != x.shape[:2]:
        _fail(f"{op}: features must have the batch and tokens of x, {tuple(x.shape[:2])}, got {_shape(features)}")


def merge(
    x: Tensor,
    safe_idx: Tensor,
    candidate_idx: Tensor,
    sizes: Tensor,
    num_keep: int,
    features: Tensor | None,
    num_prefix: int,
) -> None:
    _merge("merge", x, safe_idx, candidate_idx, sizes, num_keep, features, num_prefix)
    n, safe, candidates = x.shape[1], safe_idx.shape[1], candidate_idx.shape[1]
    if safe + candidates != n:
        _fail(f"merge: safe_idx and candidate_idx must together hold N = {n} positions, got {safe} + {candidates}")


def merge_in_place(
    x: Tensor,
    safe_idx: Tensor,
    candidate_idx: Tensor,
    sizes: Tensor,
    parent: Tensor,
    num_keep: int,
    num_prefix: int,
) -> None:
    op = "merge_"
    _merge(op, x, safe_idx, candidate_idx, sizes, num_keep, None, num_prefix)
    for name, tensor in (("x", x), ("sizes", sizes)):
        if not tensor.is_contiguous():
            _fail(f"{op}: {name} must be contiguous, as it changes in place, got strides {tuple(tensor.stride())}")
    same_device(op, "parent", parent, x.device)
    if parent.dtype != torch.int64 or parent.shape != x.shape[:2] or not parent.is_contiguous():
        expected = tuple(x.shape[:2])
        _fail(
            f"{op}: parent must be contiguous int64 of shape (B, N) = {expected}, got {_dtype(parent)} {_shape(parent)}"
        )


def attend(op: str, x: Tensor, queries: Tensor) -> None:
    same_device(op, "queries", queries, x.device)
    rank(op, "x", x, 3, "(B, N, D)")
    floating(op, "x", x)
    rank(op, "queries", queries, 2, "(M, D)")
    floating(op, "queries", queries)
    if queries.shape[1] != x.shape[2]:
        _fail(f"{op}: queries must have the width of x, D = {x.shape[2]}, got shape {_shape(queries)}")
    if x.shape[1] == 0:
        _fail(f"{op}: x must have at least one token, got shape {_shape(x)}")


def attend_backward(grad_out: Tensor, x: Tensor, queries: Tensor) -> None:
    attend("attend_backward", x, queries)
    same_device("attend_backward", "grad_out", grad_out, x.device)
    rank("attend_backward", "grad_out", grad_out, 3, "(B, M, D)")
    floating("attend_backward", "grad_out", grad_out)
    expected = (x.shape[0], queries.shape[0], x.shape[2])
    if tuple(grad_out.shape) != expected:
        _fail(f"attend_backward: grad_out must have shape (B, M, D) = {expected}, got {_shape(grad_out)}")


def stream(op: str, x: Tensor, idx: Tensor | None, *, in_place: bool) -> tuple[int, int, int]:
    """The residual stream and the tokens alive in it: (B, K, D)."""
    rank(op, "x", x, 3, "(B, N, D)")
    floating(op, "x", x)
    if in_place and not x.is_contiguous():
        _fail(f"{op}: x must be contiguous, as it changes in place, got strides {tuple(x.stride())}")
    if idx is None:
        return x.shape[0], x.shape[1], x.shape[2]
    same_device(op, "idx", idx, x.device)
    rank(op, "idx", idx, 2, "(B, K)")
    index(op, "idx", idx)
    if idx.shape[0] != x.shape[0]:
        _fail(f"{op}: idx must have the batch size of x, B = {x.shape[0]}, got shape {_shape(idx)}")
    return x.shape[0], idx.shape[1], x.shape[2]


def channels(op: str, x: Tensor, **vectors: Tensor | None) -> None:
    """Vectors over the width of x, each of them optional."""
    for name, vector in vectors.items():
        if vector is None:
            continue
        same_device(op, name, vector, x.device)
        floating(op, name, vector)
        if tuple(vector.shape) != (x.shape[-1],):
            _fail(f"{op}: {name} must have shape (D,) = ({x.shape[-1]},), got {_shape(vector)}")


def update(op: str, x: Tensor, idx: Tensor | None, update: Tensor, gamma: Tensor | None) -> None:
    expected = stream(op, x, idx, in_place=True)
    same_device(op, "update", update, x.device)
    floating(op, "update", update)
    if tuple(update.shape) != expected:
        _fail(f"{op}: update must have shape (B, K, D) = {expected}, got {_shape(update)}")
    channels(op, x, gamma=gamma)


def add_select(
    x: Tensor,
    idx: Tensor | None,
    update_: Tensor,
    gamma: Tensor | None,
    query: Tensor,
    num_keep: int,
    num_prefix: int,
    sizes_: Tensor | None,
    priority_: Tensor | None,
) -> None:
    op = "add_select_"
    update(op, x, idx, update_, gamma)
    tokens_and_query(op, x, query)
    counts(op, update_.shape[1], num_keep, num_prefix)
    if sizes_ is not None:
        sizes(op, x, sizes_)
    priority(op, priority_, x, *x.shape[:2])


def rotate(x: Tensor, table: Tensor, idx: Tensor | None, num_prefix: int) -> None:
    op = "rotate_"
    rank(op, "x", x, 4, "(B, K, H, C)")
    floating(op, "x", x)
    batch, count, _, width = x.shape
    if width % 2:
        _fail(f"{op}: x must have an even number of channels, got {width}")
    if width > 1 and x.stride(-1) != 1:
        _fail(f"{op}: x must have a stride of 1 in the last dimension, as it changes in place")
    same_device(op, "table", table, x.device)
    floating(op, "table", table)
    if table.ndim != 2 or table.shape[1] != 2 * width:
        _fail(f"{op}: table must have shape (patches, 2 C) = (patches, {2 * width}), got {_shape(table)}")
    if not 0 <= num_prefix <= count:
        _fail(f"{op}: num_prefix must be in [0, K] = [0, {count}], got {num_prefix}")
    if idx is None:
        if table.shape[0] < count - num_prefix:
            _fail(f"{op}: table must have a row for each of the {count - num_prefix} patches, got {table.shape[0]}")
        return
    same_device(op, "idx", idx, x.device)
    index(op, "idx", idx)
    if tuple(idx.shape) != (batch, count):
        _fail(f"{op}: idx must have shape (B, K) = ({batch}, {count}), got {_shape(idx)}")
