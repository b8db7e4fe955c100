"""Model families, one file each.

Each has SUPPORTED, the family's name in the error for unknown models; find(model), its `ModelSpec`, or None if the
model is of another family; and parts(block), the `BlockParts` with which the engine runs a block, or None; it raises
`EngineRefusal` for a block of the family that the engine cannot run.
"""

from typing import Any

from torch import nn

from . import reference, timm, torchvision, transformers
from .base import BlockParts as BlockParts
from .base import EngineRefusal as EngineRefusal
from .base import ModelSpec as ModelSpec
from .base import is_hooked as is_hooked
from .base import require_plain

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


def engine_parts(spec: ModelSpec) -> list[BlockParts]:
    """All blocks of a model as the engine runs them; EngineRefusal names the first one that it cannot run, and why."""
    found: list[BlockParts] = []
    for layer, block in enumerate(spec.blocks):
        try:
            parts = next((known for adapter in ADAPTERS if (known := adapter.parts(block)) is not None), None)
            if parts is None:
                raise EngineRefusal(f"{type(block).__module__}.{type(block).__name__} is not a block it knows")
            require_plain(parts)
        except EngineRefusal as refusal:
            raise EngineRefusal(f"block {layer}: {refusal}") from None
        found.append(parts)
    return found
