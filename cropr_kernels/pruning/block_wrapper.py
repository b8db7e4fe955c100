"""Pruning from within: for models that run their blocks themselves, such as those of transformers and torchvision.

Their code stays as it is, and they keep all their outputs. Each block's class changes, so that a call of it goes
through a `Passage`: tokens leave behind the block, and with Last Layer Fusion they are back before the last one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..models.hosts import shuffles_patches
from .masks import make_masks
from .state import Departures, Stream


class Passage:
    """What the blocks of one model share while a batch goes through them. It begins anew at the first block."""

    def __init__(self, stack: Any, depth: int, num_prefix: int):
        self.stack, self.depth, self.num_prefix = stack, depth, num_prefix
        self.stream: Stream | None = None
        self.following = 0  # the block that runs next
        self.aux: list[Tensor] = []
        self.departures: Departures | None = None  # called whenever tokens leave
        self.protect: Tensor | None = None  # of the batch under way, (B, grid height, grid width)
        self.observer: Callable[[int, Tensor], None] | None = None  # called behind every block, and nothing is pruned

    def run(
        self, layer: int, block: Callable[..., Any], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What block `layer` gives for the tokens alive, without those that leave behind it.

        Raises:
            ValueError: the block is called with a tensor that is neither a rotary table nor a mask (B, 1, N, N).
            RuntimeError: the blocks do not run one after the other.
        """
        if self.observer is not None:
            output = block(x, *args, **kwargs)
            self.observer(layer, output[0] if isinstance(output, tuple) else output)
            return output
        tables = kwargs.get("position_embeddings")
        if layer == 0:
            self.stream, self.following = self._begin(x, tables), 0
        stream = self.stream
        if stream is None or layer != self.following:
            raise RuntimeError(f"cropr: block {layer} of a pruned model ran without those before it")
        x, alive = stream.enter(layer, x), stream.positions
        if alive is not None:
            args = tuple(_mask_at(value, alive) for value in args)
            kwargs = {name: _mask_at(value, alive) for name, value in kwargs.items() if name != "position_embeddings"}
            if stream.rope is not None:
                kwargs["position_embeddings"] = stream.rope.chunk(2, dim=-1)
        output = block(x, *args, **kwargs)
        x, *others = output if isinstance(output, tuple) else (output,)
        x, self.following = stream.leave(layer, x), layer + 1
        if self.following == self.depth:
            self.aux, self.stream = stream.aux, None
        return (x, *others) if isinstance(output, tuple) else x

    def _begin(self, x: Tensor, tables: tuple[Tensor, Tensor] | None) -> Stream:
        stack, prefix = self.stack, self.num_prefix
        masks = make_masks(self.protect, None, x.shape[0], x.shape[1] - prefix, prefix)
        return Stream(
            stack,
            stack.schedule(x.shape[1], self.depth, self.num_prefix, stack.llf),
            self.depth,
            num_prefix=self.num_prefix,
            llf=stack.llf,
            rope=None if tables is None else torch.cat(tables, -1),
            training=stack.training,
            departures=self.departures,
            masks=masks,
        )

    def take_aux(self) -> list[Tensor]:
        """The auxiliary predictions of the last batch, which are then forgotten."""
        aux, self.aux = self.aux, []
        return aux


def _mask_at(value: Any, alive: Tensor) -> Any:
    """An attention mask (B or 1, heads or 1, queries or 1, N) for the tokens alive (B, K); what is no tensor, as is."""
    if not isinstance(value, Tensor):
        return value
    if value.ndim != 4:
        raise ValueError(
            f"cropr: a block of a pruned model is called with a tensor of shape {tuple(value.shape)}; it may be a mask "
            "(B, 1, N, N)"
        )
    value = value.expand(alive.shape[0], -1, -1, -1)
    if value.shape[2] != 1:
        value = value.gather(2, alive[:, None, :, None].expand(-1, value.shape[1], -1, value.shape[3]))
    return value.gather(3, alive[:, None, None].expand(-1, *value.shape[1:3], -1))


class PassedBlock:
    """Mixed into a block's class: its calls go through the passage. Recomputation stays within the block."""

    cropr_passage: tuple[Passage, int]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        passage, layer = self.cropr_passage
        return passage.run(layer, super().__call__, x, args, kwargs)  # type: ignore[misc]


class PrunedWithin:
    """Mixed into a model's class: the same outputs; in training (output, auxiliary predictions).

    protect, (B, grid height, grid width) bool, names patches that stay while anything else can leave.
    """

    cropr: Any
    training: bool

    def forward(self, *args: Any, protect: Tensor | None = None, padding: Tensor | None = None, **kwargs: Any) -> Any:
        if padding is not None:
            raise ValueError(f"cropr: padding is not supported for {type(self).__mro__[2].__name__}")
        if protect is not None and shuffles_patches(self):
            raise ValueError(
                f"cropr: protect is not supported for {type(self).__mro__[2].__name__}: it shuffles patches"
            )
        self.cropr.passage.protect = protect
        try:
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.cropr.passage.protect = None
        return (output, self.cropr.passage.take_aux()) if self.training else output


_passed_classes: dict[type, type] = {}


def connect(blocks: Any, passage: Passage) -> None:
    """Lead all calls of these blocks through a passage."""
    for layer, block in enumerate(blocks):
        base = type(block)
        if base not in _passed_classes:
            _passed_classes[base] = type(f"Cropr{base.__name__}", (PassedBlock, base), {"__module__": __name__})
        block.cropr_passage = passage, layer
        block.__class__ = _passed_classes[base]


def disconnect(blocks: Any) -> None:
    """Undo `connect`."""
    for block in blocks:
        block.__class__ = type(block).__mro__[2]
        del block.cropr_passage
