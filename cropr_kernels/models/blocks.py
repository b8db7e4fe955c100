"""Pre-norm blocks taken apart, for those who must reach inside: the engine, and merging, whose attention weighs tokens
by how many they stand for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ops = torch.ops.cropr
_LARGEST_HEAD = 256  # FlashAttention's limit
_EXTRA = 8  # columns that the dimension of log(size) takes: rows stay multiples of 16 bytes


class Rotary(NamedTuple):
    """Rotary positions of the tokens alive: table (patches, 2 C) by position, never gathered per image."""

    table: Tensor
    idx: Tensor | None
    num_prefix: int

    def rotate_(self, heads: Tensor, *, half: bool = False) -> None:
        """Turn queries or keys (B, H, K, C) in place."""
        ops.rotate_(heads.transpose(1, 2), self.table, self.idx, self.num_prefix, half)


def takes_extra_dimension(width: int, dtype: torch.dtype) -> bool:
    """Whether heads of this width leave FlashAttention room for log(size): 16-bit, and at most 248 wide."""
    return dtype in (torch.float16, torch.bfloat16) and width + _EXTRA <= _LARGEST_HEAD


def attention_by_dimension(q: Tensor, k: Tensor, v: Tensor, log_sizes: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Proportional attention in which log(size) is one more dimension of q and k, so that no mask is needed.

    q holds ones there, and k log(size) over the scale, which stays that of the original heads. k holds it in two
    parts, so that 16-bit keys lose nothing of it.
    """
    width = q.shape[-1]
    bias = (log_sizes * width**0.5).unsqueeze(1).expand(k.shape[:3])
    high = bias.to(k.dtype)
    low = (bias - high).to(k.dtype)
    ones = q.new_ones(1).expand(*q.shape[:3], 2)
    q, v = torch.cat([q, F.pad(ones, (0, _EXTRA - 2))], -1), F.pad(v, (0, _EXTRA))
    k = torch.cat([k, F.pad(torch.stack([high, low], -1), (0, _EXTRA - 2))], -1)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=width**-0.5)[..., :width]


def attention_by_bias(q: Tensor, k: Tensor, v: Tensor, log_sizes: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Proportional attention in which log(size) is an additive mask, the same for every query."""
    mask = log_sizes.to(q.dtype)[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


def proportional_attention(
    q: Tensor, k: Tensor, v: Tensor, log_sizes: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(C) + log(size)) v: a token of size s weighs as much as s equal tokens (ToMe, section 3).

    On CUDA in 16 bits log(size) is one more dimension, and FlashAttention stays; elsewhere, and for heads that leave
    no room, it is a bias, which on a CPU costs less than copying q, k and v.

    Args:
        q, k, v: (B, H, K, C).
        log_sizes: (B, K) float32; without it this is plain attention.
    """
    if log_sizes is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    if q.is_cuda and takes_extra_dimension(q.shape[-1], q.dtype):
        return attention_by_dimension(q, k, v, log_sizes, dropout_p)
    return attention_by_bias(q, k, v, log_sizes, dropout_p)


@dataclass(frozen=True)
class AttentionParts:
    """Multi-head self-attention around its softmax; every function takes the attention module first."""

    project: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]  # h (B, K, D) -> q, k, v (B, H, K, C)
    turn: Callable[[Any, Tensor, Tensor, int], Tensor]  # q or k, rotary rows, P -> the same with rotary positions
    close: Callable[[Any, Tensor], Tensor]  # heads side by side (B, K, H C) -> update (B, K, D)


@dataclass(frozen=True)
class FusedBlock:
    """A pre-norm block x + g1 * attention(norm1(x)), x + g2 * mlp(norm2(x)), as the engine runs it.

    Modules are looked up in `block` at every call, so replaced parameters are seen.
    """

    block: Any  # with norm1, norm2 (LayerNorm), attn and mlp
    scales: Callable[[Any], tuple[Tensor | None, Tensor | None]]  # block -> LayerScale's g1, g2
    parts: AttentionParts | str  # or why the attention cannot be taken apart

    def attention(
        self, h: Tensor, rotary: Rotary | None, log_sizes: Tensor | None = None, *, keys: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The update of the attention (B, K, D); and, if asked for, the mean over heads of its keys (B, K, C).

        For inference: rotary positions are applied in place.
        """
        attn = self.block.attn
        if isinstance(self.parts, str) or not (keys or rotary is not None or log_sizes is not None):
            if rotary is None:
                return attn(h), None
            table = rotary.table
            return attn(h, rope=table if rotary.idx is None else rope_at(table, rotary.idx, rotary.num_prefix)), None
        q, k, v = self.parts.project(attn, h)
        features = k.mean(1) if keys else None
        if rotary is not None:
            half = getattr(attn, "rotate_half", False)
            rotary.rotate_(q, half=half)
            rotary.rotate_(k, half=half)
        out = proportional_attention(q.type_as(v), k.type_as(v), v, log_sizes)
        return self.parts.close(attn, out.transpose(1, 2).flatten(2)), features

    def sized(
        self, x: Tensor, rope: Tensor | None, num_prefix: int, log_sizes: Tensor | None, *, keys: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The whole block with proportional attention, functional and differentiable; keys as in `attention`.

        Args:
            x: (B, K, D).
            rope: rotary rows of the patches of x, if the model has any.
            log_sizes: (B, K) float32, or None.
        """
        block, parts = self.block, self.parts
        if isinstance(parts, str):
            raise ValueError(f"merging: the attention of a block cannot be taken apart: {parts}")
        scale1, scale2 = self.scales(block)
        q, k, v = parts.project(block.attn, block.norm1(x))
        features = k.mean(1) if keys else None
        if rope is not None:
            q, k = (parts.turn(block.attn, heads, rope, num_prefix) for heads in (q, k))
        dropout = getattr(getattr(block.attn, "attn_drop", None), "p", 0.0) if block.training else 0.0
        out = proportional_attention(q.type_as(v), k.type_as(v), v, log_sizes, dropout)
        update = parts.close(block.attn, out.transpose(1, 2).flatten(2))
        x = x + block.drop_path1(update if scale1 is None else update * scale1)
        update = block.mlp(block.norm2(x))
        return x + block.drop_path2(update if scale2 is None else update * scale2), features


def rope_at(rope: Tensor, positions: Tensor, num_prefix: int) -> Tensor:
    """Rows of a rotary table for the patches at `positions` (B, K): (B, 1, K - P, C).

    The table is (patches, C), or (B, patches, C) where the images of a batch have their own.
    """
    rows = positions[:, num_prefix:] - num_prefix
    if rope.ndim == 3:
        return rope.gather(1, rows.unsqueeze(-1).expand(-1, -1, rope.shape[-1])).unsqueeze(1)
    return rope[rows].unsqueeze(1)


def why_not_fused(block: Any) -> str | None:
    """What keeps a block with norm1, attn, norm2 and mlp out of the engine; None if nothing does."""
    for name in ("norm1", "norm2"):
        norm = getattr(block, name)
        if type(norm).__name__ != "LayerNorm" or not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1:
            return f"{name} is {type(norm).__name__}, not LayerNorm over the width"
    for name in ("", "norm1", "norm2", "ls1", "ls2", "drop_path1", "drop_path2"):
        module = getattr(block, name) if name and hasattr(block, name) else block
        if module._forward_hooks or module._forward_pre_hooks:
            return f"forward hooks on {name or 'the block'}"
    return None
