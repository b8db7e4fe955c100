"""Attention that weighs tokens by their size."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .packed_linear import is_plain_linear

ops = torch.ops.cropr
_LARGEST_HEAD = 256  # FlashAttention's limit
_EXTRA = 8  # columns for the dimension of log(size), so that rows stay multiples of 16 bytes


class TimmAttention(Protocol):
    """An attention with timm's names: its projections are one matrix `qkv`, or three if that is
    None."""

    num_heads: int
    qkv: nn.Linear | None
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    proj: nn.Linear

    def __call__(self, x: Tensor, /) -> Tensor: ...


def takes_extra_dimension(width: int, dtype: torch.dtype) -> bool:
    """Tell whether FlashAttention takes heads of this width with log(size): 16-bit, and at most 248
    wide."""
    return dtype in (torch.float16, torch.bfloat16) and width + _EXTRA <= _LARGEST_HEAD


def attention_by_dimension(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_sizes: Tensor,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Compute proportional attention with log(size) as one more dimension of q and k, so that no
    mask is needed.

    q holds ones there, and k log(size) over the scale, which stays that of the original heads. k
    holds it in two parts, so that 16-bit keys lose nothing of it.
    """
    width = q.shape[-1]
    scale = width**-0.5 if scale is None else scale
    ones = q.new_ones(1).expand(*q.shape[:3], 2)
    q = torch.cat([q, F.pad(ones, (0, _EXTRA - 2))], -1)
    v = F.pad(v, (0, _EXTRA))
    k = torch.cat(
        [k, F.pad(torch.stack(_split_log_sizes(k, log_sizes, scale), -1), (0, _EXTRA - 2))], -1
    )
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)[..., :width]


def _split_log_sizes(k: Tensor, log_sizes: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return log(size) over the scale in the dtype of k, (B, H, K), and its rounding error."""
    bias = (log_sizes / scale).unsqueeze(1).expand(k.shape[:3])
    high = bias.to(k.dtype)
    return high, (bias - high).to(k.dtype)


def pads_projection(attn: TimmAttention, x: Tensor) -> bool:
    """Tell whether to make the extra dimension by padding `qkv`: one plain layer, smaller than its
    outputs."""
    return (
        x.is_cuda
        and is_plain_linear(attn.qkv)
        and getattr(attn, "q_bias", None) is None
        and isinstance(attn.q_norm, torch.nn.Identity)
        and isinstance(attn.k_norm, torch.nn.Identity)
        and takes_extra_dimension(attn.qkv.out_features // (3 * attn.num_heads), x.dtype)
        and x.shape[0] * x.shape[1] > attn.qkv.in_features
    )


def attention_by_projection(attn: TimmAttention, x: Tensor, log_sizes: Tensor) -> Tensor:
    """Compute `attention_by_dimension` of x, projecting the extra columns with the heads instead of
    copying these."""
    qkv: nn.Linear = attn.qkv  # type: ignore[assignment]
    weight = qkv.weight
    width = len(weight) // (3 * attn.num_heads)
    bias = weight.new_zeros(len(weight)) if qkv.bias is None else qkv.bias
    columns = F.pad(bias.view(3, attn.num_heads, width), (0, _EXTRA))
    columns[0, :, width : width + 2] = 1
    rows = F.pad(weight.view(3, attn.num_heads, width, -1), (0, 0, 0, _EXTRA))
    heads = F.linear(x, rows.flatten(0, 2), columns.flatten())
    heads = heads.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    heads[1, ..., width], heads[1, ..., width + 1] = _split_log_sizes(
        heads[1], log_sizes, width**-0.5
    )
    q, k, v = heads.unbind()
    return F.scaled_dot_product_attention(q, k, v, scale=width**-0.5)[..., :width]


def attention_by_bias(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_sizes: Tensor,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Compute proportional attention with log(size) as an additive mask, the same for every
    query."""
    mask = log_sizes.to(q.dtype)[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)


class Segments(NamedTuple):
    """Images of a batch in one row of T tokens: where each begins, (B + 1,) int64, and the most
    tokens of one."""

    starts: Tensor
    longest: int


def attention_by_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_sizes: Tensor | None,
    segments: Segments,
    scale: float | None = None,
) -> Tensor:
    """Compute proportional attention of heads (1, H, T, C), with log_sizes (1, T), within each
    image of one row."""
    heads = [x.squeeze(0).transpose(0, 1) for x in (q, k, v)]
    if torch.is_autocast_enabled(q.device.type):  # it casts PyTorch's operators only
        heads = [x.to(torch.get_autocast_dtype(q.device.type)) for x in heads]
    sizes = None if log_sizes is None else log_sizes[0]
    output = ops.attend_segments(*heads, *segments, sizes, scale)
    return output.transpose(0, 1).view(q.shape)


