"""One wrapper around a block, for every family: the model's own loop calls it, and it prunes after the block.

The class of a block becomes a subclass with the same name, so that what looks for it by class or name finds it;
parameters, hooks, pickling and copying are the block's own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.blocks import Rotary, SizeWeightedAttention
from .engine import run_engine
from .state import PruningOptions, PruningState

_wrapped_classes: dict[type, type] = {}
_TABLES = ("rope", "position_embeddings")  # rotary tables: of timm and this package's ViT, and of transformers


class WrappedBlock:
    """Mixed into a block's class."""

    cropr_place: tuple[Any, int]  # the Cropr modules of the model, and which of its blocks this is
    cropr_base: type  # the block's class

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, torch.fx.Proxy):  # to symbolic tracing a block is one call, as those of torch.nn are
            tracer: Any = x.tracer
            leaf = lambda *a, **k: tracer.create_proxy("call_module", tracer.path_of_module(self), a, k)  # noqa: E731
            return tracer.call_module(self, leaf, (x, *args), kwargs)
        return run_block(*self.cropr_place, super().__call__, x, args, kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, cropr_log_sizes: Tensor | None = None, **kwargs: Any) -> Any:
        """The block's own forward, its attention weighing tokens: recomputation in backward passes here again."""
        if cropr_log_sizes is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        seen: list[bool] = []
        with SizeWeightedAttention(cropr_log_sizes, seen):
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if not seen:
            raise ValueError(
                f"cropr: merging and padding need attention that calls scaled_dot_product_attention, and "
                f"{self.cropr_base.__name__} does not (timm: fused attention; transformers: "
                "attn_implementation='sdpa')"
            )
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(protocol)
        return _rebuild, (self.cropr_base,), *made[2:]


def _rebuild(base: type) -> Any:
    kind: Any = wrapped_class(base)
    return kind.__new__(kind)


def wrapped_class(base: type) -> type:
    """The class of a pruned block: it goes by the name of its base."""
    if base not in _wrapped_classes:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "cropr_base": base}
        _wrapped_classes[base] = type(base.__name__, (WrappedBlock, base), names)
    return _wrapped_classes[base]


def wrap(blocks: list[nn.Module], stack: Any) -> None:
    """Lead all calls of these blocks through `run_block`."""
    for layer, block in enumerate(blocks):
        block.cropr_place = stack, layer  # type: ignore[assignment]
        block.__class__ = wrapped_class(type(block))


def unwrap(blocks: list[nn.Module]) -> None:
    """Undo `wrap`."""
    for block in blocks:
        block.__class__ = type(block).cropr_base  # type: ignore[attr-defined]
        del block.cropr_place


def run_block(
    stack: Any, layer: int, block: Callable[..., Any], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What block `layer` gives for the active tokens, without those that are pruned after it."""
    slot = stack.slot
    options = slot.options or PruningOptions()
    if options.observe is not None:
        output = block(x, *args, **kwargs)
        options.observe(layer, _first(output))
        return output
    if layer == 0:
        slot.state = PruningState(slot.stack or stack, x, options, slot.grid)
        if options.engine and _engine_runs(slot.state, x, args, kwargs):
            slot.state.next_layer = 1
            return run_engine(slot.state, x, _rotary(slot.state, kwargs))
    state: PruningState | None = slot.state
    if state is None or layer != state.next_layer:
        raise RuntimeError(
            f"cropr: block {layer} of a pruned model ran without those before it (recomputation in backward is "
            "switched on by model.set_grad_checkpointing() after cropr.apply)"
        )
    state.next_layer += 1
    if not state.done:
        x = state.before_block(layer, x)
        args, kwargs = _active(state, layer, args, kwargs)
        log_sizes = state.log_sizes()
        if log_sizes is not None:
            kwargs["cropr_log_sizes"] = log_sizes
        if stack.recompute and stack.training:
            output = checkpoint(block, x, *args, use_reentrant=False, **kwargs)
        else:
            output = block(x, *args, **kwargs)
        x, *others = output if isinstance(output, tuple) else (output,)
        x = state.after_block(layer, x)
        output = (x, *others) if isinstance(output, tuple) else x
    else:
        output = x
    if layer == state.last:
        if state.masks is not None and state.stack.spec.pooling == "average":
            slot.padding = state.masks.padding_at(state.positions)
        if slot.options is None:  # nobody asks for more
            slot.state = None
    return output


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _engine_runs(state: PruningState, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    stack = state.stack
    if stack.engine is None or stack.training or state.predicts or state.options.collect or _exporting():
        return False
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return False
    given = [*args, *(value for name, value in kwargs.items() if name not in _TABLES)]
    return not any(isinstance(value, Tensor) for value in given) and stack.engine_is_clear()


def _exporting() -> bool:
    """Whether torch.export traces (its default, non-strict way): exported programs hold the functional ops."""
    # Dynamo up to torch 2.11 takes is_exporting() for true in torch.compile as well.
    return not torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting()


def _rotary(state: PruningState, kwargs: dict[str, Any]) -> Rotary | None:
    table = next((kwargs[name] for name in _TABLES if kwargs.get(name) is not None), None)
    return None if table is None else Rotary(table, None, state.num_prefix)


def _active(
    state: PruningState, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a block is called with beside its tokens, for the active ones: rows of rotary tables, parts of masks."""
    if state.positions is None and state.windows is None:
        return args, dict(kwargs)
    given: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name in _TABLES and isinstance(value, tuple):
            given[name] = tuple(state.rotary_rows(layer, table) for table in value)
        elif name in _TABLES and value is not None:
            given[name] = state.rotary_rows(layer, value)
        else:
            given[name] = _mask_at(value, state.positions)
    return tuple(_mask_at(value, state.positions) for value in args), given


def _mask_at(value: Any, positions: Tensor | None) -> Any:
    """An attention mask (B or 1, heads or 1, queries or 1, N) at positions (B, K); a number, or no tensor, as is."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.ndim != 4 or positions is None:
        raise ValueError(
            f"cropr: a block of a pruned model is called with a tensor of shape {tuple(value.shape)}; it may be a mask "
            "(B, 1, N, N), without window attention"
        )
    value = value.expand(positions.shape[0], -1, -1, -1)
    if value.shape[2] != 1:
        value = value.gather(2, positions[:, None, :, None].expand(-1, value.shape[1], -1, value.shape[3]))
    return value.gather(3, positions[:, None, None].expand(-1, *value.shape[1:3], -1))
