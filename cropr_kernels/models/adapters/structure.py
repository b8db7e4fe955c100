"""Models by their structure: a specification by probing, and blocks for the engine by the roles of
their modules."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..blocks import Rotary, SizeWeightedAttention, mask_at, norm_parameters, rotary_at
from ..head_probing import read_head, reads_places
from ..probing import (
    Args,
    BlockCall,
    Forward,
    Kwargs,
    ProbeError,
    device_of,
    find_blocks,
    find_layout,
    layout_of_shapes,
    pixels_entered,
    probing,
    tokens_of,
)
from .base import BlockParts, EngineRefusal, ModelSpec, base_class

# Of timm and this package's ViT, and of Hugging Face
ROTARY_TABLES = ("rope", "position_embeddings")
_IMAGE_SIZES = ("img_size", "image_size", "input_resolution")  # attributes of models
_TOLERANCE = 1e-3  # of the largest update, between a block and its parts


def probe(model: nn.Module, tower: nn.Module, forward: Forward, images: Tensor) -> ModelSpec:
    """Specify a model by a few forwards of a random image.

    Args:
        model: as it was given to `apply`.
        tower: the part of it that takes images alone.
        forward: runs the tower.
        images: (1, C, H, W), an example.

    Raises:
        ProbeError: it is not one that can be pruned.
    """
    with probing(model):
        images = torch.randn_like(images)
        calls = find_blocks(tower, forward, images)
        block = calls[0].block
        if images.is_meta:
            layout = layout_of_shapes(tower, forward, images, block)
        else:
            layout = find_layout(block, forward, images)
        head = read_head(tower, forward, images, calls, layout)
        encoder, projection = pixels_entered(tower, forward, images, block, layout)
        has_bias = not images.is_meta and _find_bias(calls, layout.num_prefix)
        engine, refusal = _check_parts(calls, layout.num_prefix, has_bias)
        height, width = images.shape[-2:]
        return ModelSpec(
            blocks=[call.block for call in calls],
            projection=projection,
            norm=head.norm,
            tower=tower,
            inner=encoder,
            num_prefix=layout.num_prefix,
            dim=calls[0].x.shape[2],
            num_heads=num_heads_of(block),
            image_shape=tuple(images.shape[1:]),
            patch_size=(height * layout.frames // layout.grid[0], width // layout.grid[1]),
            grid=layout.grid,
            num_classes=head.num_classes,
            class_token=head.class_token,
            pooling=head.pooling,
            returns_tokens=head.returns_tokens,
            needs_map=head.needs_map
            or (not images.is_meta and reads_places(forward, images, calls, layout.num_prefix)),
            map_layers=head.map_layers,
            block_outputs=len(calls[0].output) if isinstance(calls[0].output, tuple) else 0,
            has_bias=has_bias,
            frames=layout.frames,
            refusal=None
            if layout.in_order
            else "its patches do not stand in the order of the rows of the image",
            engine=engine,
            engine_refusal=refusal,
        )


def examples_of(model: nn.Module) -> list[Tensor]:
    """Make images (1, C, H, W) of every size that a model names, else of 224 px."""
    config = getattr(model, "config", None)
    for name in ("vision_config", "backbone_config"):
        config = getattr(config, name, None) or config
    values = [getattr(config, "image_size", None)]
    values += [getattr(module, name, None) for module in model.modules() for name in _IMAGE_SIZES]
    values.append((getattr(model, "pretrained_cfg", None) or {}).get("input_size"))
    sizes = dict.fromkeys(
        size for value in values if (size := _height_and_width(value)) is not None
    )
    dtype = next((value.dtype for value in model.parameters() if value.is_floating_point()), None)
    channels = getattr(config, "num_channels", 3)
    return [
        torch.zeros(1, channels, *size, device=device_of(model), dtype=dtype)
        for size in sizes or [(224, 224)]
    ]


def _height_and_width(value: object) -> tuple[int, int] | None:
    """The height and width of images in an attribute: a number, two, three with the channels, or a
    dictionary."""
    if isinstance(value, dict):
        value = (value.get("height"), value.get("width"))
    if isinstance(value, int):
        value = (value, value)
    if not isinstance(value, tuple | list) or len(value) not in (2, 3):
        return None
    height, width = value[-2:]
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def num_heads_of(block: nn.Module) -> int:
    """The number of heads that a block or one of its modules names; 1 if none does."""
    for module in block.modules():
        for name in ("num_heads", "num_attention_heads", "n_heads", "heads"):
            value = getattr(module, name, None)
            if isinstance(value, int):
                return value
    return 1


def select_arguments(
    block: nn.Module,
    args: Args,
    kwargs: Kwargs,
    positions: Tensor | None,
    rows: Callable[[Tensor], Tensor],
) -> tuple[Args, dict[str, object]]:
    """Reduce masks among the arguments of a block to positions (B, K), and rotary tables by `rows`.

    Keywords that the block's forward does not name pass: they are for others.

    Raises:
        ValueError: another tensor is among them.
    """
    selected: dict[str, object] = {}
    for name, value in kwargs.items():
        if name in ROTARY_TABLES and isinstance(value, tuple):
            selected[name] = tuple(map(rows, value))
        elif name in ROTARY_TABLES and isinstance(value, Tensor):
            selected[name] = rows(value)
        elif _is_for_others(block, name, value):
            selected[name] = value
        else:
            selected[name] = _argument_at(value, positions)
    return tuple(_argument_at(value, positions) for value in args), selected


def _is_for_others(block: nn.Module, name: str, value: object) -> bool:
    """Tell whether a keyword is a tensor of another shape than a mask, which the block's forward
    does not name."""
    if not isinstance(value, Tensor) or value.ndim == 4:
        return False
    return name not in inspect.signature(base_class(block).forward).parameters


def _argument_at(value: object, positions: Tensor | None) -> object:
    """Select an attention mask (B or 1, heads or 1, queries or 1, N) at positions (B, K); other
    values pass."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.ndim != 4 or positions is None:
        raise ValueError(
            "cropr: a block of a pruned model is called with a tensor of shape "
            f"{tuple(value.shape)}; it may be a mask "
            "(B, 1, N, N), without window attention"
        )
    return mask_at(value, positions)


