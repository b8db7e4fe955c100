"""Attention of blocks over maps (B, height, width, D), for any part of the tokens.

Relative and rotary positions follow from the coordinates of each token. Windows that reach over the
edge of the map keep the keys of the cells there, whose input is zero.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tiling import AttentionRows

_OUTPUTS = ("proj", "o_proj", "out_proj")  # names of the last layer of an attention


class Heads(NamedTuple):
    """The tensors of one attention: of K tokens, and of these and the cells over the edge."""

    query: Tensor  # (rows, heads, K, C)
    key: Tensor  # (rows, heads, keys, C)
    value: Tensor
    bias: Tensor | None  # of the logits, (rows, heads or 1, K or 1, keys)


def attend(
    block: nn.Module, attn: nn.Module, num_heads: int, h: Tensor, rows: Sequence[AttentionRows]
) -> Tensor:
    """Compute the update (B, N, D) of normalized tokens h (B, N, D), which stand in these rows one
    after the other.

    Raises:
        AttributeError: the attention has layers of other names.
    """
    outputs = []
    for heads in heads_of(block, attn, num_heads, h, rows):
        output = F.scaled_dot_product_attention(
            heads.query, heads.key, heads.value, attn_mask=heads.bias
        )
        output = output.transpose(1, 2).flatten(2)
        outputs.append(output.reshape(len(h), -1, output.shape[2]))
    name = next((name for name in _OUTPUTS if hasattr(attn, name)), _OUTPUTS[0])
    return getattr(attn, name)(torch.cat(outputs, 1))


def heads_of(
    block: nn.Module, attn: nn.Module, num_heads: int, h: Tensor, rows: Sequence[AttentionRows]
) -> Iterator[Heads]:
    """Yield queries, keys and values of normalized tokens h (B, N, D), one group of rows after the
    other."""
    projected = _project(attn, num_heads, h)
    zero = None
    start = 0
    for group in rows:
        end = start + group.per_image * group.length
        query, key, value = (
            part[:, start:end].unflatten(1, (group.per_image, -1)).flatten(0, 1).transpose(1, 2)
            for part in projected
        )
        start = end
        y = group.y
        x = group.x
        if group.over_edge is not None:
            if zero is None:
                zero = _project(attn, num_heads, h.new_zeros(1, 1, h.shape[2]))
            count = len(group.over_edge[0])
            y, x = (
                torch.cat([coordinates, edge.expand(len(coordinates), -1)], 1)
                for coordinates, edge in zip((y, x), group.over_edge)
            )
            key, value = (
                torch.cat([part, same.transpose(1, 2).expand(len(part), -1, count, -1)], 2)
                for part, same in zip((key, value), zero[1:])
            )
        bias = _relative_bias(attn, query, group, y, x)
        table = _rotary_table(block, attn, h)
        if table is not None:
            query = _rotate(query, table, group.y * group.area[1] + group.x)
            key = _rotate(key, table, y * group.area[1] + x)
        if group.log_sizes is not None:
            log_sizes = F.pad(group.log_sizes, (0, y.shape[1] - group.length)).to(query.dtype)
            bias = log_sizes[:, None, None] if bias is None else bias + log_sizes[:, None, None]
        yield Heads(query, key, value, bias)


def _project(attn: nn.Module, num_heads: int, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, N, heads, C) of normalized tokens h (B, N, D)."""
    layers: Any = attn
    if hasattr(attn, "qkv"):
        parts = layers.qkv(h).chunk(3, dim=-1)
    else:
        parts = layers.q_proj(h), layers.k_proj(h), layers.v_proj(h)
    query, key, value = (part.unflatten(-1, (num_heads, -1)) for part in parts)
    if getattr(attn, "q_norm", None) is not None:
        query = layers.q_norm(query)
    if getattr(attn, "k_norm", None) is not None:
        key = layers.k_norm(key)
    return query, key, value


def _relative_bias(
    attn: nn.Module, query: Tensor, group: AttentionRows, y: Tensor, x: Tensor
) -> Tensor | None:
    """The products of queries with the relative positions of keys at y and x, (rows, heads, K,
    keys); None if the attention has no tables of these."""
    if getattr(attn, "rel_pos_h", None) is None:
        return None
    bias: Tensor | None = None
    for name, side, ends, starts in (
        ("rel_pos_h", group.area[0], group.y, y),
        ("rel_pos_w", group.area[1], group.x, x),
    ):
        products = query @ _resized(getattr(attn, name), 2 * side - 1).transpose(0, 1)
        distances = ends.unsqueeze(2) - starts.unsqueeze(1) + side - 1
        index = distances.unsqueeze(1).expand(*query.shape[:3], -1)
        term = products.gather(3, index)
        bias = term if bias is None else bias + term
    return bias


def _resized(table: Tensor, length: int) -> Tensor:
    """A table (distances, C) for another number of distances."""
    if len(table) == length:
        return table
    rows = table.transpose(0, 1).unsqueeze(0)
    return F.interpolate(rows, size=length, mode="linear")[0].transpose(0, 1)


def _rotary_table(block: nn.Module, attn: nn.Module, h: Tensor) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines (cells, C) of a window or a map, if positions are rotary."""
    layers: Any = attn
    owner: Any = block
    if getattr(attn, "rope", None) is not None:
        sin, cos = layers.rope.get_embed().chunk(2, -1)
        return cos, sin
    if getattr(block, "rotary_emb", None) is not None:
        cos, sin = owner.rotary_emb(h, owner.position_ids)
        return cos.flatten(0, -2), sin.flatten(0, -2)
    return None


def _rotate(heads: Tensor, table: tuple[Tensor, Tensor], cells: Tensor) -> Tensor:
    """Turn pairs of channels of heads (rows, heads, K, C) by the angles of their cells (rows,
    K)."""
    cos, sin = (values[cells].unsqueeze(1) for values in table)
    x = heads.float()
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return (x * cos + turned * sin).to(heads.dtype)
