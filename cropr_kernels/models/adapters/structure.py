"""Models by their structure: a specification by probing."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..arguments import (
    PLAIN,
    ArgumentRule,
    Selection,
    packed_axes,
    parameters_of,
    select_arguments,
)
from ..blocks import SizeWeightedAttention
from ..head_probing import read_head, reads_places
from ..probing import (
    BlockCall,
    ProbeError,
    device_of,
    find_blocks,
    find_layout,
    layout_of_shapes,
    pixels_entered,
    probing,
)
from ..rotary import rotary_at
from .base import BlockParts, EngineRefusal, ModelSpec, base_class
from .map_blocks import find_map_blocks
from .parts import find_parts

_IMAGE_SIZES = ("img_size", "image_size", "input_resolution")  # attributes of models
_MAP_REFUSAL = "its patches do not stand in the order of the rows of the image, in one row"


@dataclass(frozen=True)
class Trial:
    """A way to run a block on a part of its tokens."""

    rule: ArgumentRule = PLAIN
    has_bias: bool = False  # its attention adds a bias that it makes for all tokens
    is_causal: bool = False  # tokens see those before them


def probe(
    model: nn.Module,
    tower: nn.Module,
    images: Tensor,
    make_inputs: Callable[[Tensor], dict[str, Tensor]] | None = None,
) -> ModelSpec:
    """Specify a model by a few forwards of a random image.

    Args:
        model: as it was given to `apply`.
        tower: the part of it that takes images alone.
        images: (1, C, H, W), an example.
        make_inputs: makes the arguments of the tower of it; None: the tower takes it.

    Raises:
        ProbeError: it is not one that can be pruned.
    """

    def forward(images: Tensor) -> object:
        return tower(images) if make_inputs is None else tower(**make_inputs(images))

    with probing(model):
        images = torch.randn_like(images)
        chain = find_blocks(tower, forward, images)
        calls = chain.calls
        map_blocks = None
        if calls[0].token_format.map_axis is not None:
            calls, map_blocks = find_map_blocks(calls)
        first = calls[0]
        if images.is_meta:
            layout = layout_of_shapes(tower, forward, images, first)
        else:
            layout = find_layout(first, forward, images)
        calls = [call._replace(token_format=layout.token_format) for call in calls]
        head = read_head(tower, forward, images, calls, layout)
        encoder, projection = pixels_entered(tower, forward, images, first, layout)
        trial = Trial()
        engine: list[BlockParts] | None = None
        refusal = "blocks take maps"
        if map_blocks is None:
            trial = trial if images.is_meta else _find_trial(calls, layout.num_prefix)
            engine, refusal = _find_engine(calls, layout.num_prefix, trial)
        output = first.output
        height, width = images.shape[-2:]
        return ModelSpec(
            blocks=[call.block for call in calls],
            projection=projection,
            norm=head.norm,
            tower=tower,
            inner=encoder,
            num_prefix=layout.num_prefix,
            dim=calls[0].x.shape[2],
            num_heads=num_heads_of(first.block),
            image_shape=tuple(images.shape[1:]),
            make_inputs=make_inputs,
            patch_size=(height * layout.frames // layout.grid[0], width // layout.grid[1]),
            grid=layout.grid,
            num_classes=head.num_classes,
            class_token=head.class_token,
            pooling=head.pooling,
            returns_tokens=head.returns_tokens,
            needs_map=head.needs_map
            or chain.num_apart > 0
            or (not images.is_meta and reads_places(forward, images, calls, layout.num_prefix)),
            map_layers=head.map_layers,
            block_outputs=len(output) if isinstance(output, tuple) else 0,
            has_bias=trial.has_bias,
            argument_rule=trial.rule,
            token_format=layout.token_format,
            frames=layout.frames,
            refusal=None if layout.in_order else _MAP_REFUSAL,
            engine=engine,
            engine_refusal=refusal,
            map_blocks=map_blocks,
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


def _find_trial(calls: list[BlockCall], num_prefix: int) -> Trial:
    """Find in which way blocks compute the same with their tokens in another order, or with a part
    of them.

    Raises:
        ProbeError: in none; the reason is that of the plainest.
    """
    first = calls[0]
    num_tokens = first.x.shape[1]
    trials = [Trial(), Trial(has_bias=True)]
    trials += [
        Trial(rule=ArgumentRule(packed_axis=axis))
        for axis in packed_axes(first.args, first.kwargs, num_tokens)
    ]
    trials += [Trial(rule=ArgumentRule(positions=argument)) for argument in _unset_arguments(first)]
    trials.append(Trial(is_causal=True))
    errors: list[ProbeError] = []
    for trial in trials:
        try:
            for layer, call in enumerate(calls):
                _require_sets(layer, call, num_prefix, trial)
        except ProbeError as error:
            errors.append(error)
        else:
            return trial
    raise errors[0]


def _unset_arguments(call: BlockCall) -> list[tuple[int, str]]:
    """Arguments of a block, by index and name, that are None in a call."""
    names = parameters_of(call.block)[1:]
    values = dict(zip(names, call.args)) | dict(call.kwargs)
    parameters = inspect.signature(base_class(call.block).forward).parameters
    return [
        (index, name)
        for index, name in enumerate(names)
        if values.get(name, parameters[name].default) is None
    ]


def _require_sets(layer: int, call: BlockCall, num_prefix: int, trial: Trial) -> None:
    """Raise ProbeError unless a block takes its tokens as a set: in any order, and any part of
    them; a causal one any part in order."""
    # Images that differ: a block may mix those of a batch
    x = call.x if len(call.x) > 1 else torch.cat([call.x, call.x.roll(1, -1)])
    num_tokens = x.shape[1]
    num_patches = num_tokens - num_prefix
    order = torch.stack([torch.randperm(num_patches) for _ in x])
    half = order[:, : (num_patches + 1) // 2]
    orders = [half.sort(1).values] if trial.is_causal else [order, half]
    for patches in orders:
        positions = torch.nn.functional.pad(patches + num_prefix, (num_prefix, 0))
        positions[:, :num_prefix] = torch.arange(num_prefix)
        positions = positions.to(x.device)
        try:
            output = _run_at(call, x, positions, num_prefix, trial)
            seen = positions if trial.is_causal else None
            tokens = _run_all(call, x, seen)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            raise ProbeError(
                f"block {layer} does not take a part of its tokens: {error}"
            ) from error
        expected = _gather(tokens, positions)
        if output.shape != expected.shape:
            raise ProbeError(
                f"block {layer} returns {tuple(output.shape)} for tokens {tuple(expected.shape)}"
            )
        is_full = positions.shape[1] == num_tokens
        if (is_full or trial.is_causal) and not call.is_close(output, expected):
            raise ProbeError(
                f"block {layer} reads positions from the order of its tokens, or other images of "
                "the batch"
            )


def _gather(x: Tensor, positions: Tensor) -> Tensor:
    """Tokens x (B, N, D) at positions (B, K)."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def _run_at(call: BlockCall, x: Tensor, positions: Tensor, num_prefix: int, trial: Trial) -> Tensor:
    """Run a block on the tokens of x (B, N, D) at positions (B, K)."""
    num_tokens = x.shape[1]
    in_place = call.token_format.positions_in_place(positions, num_tokens)
    rows = partial(rotary_at, positions=in_place, num_prefix=num_prefix, num_tokens=num_tokens)
    selection = Selection(in_place, num_tokens, num_prefix, rows, trial.rule)
    args, kwargs = call.args, call.kwargs
    if not trial.has_bias:
        args, kwargs = select_arguments(call.block, args, kwargs, selection)
    x = _gather(x, positions)
    in_row = trial.rule.packed_axis is not None
    with SizeWeightedAttention(
        None,
        positions=in_place if trial.has_bias else None,
        num_images=len(x) if in_row else None,
    ):
        return call.run(x, args, kwargs, in_row=in_row)


