"""Model families, one file each.

Each has SUPPORTED, the family's name in the error for unknown models; find(model), its `ModelSpec`, or None if the
model is of another family; and parts(block), the `BlockParts` with which the engine runs a block, why it cannot, or
None.
"""

from typing import Any

from torch import nn

from . import reference, timm, torchvision, transformers
from .base import BlockParts as BlockParts
from .base import ModelSpec as ModelSpec
from .base import engine_refusal
from .base import is_hooked as is_hooked

ADAPTERS: tuple[Any, ...] = (reference, timm, transformers, torchvision)


def find_spec(model: nn.Module) -> ModelSpec:
    """What pruning must know of a model.

    Raises:
        TypeError: no adapter knows its family; the message says what one would need.
        ValueError: the family is known, and this model of it cannot be pruned.
    """
    for adapter in ADAPTERS:
        spec = adapter.find(model)
        if spec is not None:
            return spec
    for path, module in model.named_modules():
        if path and any(adapter.find(module) is not None for adapter in ADAPTERS):
            raise TypeError(
                f"cropr.apply: {type(model).__name__} is a module around a model; give cropr.apply the one at .{path}, "
                f"{type(module).__name__}"
            )
    raise TypeError(
        f"cropr.apply: no adapter for {type(model).__module__}.{type(model).__name__}; supported are "
        f"{', '.join(adapter.SUPPORTED for adapter in ADAPTERS)}. An adapter needs a list of blocks, each called with "
        "the tokens (B, N, D), and to know how many of the first tokens are no patches"
    )


def block_parts(block: Any) -> BlockParts | str:
    """The block as the engine runs it, or why the engine cannot."""
    for adapter in ADAPTERS:
        parts = adapter.parts(block)
        if isinstance(parts, BlockParts):
            return engine_refusal(parts) or parts
        if parts is not None:
            return parts
    return f"{type(block).__module__}.{type(block).__name__} is not a block it knows"


def engine_parts(spec: ModelSpec) -> list[BlockParts] | str:
    """All blocks of a model as the engine runs them, or the first one that it cannot run, and why."""
    found: list[BlockParts] = []
    for layer, block in enumerate(spec.blocks):
        parts = block_parts(block)
        if isinstance(parts, str):
            return f"block {layer}: {parts}"
        found.append(parts)
    return found
