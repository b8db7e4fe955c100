"""The ops of namespace ``cropr``: their definition, fake kernels, gradients and FLOP formulas.

The only file that registers anything in Python. Schemas are those of csrc/library.h; CPU kernels
register when ``_C`` is imported; CUDA kernels are plans (csrc/launch.cpp) of what the Triton
launchers of ``ops/triton/`` did at first.
"""

import importlib
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .extension import NAMES, replayed, table
from .validation import check_shapes

# The ops whose launchers are in each file of triton/.
FAMILIES = {
    "scores": ("scores",),
    "select": ("select",),
    "prune": ("prune", "split", "gather", "restore"),
    "attend": ("attend", "attend_scores", "attend_backward"),
    "merge": ("merge", "merge_"),
    "parent_offsets": ("parent_offsets", "parent_offsets_", "add_parents"),
    "residual": ("gather_norm", "add_", "add_norm_", "add_select_", "rotate_"),
}
FILES = {op: file for file, ops in FAMILIES.items() for op in ops}


def cuda_kernel(name: str, module: str) -> Callable[..., Any]:
    """The CUDA kernel of an op: its plan for arguments like these, or else its launcher."""
    replay = getattr(torch.ops.cropr_replay, name).default

    def kernel(*args: Any) -> Any:
        result = replay(*args)
        if replayed():
            return result
        try:
            launching = importlib.import_module("cropr_kernels.ops.triton.launching")
            kernels = importlib.import_module(f"cropr_kernels.ops.triton.{module}")
        except ImportError as error:
            raise ImportError(f"cropr::{name}: CUDA tensors need triton: pip install triton ({error})") from error
        return launching.record(getattr(kernels, name), args)

    return kernel


_library = torch.library.Library("cropr", "DEF")
for _name, _row in zip(NAMES, table):
    _library.define(_row[0], tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, cuda_kernel(_name, FILES[_name]), "CUDA")


# Fake kernels: the refusals of the real ones, and dtype and sizes of each result. Dtypes are their
# own or that of an argument, sizes are letters of the table in csrc/library.h and arguments.
_SPLIT = "x B,num_keep,D; int64 B,num_keep; x B,N-num_keep,D; int64 B,N-num_keep"
_CHOICE = "int64 B,num_keep; int64 B,T+C-num_keep; float32 B,num_keep"
_RESULTS = {
    "scores": "float32 B,N",
    "select": "int64 B,num_keep; int64 B,N-num_keep",
    "prune": _SPLIT,
    "split": _SPLIT,
    "gather": "x B,K,D",
    "restore": "kept B,K+R,D",
    "attend": "x B,M,D",
    "attend_scores": "x B,M,D; float32 B,N",
    "attend_backward": "queries M,D",
    "merge": f"x B,num_keep,D; {_CHOICE}; int64 B,N",
    "parent_offsets": "x B,R,D; int64 B,R",
    "add_parents": "x B,N,D",
    "gather_norm": "x B,K,D",
    "add_": "",
    "add_norm_": "x B,K,D",
    "add_select_": "int64 B,num_keep; int64 B,K-num_keep",
    "merge_": _CHOICE,
    "parent_offsets_": "",
    "rotate_": "",
}


def _fake(op: str) -> Callable[..., Any]:
    results = [result.split() for result in _RESULTS[op].split("; ") if result]
    arguments = getattr(torch.ops.cropr, op).default._schema.arguments

    def fake(*args: Any, **kwargs: Any) -> Any:
        rest = (kwargs.get(argument.name, argument.default_value) for argument in arguments[len(args) :])
        values = [*args, *rest]
        sizes = check_shapes(op, *values) | {argument.name: value for argument, value in zip(arguments, values)}
        made = []
        for dtype, shape in results:
            terms = [re.findall(r"(-?)(\w+)", size) for size in shape.split(",")]
            dims = [sum(-sizes[name] if minus else sizes[name] for minus, name in size) for size in terms]
            kind = sizes[dtype].dtype if dtype in sizes else getattr(torch, dtype)
            made.append(values[0].new_empty(dims, dtype=kind))
        return tuple(made) if len(made) > 1 else made[0] if made else None

    return fake


for _name in NAMES:
    torch.library.register_fake(f"cropr::{_name}", _fake(_name), lib=_library)


# Gradients. Selection passes none, queries of scores and prune receive none: stop-gradient is the
# ops' own.


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
        kept_idx, _, kept_sizes, dest = choice
        ctx.save_for_backward(x, sizes, kept_idx, kept_sizes, dest)
        ctx.mark_non_differentiable(*choice)
    else:
        ctx.mark_non_differentiable(kept, *choice)


