"""Attributes of a model that pruning changes, and `remove` restores."""

from functools import partial

from torch import nn

from .model import MAP_METHODS, CroprModules, ReplacedAttribute, with_full_maps


class _Absent:
    """The value of an attribute that only its class had."""


def replace_attributes(modules: CroprModules) -> None:
    """Replace attributes of the model that pruning changes."""
    switch_off_random(modules)
    if modules.config.windows is not None:
        for block in modules.spec.blocks:  # rotary positions start at the first token now
            attn: nn.Module = block.attn  # type: ignore[assignment]
            for name in ("num_prefix", "num_prefix_tokens"):
                if hasattr(attn, name):
                    _replace(modules, attn, name, 0)
    encoder = modules.spec.encoder
    # Of timm; around the block alone: pruning decides once
    if hasattr(encoder, "grad_checkpointing"):
        modules.recompute = bool(encoder.grad_checkpointing)
        _replace(modules, encoder, "grad_checkpointing", False)
        _replace(modules, encoder, "set_grad_checkpointing", partial(_set_recompute, modules))
    for name in MAP_METHODS:
        if hasattr(encoder, name):
            _replace(modules, encoder, name, partial(with_full_maps, modules, encoder, name))


def switch_off_random(modules: CroprModules) -> None:
    """Switch off stochastic depth in the last blocks, where dropping one for some images would drop
    the fusion, and it and dropout in blocks over maps, which run from their parts."""
    spec = modules.spec
    last = spec.blocks[len(spec.blocks) - modules.config.full_blocks :]
    for block in last if spec.map_blocks is None else spec.blocks:
        for module in block.modules():
            if getattr(module, "drop_prob", 0.0):
                _replace(modules, module, "drop_prob", 0.0)
    for block in () if spec.map_blocks is None else spec.blocks:
        for module in block.modules():
            for name in ("p", "dropout"):
                if isinstance(value := getattr(module, name, None), float) and value:
                    _replace(modules, module, name, 0.0)


def restore_attributes(modules: CroprModules) -> None:
    """Undo `replace_attributes` and `switch_off_random`."""
    for module, name, value in reversed(modules.replaced):
        if value is _Absent:
            delattr(module, name)
        else:
            setattr(module, name, value)
    encoder = modules.spec.encoder
    if hasattr(encoder, "grad_checkpointing"):
        encoder.grad_checkpointing = modules.recompute  # type: ignore[assignment]


def _set_recompute(modules: CroprModules, enable: bool = True) -> None:
    modules.recompute = enable


def _replace(modules: CroprModules, module: nn.Module, name: str, value: object) -> None:
    modules.replaced.append(ReplacedAttribute(module, name, vars(module).get(name, _Absent)))
    setattr(module, name, value)
