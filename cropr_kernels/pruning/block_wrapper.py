"""One wrapper around a block, for every family: the model's own loop calls it, and it prunes after
the block.

The class of a block becomes a subclass with the same name, so that what looks for it by class or
name finds it; parameters, hooks, pickling and copying are the block's own.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, SupportsIndex, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.adapters import Submodule
from ..models.arguments import ROTARY_TABLES, Selection, has_tensors, select_arguments
from ..models.blocks import SizeWeightedAttention
from ..models.packed_linear import packed_weights
from ..models.probing import TOKEN_ARGUMENTS
from ..models.rotary import Rotary
from ..models.tiling import AttentionRows
from ..models.token_format import tokens_of
from .engine import run_engine
from .masks import level_padding
from .state import PruningModules, PruningOptions, PruningState
from .windowed_state import WindowedState

_wrapped_classes: dict[type, type] = {}

Args = tuple[object, ...]
Kwargs = dict[str, object]


class BlockInputs(NamedTuple):
    """Inputs of a block from pruning, beside its arguments."""

    log_sizes: Tensor | None  # (B, K), for its attention
    positions: Tensor | None  # (B, K), at which its attention has a bias
    num_images: int | None  # B, if they stand in one row
    tokens: object | None  # in place of the map that the model carries
    full_map: Callable[[Tensor], Tensor] | None  # of its output, for who reads it
    # Of tokens that are a part of a map, which the block's own forward would not take
    rows: list[AttentionRows] | None = None


class WrappedBlock:
    """Mixed into a block's class."""

    # The Cropr modules of the model, and the index of this block
    cropr_layer: tuple[PruningModules, int]
    cropr_base: type  # the block's class

    def __call__(self, *args: object, **kwargs: object) -> object:
        if args:
            x, *others = args
        else:
            x = kwargs.pop(next(name for name in TOKEN_ARGUMENTS if name in kwargs))
            others = []
        # To symbolic tracing a block is one call, as those of torch.nn are
        if isinstance(x, torch.fx.Proxy):
            return _trace_call(cast(nn.Module, self), x, tuple(others), kwargs)
        forward = super().__call__  # type: ignore[misc]
        return run_block(*self.cropr_layer, forward, x, tuple(others), kwargs)

    def forward(
        self, *args: object, cropr_inputs: BlockInputs | None = None, **kwargs: object
    ) -> object:
        """Run the block's own forward on the active tokens: recomputation in backward passes here
        again."""
        if cropr_inputs is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if cropr_inputs.rows is not None:
            return self._run_part(args[0], cropr_inputs.rows, cropr_inputs)
        token_format = self.cropr_layer[0].spec.token_format
        argument, *others = (
            args if cropr_inputs.tokens is None else (cropr_inputs.tokens, *args[1:])
        )
        num_images = cropr_inputs.num_images
        if num_images is not None:
            x = token_format.decode(argument)
            argument = token_format.encode(x, argument, in_row=True)
        attention_calls: list[bool] = []
        mode: AbstractContextManager[object] = nullcontext()
        # Any mode takes the fast path of nn.MultiheadAttention away, which rounds otherwise
        if any(
            value is not None
            for value in (cropr_inputs.log_sizes, cropr_inputs.positions, num_images)
        ):
            mode = SizeWeightedAttention(
                cropr_inputs.log_sizes, attention_calls, cropr_inputs.positions, num_images
            )
        with mode:
            output = super().forward(argument, *others, **kwargs)  # type: ignore[misc]
        if cropr_inputs.log_sizes is not None and not attention_calls:
            raise ValueError(
                "cropr: merging and padding need attention by scaled_dot_product_attention or by "
                "a softmax over "
                f"(B, heads, N, N), and {self.cropr_base.__name__} has none"
            )
        if num_images is not None:
            output = token_format.encode(token_format.decode(output, num_images), output)
        if cropr_inputs.full_map is None:
            return output
        return token_format.encode(cropr_inputs.full_map(token_format.decode(output)), output)

    def _run_part(self, argument: object, rows: list[AttentionRows], inputs: BlockInputs) -> object:
        """Run a block over maps on the active tokens (B, K, D)."""
        modules, layer = self.cropr_layer
        x = argument if inputs.tokens is None else inputs.tokens
        output = (modules.spec.map_blocks or [])[layer].run(cast(Tensor, x), rows)
        if inputs.full_map is not None:
            output = inputs.full_map(output)
        return _engine_output(modules, output)

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
        names = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "cropr_base": base,
        }
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


