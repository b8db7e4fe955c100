"""Blocks for the engine by the roles of their modules."""

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import ROTARY_TABLES, has_tensors
from ..blocks import Segments, SizeWeightedAttention, proportional_attention
from ..norms import norm_parameters
from ..probing import BlockCall
from ..rotary import Rotary
from .base import BlockParts, EngineRefusal, base_class

_MLPS = ("mlp", "ffn", "feed_forward", "feedforward")


def find_parts(call: BlockCall, num_prefix: int) -> BlockParts:
    """Return the parts of a block that compute what it did in a call.

    Raises:
        EngineRefusal: none do.
    """
    candidates = candidates_of(call.block)
    if has_tensors(call.args, call.kwargs):
        raise EngineRefusal("its blocks take a mask, or a table by another name")
    for parts in candidates:
        if _computes(parts, call, num_prefix):
            return replace(parts, packs=_packs(parts, call, num_prefix))
    raise EngineRefusal(f"{base_class(call.block).__name__} is no pre-norm block")


def _computes(parts: BlockParts, call: BlockCall, num_prefix: int) -> bool:
    """Tell whether parts compute what a block did."""
    block = parts.block
    rotary = _rotary_of(call, num_prefix)
    gamma1, gamma2 = parts.scales(block)
    try:
        h = _normalize(call.x, getattr(block, parts.norm1))
        update = parts.attend(getattr(block, parts.attn), h, rotary, None)
        x = call.x + (update if gamma1 is None else update * gamma1)
        update = parts.run_mlp(block, _normalize(x, getattr(block, parts.norm2)))
        x = x + (update if gamma2 is None else update * gamma2)
    # Modules of other roles than their names say
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    if x.shape != call.tokens.shape:
        return False
    return call.is_close(x, call.tokens)


def _packs(parts: BlockParts, call: BlockCall, num_prefix: int) -> bool:
    """Tell whether the attention of parts takes the images of a batch in one row."""
    rotary = _rotary_of(call, num_prefix)
    attention = getattr(parts.block, parts.attn)
    h = _normalize(call.x, getattr(parts.block, parts.norm1))
    num_images, num_tokens, width = h.shape
    segments = Segments(torch.arange(num_images + 1, device=h.device) * num_tokens, num_tokens)
    positions = torch.arange(num_tokens, device=h.device).repeat(1, num_images)
    packed_rotary = None if rotary is None else rotary.with_prefix()._replace(idx=positions)
    try:
        expected = parts.attend(attention, h, rotary, None)
        packed = h.reshape(1, -1, width)
        update = parts.attend(attention, packed, packed_rotary, None, segments)
    except (RuntimeError, TypeError, ValueError):
        return False
    # Of the attention alone: LayerScale may leave little of it in the block's output
    return call.is_close(update.reshape(expected.shape), expected, expected)


def _rotary_of(call: BlockCall, num_prefix: int) -> Rotary | None:
    """The rotary positions of a call."""
    table = next(
        (call.kwargs[name] for name in ROTARY_TABLES if call.kwargs.get(name) is not None), None
    )
    return None if table is None else Rotary(table, None, num_prefix)


def _normalize(x: Tensor, norm: nn.Module) -> Tensor:
    """Normalize x (B, N, D) as the engine does."""
    return torch.ops.cropr.gather_norm(x, None, *norm_parameters(norm, x.dtype))


def candidates_of(block: nn.Module) -> list[BlockParts]:
    """Name the parts that a pre-norm block may have: two norms, an attention, an MLP, at most two
    factors of LayerScale.

    Raises:
        EngineRefusal: it has others.
    """
    children = dict(block.named_children())
    norms = [name for name, child in children.items() if "norm" in type(child).__name__.lower()]
    attentions = [
        name for name, child in children.items() if "attention" in type(child).__name__.lower()
    ]
    mlp = _mlp_of(children, {*norms, *attentions})
    if len(norms) != 2 or len(attentions) != 1 or not mlp:
        raise EngineRefusal(
            f"{base_class(block).__name__} has {len(norms)} norms, {len(attentions)} attentions "
            f"and {1 if mlp else 0} MLPs, not 2, 1 and 1"
        )
    known = {*norms, *attentions, *mlp}
    factors = [name for name, _ in block.named_parameters() if name.partition(".")[0] not in known]
    if len(factors) > 2:
        raise EngineRefusal(
            f"{base_class(block).__name__} has {len(factors)} parameters of its own, not 2 at most"
        )
    attention = children[attentions[0]]
    attend: Attend | AttendMultihead = AttendMultihead()
    if not isinstance(attention, nn.MultiheadAttention):
        attend = Attend("attention_mask" in inspect.signature(attention.forward).parameters)
    parts = BlockParts(
        block,
        norms[0],
        norms[1],
        attentions[0],
        attend,
        partial(_factors_at, (None, None)),
        norm_classes=(type(children[norms[0]]), type(children[norms[1]])),
        mlp=mlp,
    )
    orders = [(norms[0], norms[1]), (norms[1], norms[0])]
    return [
        replace(parts, norm1=norm1, norm2=norm2, scales=partial(_factors_at, scales))
        for norm1, norm2 in orders
        for scales in _scales_of(factors)
    ]


def _scales_of(factors: list[str]) -> Iterator[tuple[str | None, str | None]]:
    """The factors of the attention and of the MLP that a block may have."""
    first, second, *_ = *factors, None, None
    yield first, second
    if first is not None and second is None:
        yield None, first


def _mlp_of(children: dict[str, nn.Module], others: set[str]) -> tuple[str, ...]:
    """The MLP of a block: a module, or one that widens and one that narrows and adds its second
    argument."""
    named = tuple(name for name in children if name in _MLPS)
    if named:
        return named if len(named) == 1 else ()
    rest = [
        name
        for name, child in children.items()
        if name not in others and next(child.parameters(), None) is not None
    ]
    if len(rest) != 2:
        return ()
    num_arguments = [len(inspect.signature(children[name].forward).parameters) for name in rest]
    return tuple(rest) if num_arguments == [1, 2] else ()


def _factors_at(
    names: tuple[str | None, str | None], block: nn.Module
) -> tuple[Tensor | None, Tensor | None]:
    first, second = (None if name is None else block.get_parameter(name) for name in names)
    return first, second


@dataclass(frozen=True)
class Attend:
    """The call of an attention with its own forward; rotary tables as `position_embeddings`."""

    takes_mask: bool

    def __call__(
        self,
        attn: nn.Module,
        h: Tensor,
        rotary: Rotary | None,
        log_sizes: Tensor | None,
        segments: Segments | None = None,
    ) -> Tensor:
        kwargs: dict[str, object] = {"attention_mask": None} if self.takes_mask else {}
        if rotary is not None:
            kwargs["position_embeddings"] = rotary.rows()
        is_plain = log_sizes is None and segments is None
        mode = SizeWeightedAttention(log_sizes, segments=segments)
        with nullcontext() if is_plain else mode:
            output = attn(h, **kwargs)
        return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class AttendMultihead:
    """The computation of an nn.MultiheadAttention of one width, on h with the batch first."""

    def __call__(
        self,
        attn: nn.Module,
        h: Tensor,
        rotary: Rotary | None,
        log_sizes: Tensor | None,
        segments: Segments | None = None,
    ) -> Tensor:
        attention = cast(nn.MultiheadAttention, attn)
        projected = F.linear(h, attention.in_proj_weight, attention.in_proj_bias)
        heads = projected.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind()
        output = proportional_attention(q, k, v, log_sizes, segments=segments)
        return attention.out_proj(output.transpose(1, 2).flatten(2))
