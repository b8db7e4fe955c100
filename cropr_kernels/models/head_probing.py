"""What the head of an unknown model reads: its blocks return chosen tokens, and whatever changes
the output is read."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .probing import Args, BlockCall, Forward, Layout, ProbeError
from .token_format import tokens_of

Pooling = Literal["token", "average", "other"]


@dataclass(frozen=True)
class HeadReads:
    """The tokens after the last block that the output of a model depends on."""

    class_token: bool  # the pooled output reads the first token
    pooling: Pooling  # of the patches
    returns_tokens: bool  # some output depends on the patches
    needs_map: bool  # it fails without all patches
    # The module that reads the tokens after the last block and returns (B, N, D)
    norm: nn.Module | None
    map_layers: tuple[int, ...]  # blocks whose output it reads past the next block, or by hooks
    num_classes: int


@contextmanager
def _returning(
    calls: list[BlockCall], outputs: list[Tensor], hooked: Tensor | None = None
) -> Iterator[None]:
    """Let each block return chosen tokens (B, N, D), whatever enters it; hooks on the last one see
    other tokens, `hooked`."""
    seen = outputs if hooked is None else [*outputs[:-1], hooked]
    output = calls[-1].with_tokens(outputs[-1])
    with ExitStack() as stack:
        for call, tokens in zip(calls, seen):
            stack.enter_context(_returning_as_is(call.block, call.with_tokens(tokens)))
        handle = calls[-1].block.register_forward_hook(partial(_constant, output))
        stack.callback(handle.remove)
        yield


@contextmanager
def _returning_as_is(block: nn.Module, output: object) -> Iterator[None]:
    """Let a block return an output, whatever enters it."""
    forward = vars(block).get("forward")
    block.forward = partial(_constant, output)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del block.forward
        if forward is not None:
            block.forward = forward  # type: ignore[method-assign]


def _constant(value: object, *args: object, **kwargs: object) -> object:
    return value


def read_head(
    model: nn.Module, forward: Forward, images: Tensor, calls: list[BlockCall], layout: Layout
) -> HeadReads:
    """Find what the head reads: which tokens, and of which blocks, change the output of the model.

    Args:
        model: runs the blocks.
        forward: runs it.
        images: (1, C, H, W).
        calls: of its blocks.
        layout: of its tokens.

    Raises:
        ProbeError: its output mixes the images of a batch.
    """
    prefix = layout.num_prefix
    if images.is_meta:  # nothing to compare
        return HeadReads(
            prefix > 0, "token", True, False, None, (), _num_classes(model, forward(images))
        )
    # Image 1 is as image 0, 2 differs in the class token, 3 in a patch, 4 in what all earlier
    # blocks return.
    count = 5
    num_rows = layout.num_rows
    last = calls[-1].tokens.repeat(count, 1, 1)
    last[2 * num_rows, 0] = last[2 * num_rows, 0].roll(1)
    last[3 * num_rows, -1] = last[3 * num_rows, -1].roll(1)
    varied = [_varied(call, count, 4) for call in calls]
    with _returning(calls, [*varied[:-1], last], varied[-1]):
        output = forward(images.repeat(count, *[1] * (images.ndim - 1)))
    pooled = pooled_output(output)
    leaves = _leaves(output, count)
    if pooled is not None and len(pooled) % count:
        raise ProbeError(f"{count} images become {len(pooled)} outputs")
    if pooled is not None and num_rows > 1:
        pooled = pooled.unflatten(0, (count, -1))
    reads_patches = pooled is not None and _differs(pooled, 3)
    returns_tokens = any(_differs(leaf, 3) for leaf in leaves)
    class_token = prefix > 0 and (pooled is None or _differs(pooled, 2))
    map_layers: list[int] = []
    # As after a ReLU: it may read all
    if not any(_differs(leaf, row) for leaf in leaves for row in (2, 3, 4)):
        map_layers = list(range(len(calls)))
    elif any(_differs(leaf, 4) for leaf in leaves):
        map_layers = [
            layer for layer in range(len(calls)) if _reads_map(layer, forward, images, calls)
        ]
    norm = _module_after(model, forward, images, calls)
    pooling: Pooling = "token"
    without = None
    # One patch less is no rectangle
    num_fewer = max(calls[0].x.shape[1] - 1, prefix + 1)
    fewer = [call.tokens[:, :num_fewer] for call in calls]
    try:
        with _returning(calls, fewer):
            output_of_fewer = forward(images)
        without = pooled_output(output_of_fewer)
        needs_map = _reshapes(output_of_fewer, forward(images))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        needs_map = True
    if reads_patches and not needs_map:
        pooling = (
            "average"
            if _averages(norm, forward, images, calls, (prefix, num_fewer), without)
            else "other"
        )
    elif reads_patches:
        pooling = "other"
    return HeadReads(
        class_token,
        pooling,
        returns_tokens,
        needs_map,
        norm,
        tuple(map_layers),
        _num_classes(model, output),
    )


def _reshapes(output: object, full: object) -> bool:
    """Tell whether fewer tokens change the shape of a map (B, D, height, width) in an output."""
    pairs = zip(tree_leaves(output), tree_leaves(full))
    return any(
        isinstance(leaf, Tensor) and leaf.ndim > 3 and leaf.shape != other.shape
        for leaf, other in pairs
    )


def _varied(call: BlockCall, count: int, row: int) -> Tensor:
    """The tokens that a block returned for an image, count times, and others in one of these."""
    tokens = call.tokens.repeat(count, 1, 1).unflatten(0, (count, -1))
    tokens[row] = tokens[row].roll(1, -1)
    return tokens.flatten(0, 1)


def _leaves(output: object, count: int) -> list[Tensor]:
    """The tensors of an output as (count, ...), without those that are random: image 1 is as image
    0."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    leaves: list[Tensor] = []
    for tensor in tensors:
        # Maps of all blocks in one tensor are (blocks, B, N, D); tokens of all images (B N, D)
        dim = next((i for i, size in enumerate(tensor.shape[:2]) if size == count), None)
        if dim is not None:
            leaves.append(tensor.movedim(dim, 0))
        elif tensor.ndim and tensor.shape[0] % count == 0:
            leaves.append(tensor.unflatten(0, (count, -1)))
    return [leaf for leaf in leaves if not _differs(leaf, 1)]


