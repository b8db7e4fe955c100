"""Probing of the head of an unknown model: its blocks return chosen tokens, and whatever changes
the output is read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .probing import Args, BlockCall, Forward, Layout

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
    map_layers: tuple[int, ...]  # blocks whose output it reads past the next block
    num_classes: int


@contextmanager
def _returning(calls: list[BlockCall], outputs: list[Tensor]) -> Iterator[None]:
    """Let each block return chosen tokens, whatever enters it."""
    forwards = [vars(call.block).get("forward") for call in calls]
    try:
        for call, tokens in zip(calls, outputs):
            output = call.with_tokens(tokens)
            call.block.forward = partial(_constant, output)  # type: ignore[method-assign]
        yield
    finally:
        for call, forward in zip(calls, forwards):
            del call.block.forward
            if forward is not None:
                call.block.forward = forward  # type: ignore[method-assign]


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
    """
    prefix = layout.num_prefix
    if images.is_meta:  # nothing to compare
        return HeadReads(
            prefix > 0, "token", True, False, None, (), _num_classes(model, forward(images))
        )
    # Image 1 is as image 0, 2 differs in the class token, 3 in a patch, 4 in what all earlier
    # blocks return.
    count = 5
    last = calls[-1].tokens[:1].repeat(count, 1, 1)
    last[2, 0] = last[2, 0].roll(1)
    last[3, -1] = last[3, -1].roll(1)
    with _returning(calls, [*(_varied(call, count, 4) for call in calls[:-1]), last]):
        output = forward(images.repeat(count, *[1] * (images.ndim - 1)))
    pooled = pooled_output(output)
    leaves = _leaves(output, count)
    reads_patches = pooled is not None and _differs(pooled, 3)
    returns_tokens = any(_differs(leaf, 3) for leaf in leaves)
    class_token = prefix > 0 and (pooled is None or _differs(pooled, 2))
    map_layers: list[int] = []
    # As after a ReLU: it may read all
    if not any(_differs(leaf, row) for leaf in leaves for row in (2, 3, 4)):
        map_layers = list(range(len(calls) - 1))
    elif any(_differs(leaf, 4) for leaf in leaves):
        map_layers = [
            layer for layer in range(len(calls) - 1) if _reads_map(layer, forward, images, calls)
        ]
    norm = _module_after(model, forward, images, calls)
    pooling: Pooling = "token"
    needs_map = False
    half = prefix + (calls[0].x.shape[1] - prefix + 1) // 2
    fewer = [call.tokens[:1, :half] for call in calls]
    try:
        with _returning(calls, fewer):
            without = pooled_output(forward(images))
    except (RuntimeError, ValueError, TypeError, IndexError):
        needs_map = True
        without = None
    if reads_patches and not needs_map:
        pooling = (
            "average"
            if _averages(norm, forward, images, calls, (prefix, half), without)
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


def _varied(call: BlockCall, count: int, row: int) -> Tensor:
    """The tokens that a block returned for image 0, count times, and others in one row."""
    tokens = call.tokens[:1].repeat(count, 1, 1)
    tokens[row] = tokens[row].roll(1, -1)
    return tokens


def _leaves(output: object, count: int) -> list[Tensor]:
    """The tensors (count, ...) of an output, without those that are random: image 1 is as image
    0."""
    leaves = [
        leaf
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.shape[:1] == (count,)
    ]
    return [leaf for leaf in leaves if not _differs(leaf, 1)]


def _reads_map(layer: int, forward: Forward, images: Tensor, calls: list[BlockCall]) -> bool:
    """Tell whether the output depends on what one block returns, whatever the last one does."""
    outputs = [call.tokens[:1].expand(3, -1, -1) for call in calls]
    outputs[layer] = _varied(calls[layer], 3, 2)
    with _returning(calls, outputs):
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
    tokens = calls[-1].tokens[:1].clone()
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
        with _returning(calls, [call.tokens[:1] for call in calls[:-1]] + [tokens]):
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
    tokens = calls[-1].tokens[:1].clone()

    def level(module: nn.Module | None, args: Args, output: Tensor) -> Tensor:
        start, stop = patches
        mean = output[:, start:stop].mean(1, keepdim=True)
        return torch.cat([output[:, :stop], mean.expand(-1, output.shape[1] - stop, -1)], 1)

    handle = None
    if norm is None:
        tokens = level(norm, (), tokens)
    else:
        handle = norm.register_forward_hook(level)
    try:
        with _returning(calls, [call.tokens[:1] for call in calls[:-1]] + [tokens]):
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
