"""Arguments of blocks beside the tokens: masks and rotary tables of the active tokens."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .blocks import mask_at
from .probing import Args, Kwargs

# Of timm and this package's ViT, and of Hugging Face
ROTARY_TABLES = ("rope", "position_embeddings")


@dataclass(frozen=True)
class ArgumentRule:
    """What arguments of blocks need beside a selection, as trials have shown."""

    # Tables are one for all images of a batch: their axis of tokens, from the end. Then all images
    # stand in one row, (1, B K, D).
    packed_axis: int | None = None
    # Index and name of the argument that takes the positions (B, K) of the tokens
    positions: tuple[int, str] | None = None


PLAIN = ArgumentRule()


class Selection(NamedTuple):
    """The active tokens among the N of a model."""

    positions: Tensor | None  # (B, K), as the model orders them; None with windows that have all
    num_tokens: int
    num_prefix: int
    rows: Callable[[Tensor], Tensor]  # of a rotary table
    rule: ArgumentRule


def parameters_of(block: nn.Module) -> list[str]:
    """The names of the arguments of a block's own forward."""
    return [*inspect.signature(getattr(type(block), "cropr_base", type(block)).forward).parameters][
        1:
    ]


def select_arguments(
    block: nn.Module, args: Args, kwargs: Kwargs, selection: Selection
) -> tuple[Args, dict[str, object]]:
    """Reduce masks and rotary tables among the arguments of a block to the active tokens.

    Keywords that the block's forward does not name pass: they are for others.

    Raises:
        ValueError: another tensor is among them.
    """
    chosen = tuple(_argument_at(value, selection) for value in args)
    named: dict[str, object] = {}
    for name, value in kwargs.items():
        if name in ROTARY_TABLES:
            named[name] = _rows_of(value, selection)
        elif _is_for_others(block, name, value):
            named[name] = value
        else:
            named[name] = _argument_at(value, selection)
    if selection.rule.positions is not None and selection.positions is not None:
        index, name = selection.rule.positions
        if index < len(chosen):
            chosen = (*chosen[:index], selection.positions, *chosen[index + 1 :])
        else:
            named[name] = selection.positions
    return chosen, named


def _is_for_others(block: nn.Module, name: str, value: object) -> bool:
    """Tell whether a keyword is a tensor of another shape than a mask, which the block's forward
    does not name."""
    if not isinstance(value, Tensor) or value.ndim == 4:
        return False
    return name not in parameters_of(block)


def _rows_of(value: object, selection: Selection) -> object:
    """The rows of the active tokens of a table, or of all in tuples and lists."""
    if isinstance(value, tuple | list):
        return type(value)(_rows_of(part, selection) for part in value)
    if not isinstance(value, Tensor):
        return value
    axis = selection.rule.packed_axis
    positions = selection.positions
    if axis is None or positions is None:
        return selection.rows(value)
    if value.ndim + axis == 0:
        return value[positions.flatten()]
    images = torch.arange(len(positions), device=value.device).unsqueeze(1)
    rows = value.expand(len(positions), *value.shape[1:])[images, positions]
    return rows.flatten(0, 1).unsqueeze(0)


def _argument_at(value: object, selection: Selection) -> object:
    """Select an attention mask (B or 1, heads or 1, queries or 1, N), or the rows of a table; other
    values pass."""
    if isinstance(value, tuple | list):
        return type(value)(_argument_at(part, selection) for part in value)
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if _is_table(value, selection):
        return _rows_of(value, selection)
    if value.ndim != 4 or selection.positions is None:
        raise ValueError(
            "cropr: a block of a pruned model is called with a tensor of shape "
            f"{tuple(value.shape)}; it may be a mask "
            "(B, 1, N, N), without window attention"
        )
    return mask_at(value, selection.positions)


def _is_table(value: Tensor, selection: Selection) -> bool:
    """Tell whether a tensor has a row for each token, or for each patch."""
    if value.ndim not in (2, 3):
        return False
    axis = selection.rule.packed_axis
    counts = (selection.num_tokens, selection.num_tokens - selection.num_prefix)
    return value.shape[-2 if axis is None else axis] in counts


def has_tensors(args: Args, kwargs: Kwargs) -> bool:
    """Tell whether a block takes more tensors than its tokens and rotary tables."""
    others = [value for name, value in kwargs.items() if name not in ROTARY_TABLES]
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves([args, others]))


def packed_axes(args: Args, kwargs: Kwargs, num_tokens: int) -> list[int]:
    """The axes, from the end, along which an argument of a block has a row for each token."""
    axes: dict[int, None] = {}
    for value in tree_leaves([args, dict(kwargs)]):
        if isinstance(value, Tensor) and value.ndim in (2, 3) and num_tokens in value.shape[:2]:
            axes[value.shape.index(num_tokens) - value.ndim] = None
    return [*axes]
