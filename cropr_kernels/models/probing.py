"""Blocks and patch grid of an unknown model, from a few of its forwards.

One forward finds the blocks: modules of one class, each called with the tokens (B, N, D) that the
one before returned. Others stop before them: tokens that are the same for two images are no
patches, and the corners of an image tell the grid.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

Args = tuple[object, ...]
Kwargs = Mapping[str, object]
Forward = Callable[[Tensor], object]  # images -> output of the model


class ProbeError(ValueError):
    """A model is not one that can be pruned; the message is the reason."""


class BlockCall(NamedTuple):
    """One call of a block."""

    block: nn.Module
    x: Tensor  # (B, N, D), its tokens
    args: Args  # the other arguments
    kwargs: Kwargs
    output: object

    @property
    def tokens(self) -> Tensor:
        """The tokens that it returned."""
        return tokens_of(self.output)

    def with_tokens(self, tokens: Tensor) -> object:
        """Return the output with other tokens."""
        return (tokens, *self.output[1:]) if isinstance(self.output, tuple) else tokens


@dataclass(frozen=True)
class Layout:
    """The tokens that enter the first block."""

    num_prefix: int  # P, first tokens that are no patches
    # Patches in height and width; of a video, those of its frames below each other
    grid: tuple[int, int]
    frames: int
    in_order: bool  # patches stand in the order of the rows of the image


def tokens_of(output: object) -> Tensor:
    """Return the tokens in the output of a block."""
    tokens = output[0] if isinstance(output, tuple) else output
    if not isinstance(tokens, Tensor):
        raise ProbeError(f"a block returns {type(output).__name__}")
    return tokens


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, without gradient, and leave the generators of random numbers as
    they were."""
    training = [module for module in model.modules() if module.training]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        for module in training:
            module.training = False
        with torch.no_grad(), torch.random.fork_rng(list(devices)):
            yield
    finally:
        for module in training:
            module.training = True