def _reads_map(layer: int, forward: Forward, images: Tensor, calls: list[BlockCall]) -> bool:
    """Tell whether the output depends on what one block returns, whatever the last one does; of
    the last one, on what its hooks see."""
    outputs = [call.tokens.repeat(3, 1, 1) for call in calls]
    hooked = outputs[-1]
    if layer == len(calls) - 1:
        hooked = _varied(calls[layer], 3, 2)
    else:
        outputs[layer] = _varied(calls[layer], 3, 2)
    with _returning(calls, outputs, hooked):
        output = forward(images.repeat(3, *[1] * (images.ndim - 1)))
    return any(_differs(leaf, 2) for leaf in _leaves(output, 3))


def pooled_output(output: object) -> Tensor | None:
    """Return the logits (B, classes) or pooled features (B, D) of an output, if it has any."""
    if isinstance(output, Tensor):
        return output if output.ndim == 2 else None
    for name in ("logits", "image_embeds", "pooler_output"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value if value.ndim == 2 else None
    return None


def _num_classes(model: nn.Module, output: object) -> int:
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.ndim == 2:
        return logits.shape[1]
    return getattr(model, "num_classes", 0) if isinstance(output, Tensor) else 0


def _differs(batch: Tensor, i: int) -> bool:
    """Tell whether image i of a batch differs from the first one by more than rounding."""
    if not batch.is_floating_point():
        return not torch.equal(batch[i], batch[0])
    scale = batch[0].abs().max() + batch[i].abs().max()
    return bool((batch[i] - batch[0]).abs().max() > 4 * torch.finfo(batch.dtype).eps * scale)


def _module_after(
    model: nn.Module, forward: Forward, images: Tensor, calls: list[BlockCall]
) -> nn.Module | None:
    """Return the module that reads the tokens after the last block, and returns as many, if there
    is one."""
    last = calls[-1].with_tokens(calls[-1].tokens.clone())
    tokens = tokens_of(last)
    found: list[nn.Module] = []

    def after(module: nn.Module, args: Args, output: object) -> None:
        if (
            args
            and args[0] is tokens
            and isinstance(output, Tensor)
            and output.shape == tokens.shape
        ):
            found.append(module)

    blocks = {id(module) for call in calls for module in call.block.modules()}
    candidates = [module for module in model.modules() if id(module) not in blocks]
    handles = [module.register_forward_hook(after) for module in candidates]
    try:
        with (
            _returning(calls[:-1], [call.tokens for call in calls[:-1]]),
            _returning_as_is(calls[-1].block, last),
        ):
            forward(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _averages(
    norm: nn.Module | None,
    forward: Forward,
    images: Tensor,
    calls: list[BlockCall],
    patches: tuple[int, int],
    without: Tensor | None,
) -> bool:
    """Tell whether tokens that are the mean of the patches before them count as none."""
    tokens = calls[-1].tokens.clone()
    token_format = calls[-1].token_format

    def level(module: nn.Module | None, args: Args, output: Tensor) -> Tensor:
        start, stop = patches
        x = token_format.prefix_first(output)
        mean = x[:, start:stop].mean(1, keepdim=True)
        return token_format.in_place(
            torch.cat([x[:, :stop], mean.expand(-1, x.shape[1] - stop, -1)], 1)
        )

    handle = None
    if norm is None:
        tokens = token_format.prefix_first(level(norm, (), token_format.in_place(tokens)))
    else:
        handle = norm.register_forward_hook(level)
    try:
        with _returning(calls, [call.tokens for call in calls[:-1]] + [tokens]):
            pooled = pooled_output(forward(images))
    finally:
        if handle is not None:
            handle.remove()
    if pooled is None or without is None or pooled.shape != without.shape:
        return False
    tolerance = 20 * torch.finfo(pooled.dtype).eps
    return bool((pooled - without).abs().max() <= tolerance * without.abs().max())


def reads_places(forward: Forward, images: Tensor, calls: list[BlockCall], num_prefix: int) -> bool:
    """Tell whether an output depends on the places of the patches after the last block, or on their
    number: kept patches in a row are then others than it means.

    Args:
        forward: runs the model.
        images: (1, C, H, W).
        calls: of its blocks.
        num_prefix: P, first tokens that are no patches.
    """
    count = 3  # image 1 is as image 0, 2 has its patches in another order
    num_tokens = calls[-1].tokens.shape[1]
    order = _other_order(num_tokens - num_prefix)
    last = calls[-1].tokens.repeat(count, 1, 1).unflatten(0, (count, -1))
    last[2, :, num_prefix:] = last[2, :, num_prefix:][:, order]
    earlier = [call.tokens.repeat(count, 1, 1) for call in calls[:-1]]
    with _returning(calls, [*earlier, last.flatten(0, 1)]):
        output = forward(images.repeat(count, *[1] * (images.ndim - 1)))
    if any(_reads_order(leaf, order, num_tokens) for leaf in _leaves(output, count)):
        return True
    return pooled_output(output) is not None and _reads_number(forward, images, calls, num_prefix)


def _other_order(count: int) -> Tensor:
    """Draw a permutation that leaves nothing in its place."""
    cycle = torch.randperm(count)
    return torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(1))


def _reads_order(leaf: Tensor, order: Tensor, num_tokens: int) -> bool:
    """Tell whether an output depends on the order of the patches, more than that some axis follows
    it: image 2 has it changed."""
    if not leaf.is_floating_point() or _is_near(leaf[2], leaf[0]):
        return False
    patches = order.to(leaf.device)
    prefix = torch.arange(num_tokens - len(order), device=leaf.device)
    orders = (patches, torch.cat([prefix, patches + len(prefix)]))
    return not any(
        leaf.shape[axis + 1] == len(rows) and _is_near(leaf[2], leaf[0].index_select(axis, rows))
        for axis in range(leaf.ndim - 1)
        for rows in orders
    )


def _reads_number(
    forward: Forward, images: Tensor, calls: list[BlockCall], num_prefix: int
) -> bool:
    """Tell whether the pooled output changes if all patches, or all tokens, are there twice."""
    tokens = calls[-1].tokens
    outputs: list[Tensor | None] = []
    for last in (tokens, torch.cat([tokens, tokens[:, num_prefix:]], 1), tokens.repeat(1, 2, 1)):
        try:
            with _returning(calls, [*(call.tokens for call in calls[:-1]), last]):
                outputs.append(pooled_output(forward(images)))
        # A head for so many tokens
        except (RuntimeError, ValueError, TypeError, IndexError):
            outputs.append(None)
    plain, *doubled = outputs
    return not any(
        plain is not None and pooled is not None and _is_near(pooled, plain) for pooled in doubled
    )


def _is_near(x: Tensor, expected: Tensor) -> bool:
    """Tell whether an output is another one but for the order of its sums."""
    tolerance = max(1e-3, 16 * torch.finfo(x.dtype).eps)
    return bool((x - expected).abs().max() <= tolerance * expected.abs().max())
