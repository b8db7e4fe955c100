"""Model families: an `Adapter` each for those whose attributes tell all, and probing for all
others."""

from typing import Protocol

from torch import Tensor, nn

from ..probing import ProbeError
from . import reference, timm, torchvision, transformers
from .base import BlockParts as BlockParts
from .base import EngineRefusal as EngineRefusal
from .base import MapBlock as MapBlock
from .base import ModelSpec as ModelSpec
from .base import Submodule as Submodule
from .base import is_hooked as is_hooked
from .base import require_plain
from .structure import examples_of, probe


class Adapter(Protocol):
    """A module for one family."""

    def find(self, model: nn.Module) -> ModelSpec | None:
        """Specify a model of the family; None for any other."""

    def parts(self, block: nn.Module) -> BlockParts | None:
        """Name the parts of a block of the family; raise `EngineRefusal` if the engine cannot run
        it."""


ADAPTERS: tuple[Adapter, ...] = (reference, timm, torchvision)


def find_spec(model: nn.Module, example: Tensor | None = None) -> ModelSpec:
    """Specify a model for pruning, by its attributes if its family is known, else by a few forwards
    of a random image.

    Args:
        model: a Vision Transformer of timm, Hugging Face, torchvision or this package, or any other
            that calls its blocks one after the other with tokens (B, N, D) or maps (B, H, W, D).
            Hugging Face models with text may be given whole.
        example: (B, C, H, W), images as the model takes them, for one that is not known; default:
            of the size that its attributes or its configuration name.

    Raises:
        TypeError: it cannot be pruned; the message is the reason.
        ValueError: the family is known, and this model of it cannot be pruned.
    """
    for adapter in ADAPTERS:
        spec = adapter.find(model)
        if spec is not None:
            return spec
    pruned = getattr(getattr(model, "cropr", None), "spec", None)
    if isinstance(pruned, ModelSpec):
        return pruned
    if transformers.is_model(model):
        return transformers.find(model, example)
    for path, module in model.named_modules():
        if path and (
            transformers.is_model(module)
            or any(adapter.find(module) is not None for adapter in ADAPTERS)
        ):
            raise TypeError(
                f"cropr.apply: {type(model).__name__} is a module around a model; give "
                f"cropr.apply the one at .{path}, "
                f"{type(module).__name__}"
            )
    reason = ""
    for images in examples_of(model) if example is None else [example[:1]]:
        try:
            return probe(model, model, images)
        except ProbeError as error:
            reason = str(error)
    raise TypeError(
        f"cropr.apply: {type(model).__module__}.{type(model).__name__} cannot be pruned: {reason}"
    )


def engine_parts(spec: ModelSpec) -> list[BlockParts]:
    """Return all blocks of a model as the engine runs them.

    Raises:
        EngineRefusal: it cannot run one; the message has the first, and the reason.
    """
    if spec.engine_refusal:
        raise EngineRefusal(spec.engine_refusal)
    blocks: list[BlockParts] = []
    for layer, block in enumerate(spec.blocks):
        try:
            parts = _parts_of(block) if spec.engine is None else spec.engine[layer]
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