def proportional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_sizes: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """Compute softmax(scale q k^T + log(size)) v: a token of size s weighs as much as s equal
    tokens (ToMe, section 3).

    On a CPU in 16 bits without gradients `attend_segments` runs, with sizes or without. On CUDA in
    16 bits log(size) is one more dimension, so that FlashAttention runs; elsewhere, and for heads
    that leave no room, it is a bias.

    Args:
        q, k, v: (B, H, K, C).
        log_sizes: (B, K) float32; without it this is plain attention.
        scale: default C^-0.5.
        segments: of the images in one row, B = 1, that attend apart, without dropout.
    """
    if segments is not None:
        return attention_by_segments(q, k, v, log_sizes, segments, scale)
    if not dropout_p and takes_rows(q, k, v):
        return attention_by_rows(q, k, v, log_sizes, scale)
    if log_sizes is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    if q.is_cuda and takes_extra_dimension(q.shape[-1], q.dtype):
        return attention_by_dimension(q, k, v, log_sizes, dropout_p, scale)
    return attention_by_bias(q, k, v, log_sizes, dropout_p, scale)


def takes_rows(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tell whether `attention_by_rows` computes an attention, and faster."""
    return (
        prefers_rows(q, k, v)
        and q.dtype == k.dtype == v.dtype
        and q.ndim == 4
        and q.shape == k.shape == v.shape
    )


def prefers_rows(*inputs: Tensor) -> bool:
    """Tell whether `attention_by_rows` is faster for such inputs: on a CPU, in 16 bits, in eager
    mode and without gradients."""
    return (
        all(
            type(x) is Tensor and x.is_cpu and x.dtype in (torch.bfloat16, torch.float16)
            for x in inputs
        )
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def attention_by_rows(
    q: Tensor, k: Tensor, v: Tensor, log_sizes: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Compute proportional attention by `attend_segments`, with equally many tokens an image.

    Measured on a CPU: 0.5 to 0.9 of the time of scaled_dot_product_attention in bfloat16; in
    float32 0.9 to 1.1.
    """
    batch, _, count, _ = q.shape
    starts = torch.arange(batch + 1) * count
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    sizes = None if log_sizes is None else log_sizes.flatten()
    output = ops.attend_segments(*rows, starts, count, sizes, scale)
    return output.unflatten(0, (batch, count)).transpose(1, 2)


def project_heads(attn: TimmAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute queries, keys and values (B, heads, N, C) of an attention."""
    if attn.qkv is None:
        projected: Sequence[Tensor] = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    elif getattr(attn, "q_bias", None) is None:
        projected = attn.qkv(x).chunk(3, dim=-1)
    else:
        eva: Any = attn
        bias = torch.cat([eva.q_bias, eva.k_bias, eva.v_bias])
        projected = F.linear(x, attn.qkv.weight, bias).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in projected)
    return attn.q_norm(q), attn.k_norm(k), v


def mask_at(mask: Tensor, positions: Tensor) -> Tensor:
    """Select an attention mask (B or 1, heads or 1, queries or 1, N) at positions (B, K)."""
    mask = mask.expand(positions.shape[0], -1, -1, -1)
    if mask.shape[2] != 1:
        mask = mask.gather(
            2, positions[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        )
    return mask.gather(3, positions[:, None, None].expand(-1, *mask.shape[1:3], -1))


SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
_ATTENTION = frozenset((F.scaled_dot_product_attention, F.multi_head_attention_forward, *SOFTMAX))


def is_attention_softmax(func: object, args: Sequence[Any]) -> bool:
    """Tell whether a call is the softmax of an attention that is written out, over logits (B,
    heads, N, N)."""
    return (
        func in SOFTMAX
        and bool(args)
        and args[0].ndim == 4
        and args[0].shape[2] == args[0].shape[3]
    )


class SizeWeightedAttention(TorchFunctionMode):
    """A mode in which attention adds log_sizes (B, K) to its logits.

    Attention is scaled_dot_product_attention, nn.MultiheadAttention, or a softmax over (B, heads,
    K, K).

    So a block of any library weighs its tokens, and stays as it is. `calls` receives one entry per
    attention. With the positions (B, K) of the active tokens, the mask or bias of an attention is
    one for all N tokens. With num_images the B images of a batch stand in one row, (1, heads, B K,
    C), and attend apart. With segments so do images of different counts, (1, heads, T, C), by
    `attend_segments`: for scaled_dot_product_attention without a mask; log_sizes are (1, T).
    """

    def __init__(
        self,
        log_sizes: Tensor | None,
        calls: list[bool] | None = None,
        positions: Tensor | None = None,
        num_images: int | None = None,
        segments: Segments | None = None,
    ) -> None:
        super().__init__()
        self.log_sizes = log_sizes
        self.calls = [] if calls is None else calls
        self.positions = positions
        self.num_images = num_images
        self.segments = segments

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        if func not in _ATTENTION:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.calls.append(True)
            return self._attend(*args, **kwargs)
        if self.segments is not None and (
            func is F.multi_head_attention_forward or is_attention_softmax(func, args)
        ):
            raise ValueError(
                "cropr: images of different counts need attention by scaled_dot_product_attention, "
                f"got {getattr(func, '__name__', func)}"
            )
        if func is F.multi_head_attention_forward and self.log_sizes is not None:
            self.calls.append(True)
            mask = self.log_sizes.to(args[0].dtype)
            if kwargs.get("key_padding_mask") is not None:
                mask = mask + kwargs["key_padding_mask"]
            kwargs["key_padding_mask"] = mask
        if self.log_sizes is not None and is_attention_softmax(func, args):
            self.calls.append(True)
            args = (args[0] + self.log_sizes.to(args[0].dtype)[:, None, None], *args[1:])
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        options = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if self.segments is not None:
            if attn_mask is not None or dropout_p or is_causal or enable_gqa:
                raise ValueError(
                    "cropr: attention of images of different counts takes no mask, dropout, causal "
                    "order or shared keys"
                )
            log_sizes = None if self.log_sizes is None else self._log_sizes_of(key)
            return attention_by_segments(query, key, value, log_sizes, self.segments, scale)
        if self.num_images is None:
            return self._attend_apart(query, key, value, *options)
        query, key, value = (_unpack(heads, self.num_images) for heads in (query, key, value))
        output = self._attend_apart(query, key, value, *options)
        return output.transpose(0, 1).flatten(1, 2).unsqueeze(0)

    def _attend_apart(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        if attn_mask is not None and self.positions is not None:
            attn_mask = mask_at(attn_mask, self.positions)
        if self.log_sizes is None:
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        log_sizes = self._log_sizes_of(key)
        if attn_mask is None and not is_causal and not enable_gqa:
            return proportional_attention(query, key, value, log_sizes, dropout_p, scale)
        bias = log_sizes.to(query.dtype)[:, None, None, :]
        if is_causal:
            attn_mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        if attn_mask is not None:
            allows = attn_mask.dtype == torch.bool
            bias = bias.masked_fill(~attn_mask, float("-inf")) if allows else bias + attn_mask
        return F.scaled_dot_product_attention(
            query, key, value, bias, dropout_p, scale=scale, enable_gqa=enable_gqa
        )

    def _log_sizes_of(self, key: Tensor) -> Tensor:
        """The log_sizes of the keys (B, heads, K, C) of an attention, which may see several rows of
        the batch at once, as windows."""
        log_sizes = self.log_sizes
        if log_sizes is None or log_sizes.numel() != key.shape[0] * key.shape[2]:
            raise ValueError(
                f"cropr: attention over {key.shape[2]} keys cannot weigh "
                f"{0 if log_sizes is None else log_sizes.shape[1]} tokens by their size: it sees "
                "others too"
            )
        return log_sizes.reshape(key.shape[0], key.shape[2])


def _unpack(heads: Tensor, num_images: int) -> Tensor:
    """(1, heads, B K, C) as (B, heads, K, C)."""
    return heads[0].unflatten(1, (num_images, -1)).transpose(0, 1)
