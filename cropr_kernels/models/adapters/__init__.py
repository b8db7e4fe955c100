"""Model families, one file each: an `Adapter`."""

from typing import Protocol

from torch import nn

from . import reference, timm, torchvision, transformers
from .base import BlockParts as BlockParts
from .base import EngineRefusal as EngineRefusal
from .base import ModelSpec as ModelSpec
from .base import Submodule as Submodule
from .base import is_hooked as is_hooked
from .base import require_plain


class Adapter(Protocol):
    """A module for one family."""

    SUPPORTED: str  # the family's name in the error for unknown models

    def find(self, model: nn.Module) -> ModelSpec | None:
        """Specify a model of the family; None for any other."""

    def parts(self, block: nn.Module) -> BlockParts | None:
        """Name the parts of a block of the family; raise `EngineRefusal` if the engine cannot run it."""


ADAPTERS: tuple[Adapter, ...] = (reference, timm, transformers, torchvision)


def find_spec(model: nn.Module) -> ModelSpec:
    """Specify a model for pruning.

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
    """Return all blocks of a model as the engine runs them.

    Raises:
        EngineRefusal: it cannot run one; the message has the first, and the reason.
    """
    blocks: list[BlockParts] = []
    for layer, block in enumerate(spec.blocks):
        try:
            parts = _parts_of(block)
            require_plain(parts)
        except EngineRefusal as refusal:
            raise EngineRefusal(f"block {layer}: {refusal}") from None
        blocks.append(parts)
    return blocks


def _parts_of(block: nn.Module) -> BlockParts:
    for adapter in ADAPTERS:
        parts = adapter.parts(block)
        if parts is not None:
            return parts
    raise EngineRefusal(f"{type(block).__module__}.{type(block).__name__} is not a block it knows")
