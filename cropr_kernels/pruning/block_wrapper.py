"""One wrapper around a block, for every family: the model's own loop calls it, and it prunes after the block.

The class of a block becomes a subclass with the same name, so that what looks for it by class or name finds it;
parameters, hooks, pickling and copying are the block's own.
"""

from collections.abc import Callable
from typing import Any, SupportsIndex, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.blocks import Rotary, SizeWeightedAttention
from .engine import run_engine
from .state import PruningModules, PruningOptions, PruningState

_wrapped_classes: dict[type, type] = {}
_TABLES = ("rope", "position_embeddings")  # rotary tables: of timm and this package's ViT, and of Hugging Face

Args = tuple[object, ...]
Kwargs = dict[str, object]


class WrappedBlock:
    """Mixed into a block's class."""

    cropr_layer: tuple[PruningModules, int]  # the Cropr modules of the model, and the index of this block
    cropr_base: type  # the block's class

    def __call__(self, x: Tensor, *args: object, **kwargs: object) -> object:
        if isinstance(x, torch.fx.Proxy):  # to symbolic tracing a block is one call, as those of torch.nn are
            return _trace_call(cast(nn.Module, self), x, args, kwargs)
        return run_block(*self.cropr_layer, super().__call__, x, args, kwargs)  # type: ignore[misc]

    def forward(self, *args: object, cropr_log_sizes: Tensor | None = None, **kwargs: object) -> object:
        """Run the block's own forward, with sizes in its attention: recomputation in backward passes here again."""
        if cropr_log_sizes is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        attention_calls: list[bool] = []
        with SizeWeightedAttention(cropr_log_sizes, attention_calls):
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if not attention_calls:
            raise ValueError(
                f"cropr: merging and padding need attention that calls scaled_dot_product_attention, and "
                f"{self.cropr_base.__name__} does not (timm: fused attention; transformers: "
                "attn_implementation='sdpa')"
            )
        return output

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return _rebuild, (self.cropr_base,), *reduced[2:]


def _trace_call(block: nn.Module, x: torch.fx.Proxy, args: Args, kwargs: Kwargs) -> object:
    tracer: Any = x.tracer

    def call(*args: object, **kwargs: object) -> torch.fx.Proxy:
        return tracer.create_proxy("call_module", tracer.path_of_module(block), args, kwargs)

    return tracer.call_module(block, call, (x, *args), kwargs)


def _rebuild(base: type) -> object:
    wrapped: Any = wrapped_class(base)
    return wrapped.__new__(wrapped)


def wrapped_class(base: type) -> type:
    """Return the class of a pruned block, which has the name of its base."""
    if base not in _wrapped_classes:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "cropr_base": base}
        _wrapped_classes[base] = type(base.__name__, (WrappedBlock, base), names)
    return _wrapped_classes[base]


def wrap(blocks: list[nn.Module], modules: PruningModules) -> None:
    """Lead all calls of these blocks through `run_block`."""
    for layer, block in enumerate(blocks):
        block.cropr_layer = modules, layer  # type: ignore[assignment]
        block.__class__ = wrapped_class(type(block))


def unwrap(blocks: list[nn.Module]) -> None:
    """Undo `wrap`."""
    for block in blocks:
        block.__class__ = type(block).cropr_base  # type: ignore[attr-defined]
        del block.cropr_layer


def run_block(
    modules: PruningModules, layer: int, block: Callable[..., object], x: Tensor, args: Args, kwargs: Kwargs
) -> object:
    """Run block `layer` on the active tokens, and return its output without those that are pruned after it."""
    context = modules.context
    options = context.options or PruningOptions()
    if options.observe is not None:
        output = block(x, *args, **kwargs)
        options.observe(layer, _tokens_of(output))
        return output
    if layer == 0:
        context.state = PruningState(context.modules or modules, x, options, context.grid)
        context.grid = None  # while an export traces, of symbols that nothing may keep
        if options.engine and _engine_runs(context.state, x, args, kwargs):
            context.state.next_layer = 1
            return run_engine(context.state, x, _rotary(context.state, kwargs))
    state = context.state
    if state is None or layer != state.next_layer:
        raise RuntimeError(
            f"cropr: block {layer} of a pruned model ran without those before it (recomputation in backward is "
            "switched on by model.set_grad_checkpointing() after cropr.apply)"
        )
    state.next_layer += 1
    output = x if state.done else _run_and_prune(modules, state, layer, block, x, args, kwargs)
    if layer == state.last_layer:
        if state.masks is not None and state.modules.spec.pooling == "average":
            context.padding = state.masks.padding_at(state.positions)
        if context.options is None:  # nobody reads the state
            context.state = None
    return output


def _run_and_prune(
    modules: PruningModules,
    state: PruningState,
    layer: int,
    block: Callable[..., object],
    x: Tensor,
    args: Args,
    kwargs: Kwargs,
) -> object:
    x = state.before_block(layer, x)
    args, kwargs = _select_active(state, layer, args, kwargs)
    log_sizes = state.log_sizes()
    if log_sizes is not None:
        kwargs["cropr_log_sizes"] = log_sizes
    if modules.recompute and modules.training:
        output: object = checkpoint(block, x, *args, use_reentrant=False, **kwargs)  # type: ignore[call-overload]
    else:
        output = block(x, *args, **kwargs)
    x = state.after_block(layer, _tokens_of(output))
    return (x, *output[1:]) if isinstance(output, tuple) else x


def _tokens_of(output: object) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def _engine_runs(state: PruningState, x: Tensor, args: Args, kwargs: Kwargs) -> bool:
    """Tell whether the engine may run this forward, and supports the arguments of its blocks."""
    modules = state.modules
    if modules.engine is None or modules.training or state.predicts or state.options.collect or _exporting():
        return False
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return False
    arguments = [*args, *(value for name, value in kwargs.items() if name not in _TABLES)]
    return not any(isinstance(value, Tensor) for value in arguments) and modules.engine_is_clear()


def _exporting() -> bool:
    """Tell whether torch.export traces (its default, non-strict way): exported programs hold the functional ops."""
    # Dynamo up to torch 2.11 takes is_exporting() for true in torch.compile as well.
    return not torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting()


def _rotary(state: PruningState, kwargs: Kwargs) -> Rotary | None:
    table = next((kwargs[name] for name in _TABLES if kwargs.get(name) is not None), None)
    return None if table is None else Rotary(table, None, state.num_prefix)


def _select_active(state: PruningState, layer: int, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Reduce rotary tables and masks among a block's arguments to the rows of the active tokens."""
    if state.positions is None and state.config.windows is None:
        return args, dict(kwargs)
    selected: Kwargs = {}
    for name, value in kwargs.items():
        if name in _TABLES and isinstance(value, tuple):
            selected[name] = tuple(state.rotary_rows(layer, table) for table in value)
        elif name in _TABLES and isinstance(value, Tensor):
            selected[name] = state.rotary_rows(layer, value)
        else:
            selected[name] = _mask_at(value, state.positions)
    return tuple(_mask_at(value, state.positions) for value in args), selected


def _mask_at(value: object, positions: Tensor | None) -> object:
    """Select an attention mask (B or 1, heads or 1, queries or 1, N) at positions (B, K); other values pass."""
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
