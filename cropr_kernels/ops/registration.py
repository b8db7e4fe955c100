"""The ops of namespace ``cropr``: their definition, fake kernels, gradients and FLOP formulas.

The only file that registers anything in Python. Schemas are those of csrc/library.h; CPU kernels register when ``_C``
is imported; CUDA kernels are the Triton launchers of ``ops/triton/``, imported at their first call.

Shapes: B images, N tokens in, K kept, R = N - K pruned, D width, M queries, P prefix tokens.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .extension import NAMES, table
from .validation import check

# The ops whose launchers are in each file of triton/.
FAMILIES = {
    "scores": ("scores",),
    "select": ("select",),
    "prune": ("prune", "split", "gather", "restore"),
    "attend": ("attend", "attend_scores", "attend_backward"),
    "merge": ("merge", "merge_"),
    "residual": ("gather_norm", "add_", "add_norm_", "add_select_", "rotate_"),
}
FILES = {op: file for file, ops in FAMILIES.items() for op in ops}


def _cuda_launcher(name: str, module: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        try:
            kernels = importlib.import_module(f"cropr_kernels.ops.triton.{module}")
        except ImportError as error:
            raise ImportError(f"cropr::{name}: CUDA tensors need triton: pip install triton ({error})") from error
        return getattr(kernels, name)(*args)

    return launch


_library = torch.library.Library("cropr", "DEF")
for _name, _row in zip(NAMES, table):
    _library.define(_row[0], tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _cuda_launcher(_name, FILES[_name]), "CUDA")


# Fake kernels: shapes and dtypes, and the same refusals as the real ones.


@torch.library.register_fake("cropr::scores", lib=_library)
def _(x: Tensor, query: Tensor) -> Tensor:
    check("scores", x, query)
    return x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.register_fake("cropr::select", lib=_library)
def _(scores: Tensor, num_keep: int, num_prefix: int = 0, priority: Tensor | None = None) -> tuple[Tensor, Tensor]:
    check("select", scores, num_keep, num_prefix, priority)
    batch, n = scores.shape
    indices = (scores.new_empty((batch, count), dtype=torch.int64) for count in (num_keep, n - num_keep))
    kept_idx, pruned_idx = indices
    return kept_idx, pruned_idx


@torch.library.register_fake("cropr::prune", lib=_library)
def _(
    x: Tensor, query: Tensor, num_keep: int, num_prefix: int = 0, priority: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check("prune", x, query, num_keep, num_prefix, priority)
    return _fake_split(x, num_keep)


@torch.library.register_fake("cropr::split", lib=_library)
def _(
    x: Tensor, scores: Tensor, num_keep: int, num_prefix: int = 0, priority: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check("split", x, scores, num_keep, num_prefix, priority)
    return _fake_split(x, num_keep)


def _fake_split(x: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, n, dim = x.shape
    return (
        x.new_empty((batch, num_keep, dim)),
        x.new_empty((batch, num_keep), dtype=torch.int64),
        x.new_empty((batch, n - num_keep, dim)),
        x.new_empty((batch, n - num_keep), dtype=torch.int64),
    )


@torch.library.register_fake("cropr::gather", lib=_library)
def _(x: Tensor, idx: Tensor) -> Tensor:
    check("gather", x, idx)
    return x.new_empty((x.shape[0], idx.shape[1], x.shape[2]))


@torch.library.register_fake("cropr::restore", lib=_library)
def _(kept: Tensor, kept_idx: Tensor, pruned: Tensor, pruned_idx: Tensor) -> Tensor:
    check("restore", kept, kept_idx, pruned, pruned_idx)
    return kept.new_empty((kept.shape[0], kept.shape[1] + pruned.shape[1], kept.shape[2]))


@torch.library.register_fake("cropr::attend", lib=_library)
def _(x: Tensor, queries: Tensor, scale: float) -> Tensor:
    check("attend", x, queries, scale)
    return x.new_empty((x.shape[0], queries.shape[0], x.shape[2]))


@torch.library.register_fake("cropr::attend_scores", lib=_library)
def _(x: Tensor, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    check("attend_scores", x, queries, scale)
    out = x.new_empty((x.shape[0], queries.shape[0], x.shape[2]))
    return out, x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.register_fake("cropr::attend_backward", lib=_library)
def _(grad_out: Tensor, x: Tensor, queries: Tensor, scale: float) -> Tensor:
    check("attend_backward", grad_out, x, queries, scale)
    return queries.new_empty(queries.shape)


@torch.library.register_fake("cropr::gather_norm", lib=_library)
def _(x: Tensor, idx: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    dims = check("gather_norm", x, idx, weight, bias, eps)
    return x.new_empty((dims["B"], dims["K"], dims["D"]))


@torch.library.register_fake("cropr::add_", lib=_library)
def _(x: Tensor, idx: Tensor | None, update: Tensor, gamma: Tensor | None) -> None:
    check("add_", x, idx, update, gamma)


@torch.library.register_fake("cropr::add_norm_", lib=_library)
def _(
    x: Tensor,
    idx: Tensor | None,
    update: Tensor,
    gamma: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    check("add_norm_", x, idx, update, gamma, weight, bias, eps)
    return x.new_empty(update.shape)


@torch.library.register_fake("cropr::add_select_", lib=_library)
def _(
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
) -> tuple[Tensor, Tensor]:
    dims = check("add_select_", x, idx, update, gamma, query, num_keep, num_prefix, sizes, size_weight, priority)
    batch, count = dims["B"], dims["K"]
    pruned_idx = x.new_empty((batch, count - num_keep), dtype=torch.int64)
    return x.new_empty((batch, num_keep), dtype=torch.int64), pruned_idx


@torch.library.register_fake("cropr::merge", lib=_library)
def _(
    x: Tensor,
    safe_idx: Tensor,
    candidate_idx: Tensor,
    sizes: Tensor,
    num_keep: int,
    features: Tensor | None = None,
    num_prefix: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check("merge", x, safe_idx, candidate_idx, sizes, num_keep, features, num_prefix)
    batch, n, dim = x.shape
    kept_idx, pruned_idx, kept_sizes = _fake_merged(safe_idx, candidate_idx, sizes, num_keep)
    return x.new_empty((batch, num_keep, dim)), kept_idx, pruned_idx, kept_sizes, safe_idx.new_empty((batch, n))


@torch.library.register_fake("cropr::merge_", lib=_library)
def _(
    x: Tensor,
    safe_idx: Tensor,
    candidate_idx: Tensor,
    sizes: Tensor,
    parent: Tensor,
    num_keep: int,
    num_prefix: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    check("merge_", x, safe_idx, candidate_idx, sizes, parent, num_keep, num_prefix)
    return _fake_merged(safe_idx, candidate_idx, sizes, num_keep)


def _fake_merged(
    safe_idx: Tensor, candidate_idx: Tensor, sizes: Tensor, num_keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, safe = safe_idx.shape
    num_prune = safe + candidate_idx.shape[1] - num_keep
    kept_idx, pruned_idx = (safe_idx.new_empty((batch, count)) for count in (num_keep, num_prune))
    return kept_idx, pruned_idx, sizes.new_empty((batch, num_keep))


@torch.library.register_fake("cropr::rotate_", lib=_library)
def _(x: Tensor, table: Tensor, idx: Tensor | None, num_prefix: int = 0, half: bool = False) -> None:
    check("rotate_", x, table, idx, num_prefix, half)


# Gradients. Selection passes none, queries of scores and prune receive none: stop-gradient is the ops' own.


def _no_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))


def _nothing(ctx: Any, *grads: Any) -> tuple[None, ...]:
    return (None,) * len(ctx.needs_input_grad)


def _prune_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    kept, kept_idx, pruned, pruned_idx = output
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(kept_idx, pruned_idx)
        ctx.mark_non_differentiable(kept_idx, pruned_idx)
    else:
        ctx.mark_non_differentiable(kept, kept_idx, pruned, pruned_idx)


def _prune_backward(ctx: Any, grad_kept: Tensor, _a: Any, grad_pruned: Tensor, _b: Any) -> tuple[Tensor | None, ...]:
    if not ctx.needs_input_grad[0]:
        return (None,) * 5
    kept_idx, pruned_idx = ctx.saved_tensors
    return torch.ops.cropr.restore(grad_kept, kept_idx, grad_pruned, pruned_idx), *(None,) * 4


def _restore_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, kept_idx, _, pruned_idx = inputs
    ctx.save_for_backward(kept_idx, pruned_idx)


def _restore_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    kept_idx, pruned_idx = ctx.saved_tensors
    needs_kept, _, needs_pruned, _ = ctx.needs_input_grad
    return (
        torch.ops.cropr.gather(grad, kept_idx) if needs_kept else None,
        None,
        torch.ops.cropr.gather(grad, pruned_idx) if needs_pruned else None,
        None,
    )


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, idx = inputs
    ctx.num_tokens = x.shape[1]
    ctx.save_for_backward(idx)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (idx,) = ctx.saved_tensors
    # Unlike those of prune, these positions may repeat, so rows add up.
    zeros = grad.new_zeros((grad.shape[0], ctx.num_tokens, grad.shape[2]))
    return zeros.scatter_add(1, idx.unsqueeze(-1).expand_as(grad), grad), None


def _merge_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, _, sizes, *_ = inputs
    kept, *choice = output
    if ctx.needs_input_grad[0]:
        ctx.dtype = x.dtype
        ctx.save_for_backward(sizes, *choice[2:])
        ctx.mark_non_differentiable(*choice)
    else:
        ctx.mark_non_differentiable(kept, *choice)


def _merge_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if not ctx.needs_input_grad[0]:
        return (None,) * len(ctx.needs_input_grad)
    sizes, kept_sizes, dest = ctx.saved_tensors
    share = (sizes / kept_sizes.gather(1, dest)).unsqueeze(-1)  # of a token in the mean of its row
    return (torch.ops.cropr.gather(grad, dest) * share).to(ctx.dtype), *(None,) * 6


def _attend_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, queries, ctx.scale = inputs
    out, *scores = output if isinstance(output, tuple) else (output,)
    if ctx.needs_input_grad[1]:
        ctx.save_for_backward(x, queries)
        ctx.mark_non_differentiable(*scores)
    else:
        ctx.mark_non_differentiable(out, *scores)


def _attend_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[None, Tensor | None, None]:
    if not ctx.needs_input_grad[1]:
        return None, None, None
    x, queries = ctx.saved_tensors
    return None, torch.ops.cropr.attend_backward(grad, x, queries, ctx.scale), None


for _name, _backward, _setup in (
    ("scores", _nothing, _no_gradient),
    ("select", _nothing, _no_gradient),
    ("prune", _prune_backward, _prune_setup),
    ("split", _prune_backward, _prune_setup),
    ("gather", _gather_backward, _gather_setup),
    ("restore", _restore_backward, _restore_setup),
    ("merge", _merge_backward, _merge_setup),
    ("attend", _attend_backward, _attend_setup),
    ("attend_scores", _attend_backward, _attend_setup),
    ("attend_backward", _nothing, _no_gradient),
):
    torch.library.register_autograd(f"cropr::{_name}", _backward, setup_context=_setup, lib=_library)


# FLOPs, a multiplication and an addition counted as two, for torch.utils.flop_counter.


@register_flop_formula([torch.ops.cropr.scores, torch.ops.cropr.prune])
def _score_flops(x_shape: tuple[int, ...], query_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    batch, n, dim = x_shape
    return 2 * batch * n * dim


@register_flop_formula([torch.ops.cropr.select, torch.ops.cropr.split, torch.ops.cropr.gather, torch.ops.cropr.restore])
def _no_flops(*args: Any, **kwargs: Any) -> int:
    return 0


@register_flop_formula(
    [torch.ops.cropr.gather_norm, torch.ops.cropr.add_, torch.ops.cropr.add_norm_, torch.ops.cropr.rotate_]
)
def _elementwise_flops(*args: Any, **kwargs: Any) -> int:
    return 0


@register_flop_formula(torch.ops.cropr.add_select_)
def _add_select_flops(
    x_shape: tuple[int, ...], idx_shape: Any, update_shape: tuple[int, ...], *args: Any, **kwargs: Any
) -> int:
    batch, count, dim = update_shape
    return 2 * batch * count * dim


@register_flop_formula([torch.ops.cropr.merge, torch.ops.cropr.merge_])
def _merge_flops(
    x_shape: tuple[int, ...],
    safe_shape: tuple[int, ...],
    candidate_shape: tuple[int, ...],
    *args: Any,
    **kwargs: Any,
) -> int:
    features = [shape for shape in args if isinstance(shape, tuple | torch.Size) and len(shape) == 3]
    channels = features[0][2] if features else x_shape[2]
    return 2 * x_shape[0] * safe_shape[1] * candidate_shape[1] * channels  # similarities


@register_flop_formula([torch.ops.cropr.attend, torch.ops.cropr.attend_scores])
def _attend_flops(x_shape: tuple[int, ...], queries_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    batch, n, dim = x_shape
    return 4 * batch * queries_shape[0] * n * dim  # logits and weighted sum


@register_flop_formula(torch.ops.cropr.attend_backward)
def _attend_backward_flops(
    grad_shape: tuple[int, ...], x_shape: tuple[int, ...], queries_shape: tuple[int, ...], *args: Any, **kwargs: Any
) -> int:
    batch, n, dim = x_shape
    return 6 * batch * queries_shape[0] * n * dim  # logits again, their gradient, and that of the queries