def _find_bias(calls: list[BlockCall], num_prefix: int) -> bool:
    """Tell whether the attention of a block adds a bias that it makes for all tokens.

    Raises:
        ProbeError: with tokens in another order, or with fewer, a block computes something else.
    """
    for has_bias in (False, True):
        try:
            for layer, call in enumerate(calls):
                _require_sets(layer, call, num_prefix, has_bias)
        except ProbeError:
            if has_bias:
                raise
        else:
            return has_bias
    return False


def _require_sets(layer: int, call: BlockCall, num_prefix: int, has_bias: bool) -> None:
    """Raise ProbeError unless a block takes its tokens as a set: in any order, and any part of
    them."""
    num_tokens = call.x.shape[1]
    order = torch.cat(
        [torch.arange(num_prefix), num_prefix + torch.randperm(num_tokens - num_prefix)]
    )
    kept = order[: num_prefix + (num_tokens - num_prefix) // 2]
    for positions in (order, kept):
        positions = positions.to(call.x.device).unsqueeze(0)
        rows = partial(rotary_at, positions=positions, num_prefix=num_prefix, num_tokens=num_tokens)
        try:
            args, kwargs = call.args, call.kwargs
            if not has_bias:
                args, kwargs = select_arguments(call.block, args, kwargs, positions, rows)
            with SizeWeightedAttention(None, positions=positions if has_bias else None):
                output = tokens_of(call.block(call.x[:, positions[0]], *args, **kwargs))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ProbeError(
                f"block {layer} does not take a part of its tokens: {error}"
            ) from error
        expected = call.tokens[:, positions[0]]
        if output.shape != expected.shape:
            raise ProbeError(
                f"block {layer} returns {tuple(output.shape)} for tokens {tuple(expected.shape)}"
            )
        if positions.shape[1] == num_tokens and not _is_close(output, expected, call):
            raise ProbeError(f"block {layer} reads positions from the order of its tokens")


def _is_close(output: Tensor, expected: Tensor, call: BlockCall) -> bool:
    """Tell whether outputs of a block differ by no more than rounding, beside what the block
    adds."""
    tolerance = _TOLERANCE if output.dtype in (torch.float32, torch.float64) else 30 * _TOLERANCE
    difference = (output - expected).float().abs().max()
    return bool(difference <= tolerance * (call.tokens - call.x).float().abs().max())


def _check_parts(
    calls: list[BlockCall], num_prefix: int, has_bias: bool
) -> tuple[list[BlockParts] | None, str]:
    """Return the parts of all blocks if each computes what its block does; else None, and the
    reason."""
    if calls[0].x.is_meta:
        return None, "the model was specified on the meta device"
    if has_bias:
        return None, "attention adds a bias that it makes for all tokens"
    blocks: list[BlockParts] = []
    for layer, call in enumerate(calls):
        try:
            parts = parts_of(call.block)
            others = [value for name, value in call.kwargs.items() if name not in ROTARY_TABLES]
            if any(isinstance(value, Tensor) for value in (*call.args, *others)):
                raise EngineRefusal("its blocks take a mask")
            if not _computes(parts, call, num_prefix):
                raise EngineRefusal(f"{base_class(call.block).__name__} is no pre-norm block")
        except EngineRefusal as refusal:
            return None, f"block {layer}: {refusal}"
        blocks.append(parts)
    return blocks, ""


def _computes(parts: BlockParts, call: BlockCall, num_prefix: int) -> bool:
    """Tell whether parts compute what a block did."""
    block = parts.block
    table = next(
        (call.kwargs[name] for name in ROTARY_TABLES if call.kwargs.get(name) is not None), None
    )
    rotary = None if table is None else Rotary(table, None, num_prefix)  # type: ignore[arg-type]
    gamma1, gamma2 = parts.scales(block)
    try:
        h = _normalize(call.x, getattr(block, parts.norm1))
        update = parts.attend(getattr(block, parts.attn), h, rotary, None)
        x = call.x + (update if gamma1 is None else update * gamma1)
        update = getattr(block, parts.mlp)(_normalize(x, getattr(block, parts.norm2)))
        x = x + (update if gamma2 is None else update * gamma2)
    # Modules of other roles than their names say
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    if x.shape != call.tokens.shape:
        return False
    return _is_close(x, call.tokens, call)


def _normalize(x: Tensor, norm: nn.Module) -> Tensor:
    """Normalize x (B, N, D) as the engine does."""
    return torch.ops.cropr.gather_norm(x, None, *norm_parameters(norm, x.dtype))


def parts_of(block: nn.Module) -> BlockParts:
    """Name the parts of a pre-norm block: two norms, an attention, an MLP, two factors of
    LayerScale or none.

    Raises:
        EngineRefusal: it has others.
    """
    children = dict(block.named_children())
    norms = [name for name, child in children.items() if "norm" in type(child).__name__.lower()]
    attentions = [
        name for name, child in children.items() if "attention" in type(child).__name__.lower()
    ]
    mlps = [
        name
        for name, child in children.items()
        if name in ("mlp", "ffn", "feed_forward", "feedforward")
    ]
    if len(norms) != 2 or len(attentions) != 1 or len(mlps) != 1:
        raise EngineRefusal(
            f"{base_class(block).__name__} has {len(norms)} norms, {len(attentions)} attentions "
            f"and {len(mlps)} MLPs, "
            "not 2, 1 and 1"
        )
    known = {*norms, *attentions, *mlps}
    factors = [name for name, _ in block.named_parameters() if name.partition(".")[0] not in known]
    if len(factors) not in (0, 2):
        raise EngineRefusal(
            f"{base_class(block).__name__} has {len(factors)} parameters of its own, not 2 or none"
        )
    attend: Attend | AttendMultihead = AttendMultihead()
    attention = children[attentions[0]]
    if not isinstance(attention, nn.MultiheadAttention):
        parameters = inspect.signature(attention.forward).parameters
        takes_mask = "attention_mask" in parameters
        attend = Attend(takes_mask)
    return BlockParts(
        block,
        norms[0],
        norms[1],
        attentions[0],
        attend,
        partial(_factors_at, tuple(factors)),
        norm_classes=(type(children[norms[0]]), type(children[norms[1]])),
        mlp=mlps[0],
    )


def _factors_at(names: tuple[str, ...], block: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    if not names:
        return None, None
    return block.get_parameter(names[0]), block.get_parameter(names[1])


@dataclass(frozen=True)
class Attend:
    """The call of an attention with its own forward; rotary tables as `position_embeddings`."""

    takes_mask: bool

    def __call__(
        self, attn: nn.Module, h: Tensor, rotary: Rotary | None, log_sizes: Tensor | None
    ) -> Tensor:
        kwargs: dict[str, object] = {"attention_mask": None} if self.takes_mask else {}
        if rotary is not None:
            kwargs["position_embeddings"] = rotary.rows()
        with SizeWeightedAttention.maybe(log_sizes):
            output = attn(h, **kwargs)
        return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class AttendMultihead:
    """The call of an nn.MultiheadAttention with the batch first."""

    def __call__(
        self, attn: nn.Module, h: Tensor, rotary: Rotary | None, log_sizes: Tensor | None
    ) -> Tensor:
        with SizeWeightedAttention.maybe(log_sizes):
            return attn(h, h, h, need_weights=False)[0]
