"""What pruning and the engine must know of a model, whatever its family."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..blocks import Rotary


@dataclass(frozen=True)
class ModelSpec:
    """A Vision Transformer as pruning sees it. Its own forward calls the blocks one after the other."""

    blocks: list[nn.Module]
    projection: nn.Module  # its output (B, D, grid height, grid width) is the patch grid
    norm: nn.Module  # the last norm of the tokens
    tower: nn.Module  # what is called with the images
    num_prefix: int  # P, first tokens that are no patches
    dim: int
    num_heads: int
    patch_size: tuple[int, int]
    grid: tuple[int, int]  # patches in height and width at the model's own image size
    num_classes: int  # 0: it has no classifier
    class_token: bool  # the head looks at the class token; else at the patches
    pooling: Literal["token", "average", "other"]  # what the head makes of the tokens
    returns_tokens: bool  # the output also holds the tokens, or the head reads the patches
    needs_map: bool = False  # the head puts all patches back to where they were
    refusal: str | None = None  # why single patches cannot be named by their place in the image


@dataclass(frozen=True)
class BlockParts:
    """A pre-norm block x + g1 * attention(norm1(x)), x + g2 * mlp(norm2(x)), as the engine runs it.

    Modules are looked up in `block` at every call, so replaced parameters are seen.
    """

    block: Any
    norm1: str  # names of its modules
    norm2: str
    attn: str
    attend: Callable[[Any, Tensor, Rotary | None, Tensor | None], Tensor]  # attn, h, rotary, log_sizes -> update
    scales: Callable[[Any], tuple[Tensor | None, Tensor | None]]  # block -> LayerScale's g1, g2
    opened: tuple[str, ...] = ()  # parts of the attention that `attend` looks into

    def watched(self) -> list[tuple[nn.Module, str, nn.Module]]:
        """Modules that the engine opens or passes by, each with its owner and name there."""
        attn = getattr(self.block, self.attn)
        mlp = self.block.mlp  # is called, as what it holds is
        owned = [(owner, name, child) for owner in (self.block, attn) for name, child in owner.named_children()]
        return [(owner, name, child) for owner, name, child in owned if child is not mlp]


def known_classes(module: str, *names: str) -> tuple[type, ...]:
    """Classes of a module that is already imported: nobody has one of them otherwise."""
    return tuple(cls for name in names if (cls := getattr(sys.modules.get(module), name, None)) is not None)


def pair(value: Any) -> tuple[int, int]:
    """Height and width from one number or two."""
    return (value[0], value[1]) if isinstance(value, list | tuple) else (value, value)


def own_class(module: nn.Module) -> type:
    """The class of a block as its library defines it: pruned blocks are of a subclass."""
    return getattr(type(module), "cropr_base", type(module))


class EngineRefusal(Exception):
    """Why the engine leaves a block to its own forward."""


def require_plain(parts: BlockParts) -> None:
    """Raise EngineRefusal where somebody has put other layers, hooks or parametrizations into a block."""
    for name in (parts.norm1, parts.norm2):
        norm = getattr(parts.block, name)
        if type(norm).__name__ != "LayerNorm" or not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1:
            raise EngineRefusal(f"{name} is {type(norm).__name__}, not LayerNorm over the width")
    for name in parts.opened:
        module = getattr(getattr(parts.block, parts.attn), name, None)
        if module is not None and type(module) not in (nn.Linear, nn.LayerNorm, nn.Identity):
            raise EngineRefusal(f"{name} is {type(module).__name__}")
    for module in (parts.block, *(module for _, _, module in parts.watched())):
        if is_hooked(module):
            raise EngineRefusal(f"forward hooks on {type(module).__name__}")
        if "parametrizations" in module._modules:
            raise EngineRefusal(f"a parametrization of {type(module).__name__}")


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody listens to a module, or has put another forward in its place."""
    if module._forward_hooks or module._forward_pre_hooks:
        # transformers leaves hooks on its blocks that do nothing until hidden states are asked for, `apply` its own.
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        owners = (getattr(getattr(hook, "func", hook), "__module__", "") for hook in hooks)
        return not all(owner.startswith(("transformers.", "cropr_kernels.pruning.model")) for owner in owners)
    return "forward" in module.__dict__