def links_to(blocks: list[nn.Module], model: nn.Module) -> list[Submodule]:
    """Every module on the way from a model to its blocks, with its name in its owner."""
    paths = {module: path for path, module in model.named_modules()}
    links: dict[tuple[nn.Module, str], Submodule] = {}
    for block in blocks:
        owner = model
        for name in paths[block].split("."):
            module = owner.get_submodule(name)
            links[owner, name] = Submodule(owner, name, module)
            owner = module
    return list(links.values())


def run_block(
    modules: PruningModules,
    layer: int,
    block: Callable[..., object],
    argument: object,
    args: Args,
    kwargs: Kwargs,
) -> object:
    """Run block `layer` on the active tokens, and return its output without those that are pruned
    after it."""
    context = modules.context
    token_format = modules.spec.token_format
    options = context.options or PruningOptions()
    if options.observe is not None and modules.config.windows is None:
        output = block(argument, *args, **kwargs)
        options.observe(layer, token_format.decode(output))
        return output
    if layer == 0:
        modules.require_same_blocks()
        x = token_format.decode(argument)
        has_windows = modules.spec.map_blocks is not None or modules.config.windows is not None
        make_state = WindowedState if has_windows else PruningState
        context.state = make_state(
            context.modules or modules, x, options, context.grid, context.frames
        )
        # While an export traces, of symbols that nothing may keep
        context.grid = None
        context.frames = None
        if options.engine and _engine_runs(context.state, x, args, kwargs):
            context.state.next_layer = 1
            run_blocks = options.exchange or run_engine
            rotary = _rotary(context.state, kwargs)
            with packed_weights(modules.linear_layers):
                tokens = run_blocks(context.state, x, rotary)
            return _engine_output(modules, token_format.encode(tokens, argument))
    state = context.state
    if state is None or layer != state.next_layer:
        raise RuntimeError(
            f"cropr: block {layer} of a pruned model ran without those before it (recomputation "
            "in backward is "
            "switched on by model.set_grad_checkpointing() after cropr.apply)"
        )
    state.next_layer += 1
    if state.done:
        output = _engine_output(modules, argument)
    elif isinstance(state, WindowedState) and modules.spec.map_blocks is not None:
        output = _run_on_map(state, layer, block, argument, args, kwargs)
    else:
        output = _run_and_prune(state, layer, block, argument, args, kwargs)
    if layer == state.last_layer:
        if state.masks is not None and state.modules.spec.pooling == "average":
            context.padding = state.masks.padding_at(state.positions)
            if modules.spec.norm is None:
                tokens = fill_padding(modules, tokens_of(output))
                output = token_format.encode(token_format.decode(tokens), output)
        if context.options is None:  # nobody reads the state
            context.state = None
    return output


def _engine_output(modules: PruningModules, argument: object) -> object:
    """Return the tokens as the blocks do."""
    count = modules.spec.block_outputs
    return (argument, *[None] * (count - 1)) if count else argument


def fill_padding(modules: PruningModules, x: Tensor) -> Tensor:
    """Replace padding by the mean of the image's patches, for heads that average over patches, in
    the tokens x of the model."""
    context = modules.context
    padding = context.padding
    context.padding = None
    if padding is None:
        return x
    token_format = modules.spec.token_format
    tokens = level_padding(token_format.decode(x), padding, modules.spec.num_prefix)
    return tokens_of(token_format.encode(tokens, x))


def _run_and_prune(
    state: PruningState,
    layer: int,
    block: Callable[..., object],
    argument: object,
    args: Args,
    kwargs: Kwargs,
) -> object:
    modules = state.modules
    spec = modules.spec
    token_format = spec.token_format
    positions = state.positions
    if positions is not None:
        positions = token_format.positions_in_place(positions, state.num_tokens)
    args, kwargs = _select_active(state, layer, positions, args, kwargs)
    log_sizes = state.log_sizes()
    if log_sizes is not None:
        log_sizes = token_format.in_place(log_sizes)
    tokens: object | None = None
    if state.active is not None:  # the argument is the map that the model carries
        tokens = token_format.encode(state.active, argument)
    elif modules.config.windows is not None:
        argument = state.before_block(layer, token_format.decode(argument))
    packs = positions is not None and spec.argument_rule.packed_axis is not None
    is_read = layer in state.options.maps
    biased = positions if spec.has_bias else None
    if is_read or packs or any(value is not None for value in (log_sizes, biased, tokens)):
        kwargs["cropr_inputs"] = BlockInputs(
            log_sizes,
            biased,
            state.num_images if packs else None,
            tokens,
            state.full_map if is_read else None,
        )
    output = _call(modules, block, argument, args, kwargs)
    active = token_format.decode(output)
    if not state.options.maps:
        return token_format.encode(state.after_block(layer, active), output)
    if is_read and state.positions is not None:
        active = state.ops.gather(active, state.positions)
    state.active = state.after_block(layer, active)
    if layer == state.last_layer or not is_read:
        return token_format.encode(state.active, output)
    return output


