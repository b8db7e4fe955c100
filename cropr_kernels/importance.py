"""The attention of the output to each patch, from the attention calls of a block of any library."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .models.adapters import MapBlock
from .models.blocks import is_attention_softmax
from .models.tiling import Tiling
from .models.token_format import TokenFormat


class AttentionInput(NamedTuple):
    """The tensors from which the probabilities of one attention follow."""

    query: Tensor  # (B, heads, N, C)
    key: Tensor
    bias: Tensor | None = None  # of the logits, (B or 1, heads or 1, N or 1, N)
    scale: float | None = None  # of query times key; None: C^-0.5


def attention_prefix_first(
    attention: AttentionInput | Tensor, token_format: TokenFormat
) -> AttentionInput | Tensor:
    """Order the tokens of an attention as pruning does."""
    if token_format.around is None:
        return attention

    def ordered(values: Tensor, dim: int) -> Tensor:
        if values.shape[dim] == 1:
            return values
        return token_format.prefix_first(values.transpose(1, dim)).transpose(1, dim)

    if isinstance(attention, Tensor):
        return ordered(ordered(attention, 2), 3)
    bias = None if attention.bias is None else ordered(ordered(attention.bias, 2), 3)
    return attention._replace(
        query=ordered(attention.query, 2), key=ordered(attention.key, 2), bias=bias
    )


class AttentionInputs(TorchFunctionMode):
    """Records every attention: scaled_dot_product_attention, nn.MultiheadAttention, a softmax over
    (B, heads, N, N)."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[AttentionInput | Tensor] = []  # of one that is written out its logits

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        if func is F.scaled_dot_product_attention:
            self.inputs.append(_attention_input(*args, **(kwargs or {})))
        elif func is F.multi_head_attention_forward:  # a mode does not see its calls
            query, key, _, dim, num_heads, weight, bias = args[:7]  # (N, B, D)
            q_bias, k_bias = (None, None) if bias is None else (bias[:dim], bias[dim : 2 * dim])
            q = F.linear(query, weight[:dim], q_bias).unflatten(2, (num_heads, -1))
            k = F.linear(key, weight[dim : 2 * dim], k_bias).unflatten(2, (num_heads, -1))
            self.inputs.append(AttentionInput(q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3)))
        elif is_attention_softmax(func, args):
            self.inputs.append(args[0])
        return func(*args, **(kwargs or {}))


def _attention_input(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionInput:
    """The arguments of scaled_dot_product_attention; keys are one for each head, masks a bias."""
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    if is_causal:
        attn_mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = query.new_zeros(attn_mask.shape).masked_fill(~attn_mask, float("-inf"))
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    return AttentionInput(query, key, attn_mask, scale)


def importance(attention: AttentionInput | Tensor, num_prefix: int, *, class_token: bool) -> Tensor:
    """Compute the attention of the output to each patch: (B, patches) float32, each row sums to
    one.

    Attention probabilities, averaged over heads and over the tokens that the head pools: the first
    with a class token, else all patches, those after the P = num_prefix first tokens. Query and key
    are as they enter the attention, rotary positions applied; logits (B, heads, N, N) stand for
    both.
    """
    rows = slice(None, 1) if class_token else slice(num_prefix, None)
    if isinstance(attention, Tensor):
        probabilities = attention[:, :, rows].float().softmax(-1).mean((1, 2))[:, num_prefix:]
    else:
        scale = attention.query.shape[-1] ** -0.5 if attention.scale is None else attention.scale
        pooled = attention.query[:, :, rows].float()
        bias = (
            [None] * len(pooled)
            if attention.bias is None
            else _rows_of(attention.bias, rows, len(pooled))
        )
        # An image at a time: for the queries of all patches this is the full attention matrix.
        images = zip(pooled, attention.key.float().transpose(-2, -1), bias)
        logits = (q @ k * scale if b is None else q @ k * scale + b for q, k, b in images)
        probabilities = torch.stack([values.softmax(-1).mean((0, 1)) for values in logits])[
            :, num_prefix:
        ]
    return probabilities / probabilities.sum(1, keepdim=True).clamp_min(
        torch.finfo(torch.float32).tiny
    )


def _rows_of(bias: Tensor, rows: slice, num_images: int) -> Tensor:
    """The rows of a bias (B or 1, heads or 1, N or 1, N), one entry an image."""
    bias = bias if bias.shape[2] == 1 else bias[:, :, rows]
    return bias.float().expand(num_images, -1, -1, -1)


def map_importance(block: MapBlock, x: Tensor, tiling: Tiling) -> Tensor:
    """The mean attention of the patches x (1, N, D) of a map to each other, (1, N) float32, as a
    share of that to its window."""
    if block.window:
        rows = [tiling.window_rows(group, None) for group in tiling.groups]
    else:
        rows = [tiling.map_rows(torch.arange(x.shape[1], device=x.device).unsqueeze(0))]
    received: list[Tensor] = []
    for group, heads in zip(rows, block.heads(x, rows)):
        logits = heads.query.float() @ heads.key.float().transpose(2, 3)
        logits = logits * heads.query.shape[-1] ** -0.5
        if heads.bias is not None:
            logits = logits + heads.bias
        received.append(logits.softmax(-1).mean((1, 2))[:, : group.length].reshape(1, -1))
    values = torch.cat(received, 1)
    return _shares(values if block.window else values[:, tiling.order], tiling)


def importance_of_windows(values: Tensor, tiling: Tiling) -> Tensor:
    """Importance (B, N) as a share of that of its window, from (windows of a batch, patches) or
    (B, N)."""
    num_patches = len(tiling.order)
    if values.shape[1] == num_patches:
        return _shares(values[:, tiling.order], tiling)
    return _shares(values.reshape(-1, num_patches), tiling)


def _shares(values: Tensor, tiling: Tiling) -> Tensor:
    """Importance (B, N) in the order of a map, each window sums to one, from that window by
    window."""
    parts = values.split([group.cells.numel() for group in tiling.groups], 1)
    windows = [part.unflatten(1, group.cells.shape) for part, group in zip(parts, tiling.groups)]
    shares = [(part / part.sum(2, keepdim=True)).flatten(1) for part in windows]
    return torch.cat(shares, 1)[:, tiling.order.argsort()]