def _merge_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if not ctx.needs_input_grad[0]:
        return (None,) * len(ctx.needs_input_grad)
    x, sizes, kept_idx, kept_sizes, dest = ctx.saved_tensors
    wide = reference.accumulation_dtype(x.dtype)
    rows, grad = x.to(wide), grad.to(wide)
    share = (sizes.to(wide) / kept_sizes.gather(1, dest)).unsqueeze(-1)  # of a token in the mean of its row
    target, into = torch.ops.cropr.gather(rows, kept_idx), dest.unsqueeze(-1).expand_as(rows)
    mean = torch.zeros_like(target).scatter_add(1, into, rows * share)
    norm, mean_norm, scaled = reference.norms(target, mean)
    scaled = scaled & (kept_sizes != sizes.gather(1, kept_idx)).unsqueeze(-1)  # others are what they were
    # kept = |target| unit: the norm passes on what is along the unit, the mean what is across.
    unit = mean / mean_norm
    along = (unit * grad).sum(-1, keepdim=True)
    across = torch.where(scaled, norm / mean_norm * (grad - unit * along), grad)
    own = torch.where(scaled & (norm > 0), target / torch.where(norm > 0, norm, 1.0) * along, 0.0)
    members = torch.ops.cropr.gather(across, dest) * share
    return members.scatter_add(1, kept_idx.unsqueeze(-1).expand_as(own), own).to(x.dtype), *(None,) * 6


def _offsets_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, pruned_idx, _ = inputs
    offset, parent_idx = output
    if ctx.needs_input_grad[0]:
        ctx.num_tokens = x.shape[1]
        ctx.save_for_backward(pruned_idx, parent_idx)
        ctx.mark_non_differentiable(parent_idx)
    else:
        ctx.mark_non_differentiable(offset, parent_idx)


def _offsets_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    if not ctx.needs_input_grad[0]:
        return (None,) * 4
    pruned_idx, parent_idx = (idx.unsqueeze(-1).expand_as(grad) for idx in ctx.saved_tensors)
    zeros = grad.new_zeros((grad.shape[0], ctx.num_tokens, grad.shape[2]))
    return zeros.scatter(1, pruned_idx, grad).scatter_add(1, parent_idx, -grad), None, None, None


def _parents_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _parents_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (parent,) = ctx.saved_tensors
    total = grad.to(reference.accumulation_dtype(grad.dtype))
    for hop in reference.hops(parent):  # to each token go the gradients of all that it was added to
        padded = torch.cat([total, torch.zeros_like(total[:, :1])], 1)
        total = padded.scatter_add(1, hop.unsqueeze(-1).expand_as(total), total)[:, :-1]
    return total.to(grad.dtype), None


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
    ("parent_offsets", _offsets_backward, _offsets_setup),
    ("add_parents", _parents_backward, _parents_setup),
    ("attend", _attend_backward, _attend_setup),
    ("attend_scores", _attend_backward, _attend_setup),
    ("attend_backward", _nothing, _no_gradient),
):
    torch.library.register_autograd(f"cropr::{_name}", _backward, setup_context=_setup, lib=_library)


# The engine's ops have no gradient, and refuse tensors that require one where gradients are
# recorded. What they write is a newer version of the tensor, so that a backward that saved the old
# one says so.


def _refuse_gradient(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.cropr, name).default
    arguments = [argument.name for argument in op._schema.arguments]

    def refuse(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            for argument, value in zip(arguments, args):
                if isinstance(value, Tensor) and value.requires_grad:
                    raise RuntimeError(
                        f"{name}: {argument} must not require a gradient, as the op has none; call it under "
                        "torch.no_grad()"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return refuse


def _count_versions(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.cropr, name).default
    arguments = enumerate(op._schema.arguments)
    written = [i for i, argument in arguments if argument.alias_info is not None and argument.alias_info.is_write]

    def count(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
        for i in written:
            if i < len(args) and args[i] is not None:
                torch.autograd.graph.increment_version(args[i])
        return result

    return count


for _name in (*FAMILIES["residual"], "merge_", "parent_offsets_"):
    _library.impl(_name, _refuse_gradient(_name), "Autograd", with_keyset=True)
    if _name.endswith("_"):
        _library.impl(_name, _count_versions(_name), "ADInplaceOrView", with_keyset=True)


# torch.func differentiates and vectorises operators that it knows: under its transforms an op is
# its definition.
for _name in NAMES:
    if not _name.endswith(("_", "norm", "backward")):
        _library.impl(_name, getattr(reference, _name), "FuncTorchDynamicLayerFrontMode")


# FLOPs, a multiplication and an addition counted as two, for torch.utils.flop_counter. Formulas
# take shapes.


def _no_flops(*_: Any, **__: Any) -> int:
    return 0


def _score_flops(x: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x)


def _similarity_flops(x: Any, those: Any, others: Any, *_: Any, **__: Any) -> int:
    return 2 * x[0] * those[1] * others[1] * x[2]


def _attend_flops(x: Any, queries: Any, *_: Any, **__: Any) -> int:
    return 4 * math.prod(x) * queries[0]  # logits and weighted sum


_FLOPS: dict[str, Callable[..., int]] = {
    "scores": _score_flops,
    "prune": _score_flops,
    "add_select_": lambda x, idx, update, *_, **__: _score_flops(update),
    **dict.fromkeys(("merge", "merge_", "parent_offsets", "parent_offsets_"), _similarity_flops),
    "attend": _attend_flops,
    "attend_scores": _attend_flops,
    "attend_backward": lambda grad, x, queries, *_, **__: 6 * math.prod(x) * queries[0],  # and gradients of both
}
for _name in NAMES:
    register_flop_formula(getattr(torch.ops.cropr, _name))(_FLOPS.get(_name, _no_flops))
