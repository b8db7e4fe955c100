"""Gradients of the ops, as (backward, setup_context) for torch.library.register_autograd.

Selection passes no gradient; queries of scores and prune receive none: stop-gradient is part of the
ops. The ops of the engine have no gradient: they raise an error for tensors that require one.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from . import reference

_Gradients = tuple[Tensor | None, ...]
_MergeInputs = tuple[Tensor, Tensor, Tensor, Tensor, int, int, Tensor | None]


class Context(Protocol):
    """The part of an autograd context that these gradients use."""

    needs_input_grad: tuple[bool, ...]
    num_tokens: int  # of x, where only positions are saved
    scale: float  # of the softmax of attend

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


def _no_gradient_setup(
    ctx: Context, inputs: tuple[object, ...], output: Tensor | tuple[Tensor, ...]
) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))


def _no_gradient(ctx: Context, *grads: Tensor | None) -> _Gradients:
    return (None,) * len(ctx.needs_input_grad)


def _prune_setup(ctx: Context, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    kept, kept_idx, pruned, pruned_idx = output
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(kept_idx, pruned_idx)
        ctx.mark_non_differentiable(kept_idx, pruned_idx)
    else:
        ctx.mark_non_differentiable(kept, kept_idx, pruned, pruned_idx)


def _prune_backward(
    ctx: Context, grad_kept: Tensor, _: object, grad_pruned: Tensor, __: object
) -> _Gradients:
    kept_idx, pruned_idx = ctx.saved_tensors
    return torch.ops.cropr.restore(grad_kept, kept_idx, grad_pruned, pruned_idx), *(None,) * 4


def _restore_setup(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, kept_idx, _, pruned_idx = inputs
    ctx.save_for_backward(kept_idx, pruned_idx)


def _restore_backward(ctx: Context, grad: Tensor) -> _Gradients:
    kept_idx, pruned_idx = ctx.saved_tensors
    needs_kept, _, needs_pruned, _ = ctx.needs_input_grad
    return (
        torch.ops.cropr.gather(grad, kept_idx) if needs_kept else None,
        None,
        torch.ops.cropr.gather(grad, pruned_idx) if needs_pruned else None,
        None,
    )


def _gather_setup(ctx: Context, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, idx = inputs
    ctx.num_tokens = x.shape[1]
    ctx.save_for_backward(idx)


def _gather_backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
    (idx,) = ctx.saved_tensors
    # Unlike those of prune, these positions may repeat, so rows add up.
    zeros = grad.new_zeros((grad.shape[0], ctx.num_tokens, grad.shape[2]))
    return zeros.scatter_add(1, idx.unsqueeze(-1).expand_as(grad), grad), None


def _merge_setup(ctx: Context, inputs: _MergeInputs, output: tuple[Tensor, ...]) -> None:
    x, _, _, sizes, *_ = inputs
    _, kept_idx, pruned_idx, kept_sizes, dest = output
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(x, sizes, kept_idx, kept_sizes, dest)
        ctx.mark_non_differentiable(kept_idx, pruned_idx, kept_sizes, dest)
    else:
        ctx.mark_non_differentiable(*output)


def _merge_backward(ctx: Context, grad: Tensor, *_: object) -> _Gradients:
    x, sizes, kept_idx, kept_sizes, dest = ctx.saved_tensors
    acc_dtype = reference.accumulation_dtype(x.dtype)
    rows = x.to(acc_dtype)
    grad = grad.to(acc_dtype)
    # Of a token in the mean of its row
    share = (sizes.to(acc_dtype) / kept_sizes.gather(1, dest)).unsqueeze(-1)
    target = torch.ops.cropr.gather(rows, kept_idx)
    mean = torch.zeros_like(target).scatter_add(1, dest.unsqueeze(-1).expand_as(rows), rows * share)
    norm, mean_norm, scaled = reference.norms(target, mean)
    # Other rows are unchanged
    scaled = scaled & (kept_sizes != sizes.gather(1, kept_idx)).unsqueeze(-1)
    # kept = |target| unit: the norm receives the gradient along the unit vector, the mean the rest.
    unit = mean / mean_norm
    along = (unit * grad).sum(-1, keepdim=True)
    across = torch.where(scaled, norm / mean_norm * (grad - unit * along), grad)
    norm_grad = torch.where(
        scaled & (norm > 0), target / torch.where(norm > 0, norm, 1.0) * along, 0.0
    )
    mean_grad = torch.ops.cropr.gather(across, dest) * share
    grad_x = mean_grad.scatter_add(1, kept_idx.unsqueeze(-1).expand_as(norm_grad), norm_grad)
    return grad_x.to(x.dtype), *(None,) * 6


def _offsets_setup(
    ctx: Context, inputs: tuple[Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]
) -> None:
    x, _, pruned_idx, _ = inputs
    _, parent_idx = output
    ctx.num_tokens = x.shape[1]
    ctx.save_for_backward(pruned_idx, parent_idx)
    ctx.mark_non_differentiable(parent_idx)


def _offsets_backward(ctx: Context, grad: Tensor, _: object) -> _Gradients:
    pruned_idx, parent_idx = (idx.unsqueeze(-1).expand_as(grad) for idx in ctx.saved_tensors)
    zeros = grad.new_zeros((grad.shape[0], ctx.num_tokens, grad.shape[2]))
    return zeros.scatter(1, pruned_idx, grad).scatter_add(1, parent_idx, -grad), None, None, None


def _parents_setup(ctx: Context, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _parents_backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
    (parent,) = ctx.saved_tensors
    total = grad.to(reference.accumulation_dtype(grad.dtype))
    # Each token receives the gradients of its descendants
    for hop in reference.hops(parent, parent.shape[1]):
        padded = torch.cat([total, torch.zeros_like(total[:, :1])], 1)
        total = padded.scatter_add(1, hop.unsqueeze(-1).expand_as(total), total)[:, :-1]
    return total.to(grad.dtype), None


def _attend_setup(
    ctx: Context, inputs: tuple[Tensor, Tensor, float], output: Tensor | tuple[Tensor, Tensor]
) -> None:
    x, queries, ctx.scale = inputs
    out, *scores = output if isinstance(output, tuple) else (output,)
    if ctx.needs_input_grad[1]:
        ctx.save_for_backward(x, queries)
        ctx.mark_non_differentiable(*scores)
    else:
        ctx.mark_non_differentiable(out, *scores)


def _attend_backward(ctx: Context, grad: Tensor, *_: object) -> tuple[None, Tensor, None]:
    x, queries = ctx.saved_tensors
    return None, torch.ops.cropr.attend_backward(grad, x, queries, ctx.scale), None


GRADIENTS: dict[str, tuple[Callable[..., _Gradients], Callable[..., None]]] = {
    "scores": (_no_gradient, _no_gradient_setup),
    "select": (_no_gradient, _no_gradient_setup),
    "prune": (_prune_backward, _prune_setup),
    "split": (_prune_backward, _prune_setup),
    "gather": (_gather_backward, _gather_setup),
    "restore": (_restore_backward, _restore_setup),
    "merge": (_merge_backward, _merge_setup),
    "parent_offsets": (_offsets_backward, _offsets_setup),
    "add_parents": (_parents_backward, _parents_setup),
    "attend": (_attend_backward, _attend_setup),
    "attend_scores": (_attend_backward, _attend_setup),
    "attend_backward": (_no_gradient, _no_gradient_setup),
    "ragged_nearest": (_no_gradient, _no_gradient_setup),
}


def reject_gradient(name: str) -> Callable[..., Any]:
    """Return an Autograd kernel that raises an error for tensors that require a gradient."""
    op = getattr(torch.ops.cropr, name).default
    arguments = [argument.name for argument in op._schema.arguments]

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            for argument, value in zip(arguments, args):
                if isinstance(value, Tensor) and value.requires_grad:
                    raise RuntimeError(
                        f"{name}: {argument} must not require a gradient, as the op has none; "
                        "call it under "
                        "torch.no_grad()"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return kernel


def increment_versions(name: str) -> Callable[..., Any]:
    """Return an ADInplaceOrView kernel that marks written tensors as changed.

    A backward that saved one of them then raises an error.
    """
    op = getattr(torch.ops.cropr, name).default
    aliases = [argument.alias_info for argument in op._schema.arguments]
    written = [i for i, alias in enumerate(aliases) if alias is not None and alias.is_write]

    def kernel(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
        for i in written:
            if i < len(args) and args[i] is not None:
                torch.autograd.graph.increment_version(args[i])
        return result

    return kernel
