"""Blocks and patch grid of an unknown model, from a few of its forwards.

One forward finds the blocks: modules of one class, each called with the tokens (B, N, D) that the
one before returned. Others stop before them: tokens that are the same for two images are no
patches, and the corners of an image tell the grid.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .token_format import BATCH_FIRST, TokenFormat, tokens_of

Args = tuple[object, ...]
Kwargs = Mapping[str, object]
Forward = Callable[[Tensor], object]  # images -> output of the model


_TOLERANCE = 1e-3  # of the largest update


class ProbeError(ValueError):
    """A model is not one that can be pruned; the message is the reason."""


class ForwardError(ProbeError):
    """A model does not take an example."""


class BlockCall(NamedTuple):
    """One call of a block."""

    block: nn.Module
    argument: object  # the tokens as the model passes them
    args: Args  # the other arguments
    kwargs: Kwargs
    output: object
    token_format: TokenFormat = BATCH_FIRST

    @property
    def x(self) -> Tensor:
        """The tokens (B, N, D) that it took."""
        return self.token_format.decode(self.argument)

    @property
    def tokens(self) -> Tensor:
        """The tokens (B, N, D) that it returned."""
        return self.token_format.decode(self.output)

    def with_tokens(self, tokens: Tensor) -> object:
        """Return the output with other tokens (B, N, D)."""
        return self.token_format.encode(tokens, self.output)

    def is_close(self, output: Tensor, expected: Tensor, update: Tensor | None = None) -> bool:
        """Tell whether outputs differ by no more than rounding, beside an update: by default what
        the block adds."""
        tolerance = _TOLERANCE * (1 if output.dtype in (torch.float32, torch.float64) else 30)
        update = self.tokens - self.x if update is None else update
        difference = (output - expected).float().abs().max()
        return bool(difference <= tolerance * update.float().abs().max())

    def run(self, x: Tensor, args: Args, kwargs: Kwargs, *, in_row: bool = False) -> Tensor:
        """Run the block on other tokens x (B, K, D), in one row or not, and return those that it
        returns."""
        argument = self.token_format.encode(x, self.argument, in_row=in_row)
        output = self.block(argument, *args, **kwargs)
        return self.token_format.decode(output, len(x) if in_row else None)


@dataclass(frozen=True)
class Layout:
    """The tokens that enter the first block."""

    token_format: TokenFormat
    num_prefix: int  # P, tokens that are no patches
    # Patches in height and width; of a video, those of its frames below each other
    grid: tuple[int, int]
    frames: int
    in_order: bool  # patches stand in the order of the rows of the image
    num_rows: int = 1  # rows of a batch that hold the tokens of one image, as frames or windows


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


class Chain(NamedTuple):
    """The blocks that can be pruned, and the number of their kind that cannot."""

    calls: list[BlockCall]
    num_apart: int  # after other modules, or not called


def find_blocks(model: nn.Module, forward: Forward, images: Tensor) -> Chain:
    """Return the calls of the blocks of a model in one forward.

    Raises:
        ProbeError: no two modules of a class are called one after the other, or as many others of
            their kind are not.
    """
    recorded = _record_calls(model, forward, images)
    chain: list[BlockCall] = []
    for ndim in (3, 4):
        calls = [call for call in recorded if tokens_of(call.argument).ndim == ndim]
        chain = _first_chain(calls)
        if chain:
            break
    else:
        raise ProbeError(
            "no two blocks are called one after the other, each with the tokens (B, N, D) that the "
            "one before returned"
        )
    num_apart = _count_apart(model, calls, chain)
    if num_apart >= len(chain):
        raise ProbeError(
            f"{num_apart} blocks run apart from a list of {len(chain)}, as in stages or branches"
        )
    x = tokens_of(chain[0].argument)
    token_format = TokenFormat(
        sequence_first=x.shape[0] > 1 and x.shape[1] == 1 and x.ndim == 3,
        in_list=isinstance(chain[0].argument, list),
        map_axis=3 if x.ndim == 4 else None,
    )
    return Chain([call._replace(token_format=token_format) for call in chain], num_apart)


def _count_apart(model: nn.Module, calls: list[BlockCall], chain: list[BlockCall]) -> int:
    """Count the blocks of the class and the width of a chain, or of its list, that stand outside
    it."""
    blocks = {call.block for call in chain}
    block_class = type(chain[0].block)
    width = tokens_of(chain[0].argument).shape[2:]
    apart = {call.block for call in calls if tokens_of(call.argument).shape[2:] == width}
    for container in model.modules():
        children = set(container.children())
        if isinstance(container, nn.ModuleList | nn.Sequential) and blocks & children:
            apart |= children
    return sum(type(block) is block_class for block in apart - blocks)


def _first_chain(calls: list[BlockCall]) -> list[BlockCall]:
    """Return the first calls that are a chain of more than one; none if there is no chain."""
    chains = (_chain_from(calls, start) for start in range(len(calls)))
    return next((chain for chain in chains if len(chain) > 1), [])


def _record_calls(model: nn.Module, forward: Forward, images: Tensor) -> list[BlockCall]:
    """Record the calls of all modules that are larger than a layer and return tokens, or a map, of
    the shape of their input."""
    calls: list[tuple[int, BlockCall]] = []
    started: dict[nn.Module, list[int]] = {}
    count = 0

    def before(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        nonlocal count
        count += 1
        started.setdefault(module, []).append(count)

    def after(module: nn.Module, args: Args, kwargs: Kwargs, output: object) -> None:
        start = started[module].pop()
        argument, args, kwargs = split_tokens(args, kwargs)
        tokens = output[0] if isinstance(output, tuple | list) and output else output
        if argument is None or not isinstance(tokens, Tensor):
            return
        x = tokens_of(argument)
        # Else it changes the class token only; maps have none
        changes = x.ndim == 4 or x.is_meta or not torch.equal(tokens[:, -1], x[:, -1])
        if tokens.shape == x.shape and changes:
            calls.append((start, BlockCall(module, argument, args, kwargs, output)))

    handles = []
    for module in model.modules():
        if next(module.children(), None) is not None:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        forward(images)
    except Exception as error:
        raise ForwardError(
            f"a forward of {tuple(images.shape)} fails: {error}; for other images give it "
            "cropr.apply(model, spec=cropr.find_spec(model, images))"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return [call for _, call in sorted(calls, key=lambda item: item[0])]


TOKEN_ARGUMENTS = ("hidden_states", "hidden_state", "x", "src")


def split_tokens(args: Args, kwargs: Kwargs) -> tuple[object | None, Args, Kwargs]:
    """Return the tokens or the map among the arguments of a block, a tensor or a list of one, if
    any, and the other arguments."""
    if args:
        return (args[0], args[1:], kwargs) if _is_tokens(args[0]) else (None, args, kwargs)
    for name in TOKEN_ARGUMENTS:
        if _is_tokens(kwargs.get(name)):
            return kwargs[name], args, {key: kwargs[key] for key in kwargs if key != name}
    return None, args, kwargs


def _is_tokens(value: object) -> bool:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return isinstance(value, Tensor) and value.ndim in (3, 4)


def _chain_from(calls: list[BlockCall], start: int) -> list[BlockCall]:
    """Return the calls from `start` on of modules of its class, each with the tokens that the last
    one returned."""
    chain = [calls[start]]
    for call in calls[start + 1 :]:
        if type(call.block) is type(chain[0].block) and _is_same(
            tokens_of(call.argument), tokens_of(chain[-1].output)
        ):
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


def find_layout(call: BlockCall, forward: Forward, images: Tensor) -> Layout:
    """Find prefix and grid of the tokens that enter the first block.

    Args:
        call: of the first block.
        forward: runs the model.
        images: an image (1, C, H, W), a video (1, frames, C, H, W), or a spectrogram (1, H, W).

    Raises:
        ProbeError: images are packed, or tokens that are no patches stand between patches.
    """
    x = _first_tokens(call, forward, torch.cat([images, torch.randn_like(images)]))
    num_rows = len(call.x)
    if len(x) != 2 * num_rows:
        raise ProbeError(
            f"a batch of 2 images becomes {tuple(x.shape)} tokens: images are packed, or split "
            "into tiles"
        )
    is_patch = (x[0] != x[num_rows]).any(-1)
    patches = is_patch.nonzero().flatten()
    num_patches = len(patches)
    if not num_patches:
        raise ProbeError("no token that enters the first block depends on the image")
    first, last = int(patches[0]), int(patches[-1])
    if last - first + 1 != num_patches:
        raise ProbeError("tokens that are no patches stand between these")
    after = len(is_patch) - 1 - last
    token_format = replace(call.token_format, around=(first, after) if after else None)
    num_prefix = first + after
    if token_format.map_axis is not None:
        return Layout(token_format, 0, token_format.grid_of(call.argument), 1, True, num_rows)
    call = call._replace(token_format=token_format)
    corners = _corner_tokens(call, forward, images, num_patches)
    grid = _grid_of(corners, num_patches)
    if grid is not None:
        rows, columns = grid
        num_patch_rows = num_patches // columns
        return Layout(
            token_format,
            num_prefix,
            (num_patch_rows, columns),
            num_patch_rows // rows,
            num_rows == 1,
            num_rows,
        )
    height, width = images.shape[-2:]
    widest = max(round(math.sqrt(num_patches * width / height)), 1)
    columns = next(count for count in range(widest, 0, -1) if num_patches % count == 0)
    grid = num_patches // columns, columns
    return Layout(token_format, num_prefix, grid, 1, False, num_rows)


def _grid_of(corners: tuple[int, int, int, int], num_patches: int) -> tuple[int, int] | None:
    """The patches of a frame in height and width, from those at its corners; None if they stand in
    another order than its rows or its columns."""
    first, right, below, last = corners
    for columns, rows in ((right + 1, below), (below + 1, right)):
        if (
            first == 0
            and last == num_patches - 1
            and rows % columns == 0
            and num_patches % (rows + columns) == 0
        ):
            return rows // columns + 1, columns
    return None


def layout_of_shapes(tower: nn.Module, forward: Forward, images: Tensor, call: BlockCall) -> Layout:
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
        num_tokens = _first_tokens(call, forward, images).shape[1]
    finally:
        for handle in handles:
            handle.remove()
    if not grids:
        raise ProbeError("its parameters are on the meta device, and no convolution shows its grid")
    rows = math.prod(grids[-1][:-1])
    columns = grids[-1][-1]
    num_prefix = num_tokens - rows * columns
    frames = rows // grids[-1][-2]
    return Layout(call.token_format, num_prefix, (rows, columns), frames, True)


def _corner_tokens(
    call: BlockCall, forward: Forward, images: Tensor, num_patches: int
) -> tuple[int, int, int, int]:
    """Return the patches that change most with the corners: top left, right and below, and the last
    of the last frame.

    The first three are of the first frame.
    """
    num_rows = len(call.x)
    side = max(int(math.sqrt(math.prod(images.shape[-2:]) / num_patches)), 1)
    corners = images.repeat(5, *[1] * (images.ndim - 1))
    start = slice(None, side)
    end = slice(-side, None)
    for i, (rows, columns) in enumerate(
        ((start, start), (start, end), (end, start), (end, end)), 1
    ):
        frames = corners[i]
        if images.ndim == 5:
            frames = frames[-1] if i == 4 and num_rows == 1 else frames[0]
        frames[..., rows, columns].normal_(std=3)
    x = _first_tokens(call, forward, corners)[::num_rows, -num_patches:].float()
    first, right, below, last = (x[1:] - x[:1]).norm(dim=-1).argmax(1).tolist()
    return first, right, below, last


def _first_tokens(call: BlockCall, forward: Forward, images: Tensor) -> Tensor:
    """Return the tokens (B, N, D) that enter the first block."""
    entered: list[object] = []

    def stop(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        entered.append(split_tokens(args, kwargs)[0])
        raise _Stop

    handle = call.block.register_forward_pre_hook(stop, with_kwargs=True)
    state = torch.random.get_rng_state()
    try:
        forward(images)
    except _Stop:
        pass
    finally:
        handle.remove()
        torch.random.set_rng_state(state)
    return call.token_format.decode(entered[0])


def pixels_entered(
    tower: nn.Module, forward: Forward, images: Tensor, call: BlockCall, layout: Layout
) -> tuple[nn.Module, nn.Module | None]:
    """Return the innermost module that takes the images and runs the blocks, and the projection to
    patches, if any.

    The output of the projection is the patch grid, (B, D, height, width) or (B, D, frames, height,
    width).
    """
    owners = [
        module
        for module in tower.modules()
        if any(child is call.block for child in module.modules())
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
        _first_tokens(call, forward, images)
    finally:
        for handle in handles:
            handle.remove()
    return inner[-1], projections[0] if projections else None