def _call(
    modules: PruningModules,
    block: Callable[..., object],
    argument: object,
    args: Args,
    kwargs: Kwargs,
) -> object:
    if modules.recompute and modules.training:
        return checkpoint(block, argument, *args, use_reentrant=False, **kwargs)  # type: ignore[call-overload]
    return block(argument, *args, **kwargs)


def _run_on_map(
    state: WindowedState,
    layer: int,
    block: Callable[..., object],
    argument: object,
    args: Args,
    kwargs: Kwargs,
) -> object:
    """`_run_and_prune` for a block over maps: until tokens are pruned it takes the map, then the
    active tokens (B, K, D)."""
    modules = state.modules
    token_format = modules.spec.token_format
    is_read = layer in state.options.maps
    is_full = state.positions is None
    if not is_full:
        rows = state.rows((modules.spec.map_blocks or [])[layer])
        full_map = partial(_full_map, state) if is_read else None
        inputs = BlockInputs(None, None, None, state.active, full_map, rows)
        kwargs = {**kwargs, "cropr_inputs": inputs}
    output = _call(modules, block, argument, args, kwargs)
    if is_full or is_read:
        tokens = token_format.decode(output)
        if state.positions is not None:
            tokens = state.ops.gather(tokens, state.positions)
    else:
        tokens = tokens_of(output)
    active = state.after_block(layer, tokens)
    state.active = active if state.options.maps and state.positions is not None else None
    if active is tokens or (is_read and layer != state.last_layer):
        return output
    if state.positions is None:
        return token_format.encode_map(active, output, state.require_grid())
    return (active, *output[1:]) if isinstance(output, tuple) else active


def _full_map(state: WindowedState, x: Tensor) -> Tensor:
    """The map of all tokens at block output x (B, K, D), as the model passes it."""
    token_format = state.modules.spec.token_format
    return tokens_of(token_format.encode_map(state.full_map(x), None, state.require_grid()))


def _engine_runs(state: PruningState, x: Tensor, args: Args, kwargs: Kwargs) -> bool:
    """Tell whether the engine may run this forward, and supports the arguments of its blocks."""
    modules = state.modules
    options = state.options
    if (
        modules.engine is None
        or modules.training
        or state.predicts
        or (options.collect and state.budget() is None)
        or state.portable
        or _exporting()
    ):
        return False
    if options.maps or options.restore:
        return False
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return False
    return not has_tensors(args, kwargs) and modules.engine_is_clear()


def _exporting() -> bool:
    """Tell whether torch.export traces (its default, non-strict way): exported programs hold the
    functional ops."""
    # Dynamo up to torch 2.11 takes is_exporting() for true in torch.compile as well.
    return not torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting()


def _rotary(state: PruningState, kwargs: Kwargs) -> Rotary | None:
    table = next((kwargs[name] for name in ROTARY_TABLES if kwargs.get(name) is not None), None)
    if table is None:
        return None
    rows: Any = table[0] if isinstance(table, tuple) else table
    has_prefix = rows.shape[-2] == state.num_tokens  # as in `rotary_at`
    return Rotary(table, None, 0 if has_prefix else state.num_prefix)


def _select_active(
    state: PruningState, layer: int, positions: Tensor | None, args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs]:
    """Reduce rotary tables and masks among a block's arguments to the rows of the active tokens."""
    spec = state.modules.spec
    if spec.has_bias or (positions is None and state.config.windows is None):
        return args, dict(kwargs)
    rows = partial(state.rotary_rows, layer, positions)
    selection = Selection(positions, state.num_tokens, state.num_prefix, rows, spec.argument_rule)
    return select_arguments(spec.blocks[layer], args, kwargs, selection)