def device_of(model: nn.Module) -> torch.device:
    """The device that a model takes images on, where its weights may be elsewhere (accelerate)."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def find_blocks(model: nn.Module, forward: Forward, images: Tensor) -> list[BlockCall]:
    """Return the calls of the blocks of a model in one forward.

    Raises:
        ProbeError: no two modules of a class are called one after the other, or others of their
            list are not.
    """
    calls = _record_calls(model, forward, images)
    chain: list[BlockCall] = []
    for start in range(len(calls)):
        chain = _chain_from(calls, start)
        if len(chain) > 1:
            break
    else:
        raise ProbeError(_reason_against_blocks(model, forward, images))
    blocks = [call.block for call in chain]
    width = chain[0].x.shape[2]
    apart = [
        call for call in calls if type(call.block) is type(blocks[0]) and call.block not in blocks
    ]
    if any(call.x.shape[2] == width for call in apart):
        raise ProbeError(
            f"{len(apart)} blocks run apart from a list of {len(blocks)}, as in stages or branches"
        )
    for container in model.modules():
        children = list(container.children())
        if isinstance(container, nn.ModuleList | nn.Sequential) and any(
            child in blocks for child in children
        ):
            others = [
                child
                for child in children
                if type(child) is type(blocks[0]) and child not in blocks
            ]
            if others:
                raise ProbeError(
                    "something else than the tokens of the block before goes into block "
                    f"{len(blocks)} of "
                    f"{len(blocks) + len(others)}"
                )
    return chain


def _reason_against_blocks(model: nn.Module, forward: Forward, images: Tensor) -> str:
    """Say why a model has no blocks over tokens (B, N, D)."""
    calls = _record_calls(model, forward, images, ndim=4)
    for start in range(len(calls)):
        if len(_chain_from(calls, start)) > 1:
            name = type(calls[start].block).__name__
            return f"{name} takes maps of four dimensions, as for windows, and not tokens (B, N, D)"
    return (
        "no two blocks are called one after the other, each with the tokens (B, N, D) that the "
        "one before returned"
    )


def _record_calls(
    model: nn.Module, forward: Forward, images: Tensor, ndim: int = 3
) -> list[BlockCall]:
    """Record the calls of all modules that are larger than a layer and return tokens of the shape
    of their input, which has `ndim` dimensions."""
    calls: list[tuple[int, BlockCall]] = []
    started: dict[nn.Module, list[int]] = {}
    count = 0

    def before(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        nonlocal count
        count += 1
        started.setdefault(module, []).append(count)

    def after(module: nn.Module, args: Args, kwargs: Kwargs, output: object) -> None:
        start = started[module].pop()
        x, args, kwargs = split_tokens(args, kwargs, ndim)
        tokens = output[0] if isinstance(output, tuple) and output else output
        if x is None or not isinstance(tokens, Tensor) or tokens.shape != x.shape:
            return
        # Else it changes the class token only
        if x.is_meta or not torch.equal(tokens[:, -1], x[:, -1]):
            calls.append((start, BlockCall(module, x, args, kwargs, output)))

    handles = []
    for module in model.modules():
        if next(module.children(), None) is not None:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        forward(images)
    except Exception as error:
        raise ProbeError(
            f"a forward of {tuple(images.shape)} fails: {error}; for other images give it "
            "cropr.apply(model, spec=cropr.find_spec(model, images))"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return [call for _, call in sorted(calls, key=lambda item: item[0])]


TOKEN_ARGUMENTS = ("hidden_states", "hidden_state", "x", "src")


def split_tokens(args: Args, kwargs: Kwargs, ndim: int = 3) -> tuple[Tensor | None, Args, Kwargs]:
    """Return the tokens (B, N, D) among the arguments of a block, if any, and the other
    arguments."""
    if args:
        first = args[0]
        return (
            (first, args[1:], kwargs)
            if isinstance(first, Tensor) and first.ndim == ndim
            else (None, args, kwargs)
        )
    for name in TOKEN_ARGUMENTS:
        value = kwargs.get(name)
        if isinstance(value, Tensor) and value.ndim == ndim:
            return value, args, {key: kwargs[key] for key in kwargs if key != name}
    return None, args, kwargs


def _chain_from(calls: list[BlockCall], start: int) -> list[BlockCall]:
    """Return the calls from `start` on of modules of its class, each with the tokens that the last
    one returned."""
    chain = [calls[start]]
    for call in calls[start + 1 :]:
        if type(call.block) is type(chain[0].block) and _is_same(call.x, chain[-1].tokens):
            chain.append(call)
    return chain


def _is_same(x: Tensor, y: Tensor) -> bool:
    """Tell whether two tensors that are alive at once are one."""
    same = (
        not x.is_meta
        and x.data_ptr() == y.data_ptr()
        and x.shape == y.shape
        and x.stride() == y.stride()
    )
    return x is y or same


class _Stop(Exception):
    """The first block was reached."""


def find_layout(block: nn.Module, forward: Forward, images: Tensor) -> Layout:
    """Find prefix and grid of the tokens that enter the first block.

    Args:
        block: the first one.
        forward: runs the model.
        images: (1, ..., H, W): images (1, C, H, W), videos (1, frames, C, H, W) or spectrograms (1,
            H, W).

    Raises:
        ProbeError: the tokens that are no patches do not stand first, or the patches form no grid.
    """
    x = _first_tokens(block, forward, torch.cat([images, torch.randn_like(images)]))
    if len(x) != 2:
        raise ProbeError(
            f"a batch of 2 images becomes {tuple(x.shape)} tokens: images are packed, or split "
            "into tiles"
        )
    is_patch = (x[0] != x[1]).any(-1)
    num_patches = int(is_patch.sum())
    num_prefix = len(is_patch) - num_patches
    if not num_patches:
        raise ProbeError("no token that enters the first block depends on the image")
    if not is_patch[num_prefix:].all():
        raise ProbeError(
            f"{num_prefix} of {len(is_patch)} tokens are no patches, and do not all stand before "
            "these"
        )
    first, right, below, last = _corner_tokens(block, forward, images, num_prefix, num_patches)
    # Rows of the image, or its columns
    for columns, rows in ((right + 1, below), (below + 1, right)):
        per_frame = rows + columns
        if (
            first == 0
            and last == num_patches - 1
            and rows % columns == 0
            and num_patches % per_frame == 0
        ):
            return Layout(
                num_prefix, (num_patches // columns, columns), num_patches // per_frame, True
            )
    height, width = images.shape[-2:]
    columns = max(round(math.sqrt(num_patches * width / height)), 1)
    if num_patches % columns:
        raise ProbeError(
            f"{num_patches} patches form no grid for an image of {height} x {width} px"
        )
    return Layout(num_prefix, (num_patches // columns, columns), 1, False)


def layout_of_shapes(
    tower: nn.Module, forward: Forward, images: Tensor, block: nn.Module
) -> Layout:
    """The layout of tokens without values (meta device): the prefix is what the grid of a
    convolution leaves.

    Raises:
        ProbeError: there is no convolution.
    """
    grids: list[torch.Size] = []
    convolutions = [
        module for module in tower.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)
    ]
    handles = [
        module.register_forward_hook(lambda module, args, output: grids.append(output.shape[2:]))
        for module in convolutions
    ]
    try:
        num_tokens = _first_tokens(block, forward, images).shape[1]
    finally:
        for handle in handles:
            handle.remove()
    if not grids:
        raise ProbeError("its parameters are on the meta device, and no convolution shows its grid")
    rows, columns = math.prod(grids[-1][:-1]), grids[-1][-1]
    return Layout(num_tokens - rows * columns, (rows, columns), rows // grids[-1][-2], True)


def _corner_tokens(
    block: nn.Module, forward: Forward, images: Tensor, num_prefix: int, num_patches: int
) -> tuple[int, int, int, int]:
    """Return the patches that change most with the corners: top left, right and below, and the last
    of the last frame.

    The first three are of the first frame.
    """
    side = max(int(math.sqrt(math.prod(images.shape[-2:]) / num_patches)), 1)
    corners = images.repeat(5, *[1] * (images.ndim - 1))
    start = slice(None, side)
    end = slice(-side, None)
    for i, (rows, columns) in enumerate(
        ((start, start), (start, end), (end, start), (end, end)), 1
    ):
        frames = corners[i]
        if images.ndim == 5:
            frames = frames[-1] if i == 4 else frames[0]
        frames[..., rows, columns].normal_(std=3)
    x = _first_tokens(block, forward, corners)[:, num_prefix:].float()
    first, right, below, last = (x[1:] - x[:1]).norm(dim=-1).argmax(1).tolist()
    return first, right, below, last


def _first_tokens(block: nn.Module, forward: Forward, images: Tensor) -> Tensor:
    """Return the tokens (B, N, D) that enter the first block."""
    entered: list[Tensor] = []

    def stop(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        x, _, _ = split_tokens(args, kwargs)
        if x is not None:
            entered.append(x)
        raise _Stop

    handle = block.register_forward_pre_hook(stop, with_kwargs=True)
    state = torch.random.get_rng_state()
    try:
        forward(images)
    except _Stop:
        pass
    finally:
        handle.remove()
        torch.random.set_rng_state(state)
    return entered[0]


def pixels_entered(
    tower: nn.Module, forward: Forward, images: Tensor, block: nn.Module, layout: Layout
) -> tuple[nn.Module, nn.Module | None]:
    """Return the innermost module that takes the images and runs the blocks, and the projection to
    patches, if any.

    The output of the projection is the patch grid, (B, D, height, width) or (B, D, frames, height,
    width).
    """
    owners = [
        module for module in tower.modules() if any(child is block for child in module.modules())
    ]
    inner = [tower]
    projections: list[nn.Module] = []

    def before(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        if any(
            isinstance(value, Tensor) and value.shape == images.shape
            for value in (*args, *kwargs.values())
        ):
            inner.append(module)

    def after(module: nn.Module, args: Args, output: object) -> None:
        if (
            isinstance(output, Tensor)
            and output.ndim in (4, 5)
            and output.shape[-1] == layout.grid[1]
        ):
            is_grid = math.prod(output.shape[2:]) == math.prod(layout.grid)
            projections.extend([module] if is_grid else [])

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in owners]
    handles += [module.register_forward_hook(after) for module in tower.modules()]
    try:
        _first_tokens(block, forward, images)
    finally:
        for handle in handles:
            handle.remove()
    return inner[-1], projections[0] if projections else None
