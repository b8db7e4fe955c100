"""The attention of the output to each patch, from the attention calls of a block of any library."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .models.adapters import MapBlock
from .models.blocks import is_attention_softmax
from .models.tiling import Tiling
from .models.token_format import TokenFormat
from .pruning.model import CroprModules, modules_of, run
from .pruning.state import PruningOptions


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


def observe_blocks(
    model: nn.Module, images: Tensor, kwargs: Mapping[str, object]
) -> tuple[list[Tensor], list[Tensor]]:
    """Run the unpruned model, and return the patches (B, patches, D) after each block and the
    `importance` (B, patches) that it gives them.

    That of the first of blocks over maps is zero.

    Raises:
        ValueError: a block does not attend once, or over other tokens than it takes.
    """
    modules = modules_of(model)
    spec = modules.spec
    tiling = _tiling_of(modules, images)
    if spec.map_blocks is None or tiling is None:
        tokens, importances = _observe_tokens(model, modules, images, kwargs)
        if tiling is not None:
            importances = [_of_windows(values, tiling) for values in importances]
    else:
        tokens = []
        options = PruningOptions(observe=lambda layer, x: tokens.append(x))
        run(model, lambda: spec.run(images, **kwargs), options)
        importances = [tokens[0].new_zeros(tokens[0].shape[:2])]
        importances += [
            torch.cat([_map_importance(block, image, tiling) for image in x.split(1)])
            for block, x in zip(spec.map_blocks[1:], tokens)
        ]
    counts = {(len(x), x.shape[1]) for x in (*tokens, *importances)}
    if len(counts) > 1:
        raise ValueError(
            "cropr.calibrate: every block must attend over the tokens it takes, got attention "
            f"over {sorted(counts)} (rows, patches)"
        )
    return tokens, importances


def _observe_tokens(
    model: nn.Module, modules: CroprModules, images: Tensor, kwargs: Mapping[str, object]
) -> tuple[list[Tensor], list[Tensor]]:
    """`observe_blocks` of blocks that take tokens (B, N, D), by their calls of attention; if they
    have windows, the rows are these."""
    spec = modules.spec
    has_windows = modules.config.windows is not None
    # With windows there is no prefix, and no head
    prefix = 0 if has_windows else spec.num_prefix
    owner: Any = model
    call = partial(owner.forward_features if has_windows else spec.run, images, **kwargs)
    tokens: list[Tensor] = []
    importances: list[Tensor] = []
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with AttentionInputs() as attention:

        def observe(layer: int, x: Tensor) -> None:
            if len(attention.inputs) != 1:
                raise ValueError(
                    f"cropr.calibrate: block {layer} must attend once "
                    "(scaled_dot_product_attention, or a softmax over "
                    f"(B, heads, N, N)), attended {len(attention.inputs)} times"
                )
            inputs = attention_prefix_first(attention.inputs[0], spec.token_format)
            tokens.append(x[:, prefix:])
            class_token = spec.class_token and not has_windows
            importances.append(importance(inputs, prefix, class_token=class_token))
            attention.inputs.clear()  # a softmax of `importance` may be among them

        handle = spec.blocks[0].register_forward_pre_hook(
            lambda block, args: attention.inputs.clear()
        )
        torch.backends.mha.set_fastpath_enabled(False)  # it would compute the attention elsewhere
        try:
            run(model, call, PruningOptions(observe=observe))
        finally:
            handle.remove()
            torch.backends.mha.set_fastpath_enabled(fast_path)
    return tokens, importances


def windows_of(modules: CroprModules, images: Tensor) -> list[Tensor | slice]:
    """Indices (windows, patches) of the patches between which a model chooses, for windows of each
    shape."""
    tiling = _tiling_of(modules, images)
    return [slice(None)] if tiling is None else [group.cells for group in tiling.groups]


def _tiling_of(modules: CroprModules, images: Tensor) -> Tiling | None:
    """The windows of a model, or the full map of one over maps; None if it has neither."""
    windows = modules.config.windows
    spec = modules.spec
    if windows is None and spec.map_blocks is None:
        return None
    height, width = images.shape[-2:]
    window = spec.window if windows is None else windows.size
    return Tiling(spec.grid_of((height, width)), window, images.device)


def _map_importance(block: MapBlock, x: Tensor, tiling: Tiling) -> Tensor:
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


def _of_windows(values: Tensor, tiling: Tiling) -> Tensor:
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