def _run_all(call: BlockCall, x: Tensor, seen: Tensor | None) -> Tensor:
    """Run a block on all tokens x (B, N, D), of which those at the positions `seen` (B, K) are
    seen."""
    if seen is None:
        return call.run(x, call.args, call.kwargs)
    log_sizes = torch.full(x.shape[:2], -torch.inf, device=x.device).scatter(1, seen, 0)
    with SizeWeightedAttention(call.token_format.in_place(log_sizes)):
        return call.run(x, call.args, call.kwargs)


def _find_engine(
    calls: list[BlockCall], num_prefix: int, trial: Trial
) -> tuple[list[BlockParts] | None, str]:
    """Return the parts of all blocks for the engine, or None and the reason why it cannot run
    them."""
    if calls[0].x.is_meta:
        return None, "the model was specified on the meta device"
    if trial.has_bias:
        return None, "attention adds a bias that it makes for all tokens"
    if trial.is_causal:
        return None, "attention is causal"
    if trial.rule != PLAIN:
        return None, "rotary positions take more than rows of a table"
    blocks: list[BlockParts] = []
    for layer, call in enumerate(calls):
        try:
            blocks.append(find_parts(call, num_prefix))
        except EngineRefusal as refusal:
            return None, f"block {layer}: {refusal}"
    return blocks, ""
