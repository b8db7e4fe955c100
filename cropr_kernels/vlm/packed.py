"""Pruning inside towers that pack images into one row, which cu_seqlens cuts (Qwen-VL, GLM-V).

The unit is a group of s x s rows, which the merger makes one token. Blocks see the rows of active
groups, with their rotary rows and segments; what reads them later sees NaN where a group is pruned.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..schedule import Schedule
from .choice import choose
from .features import entries_of, finite_rows

# Called after every block with its output, when nothing is pruned
Observe = Callable[[int, Tensor], None]


@dataclass
class PackedState:
    """The forward of one batch of images, in one thread."""

    num_groups: list[int]  # of each image
    counts: list[list[int]]  # kept groups after each block, of each image
    num_rows: int = 0  # T, of all images
    active: list[int] = field(default_factory=list)  # active groups of each image
    positions: Tensor | None = None  # (rows,), of the active rows; None: all
    next_layer: int = 0


class _States(threading.local):
    state: PackedState | None = None
    observe: Observe | None = None
    num_groups: list[int]  # of each image that is observed
    survivors: Tensor | None = None  # positions of the rows that left the tower last
    marks: bool = False  # NaN stands for what is no survivor, whatever the blocks give


class PackedTower(nn.Module):
    """Pruning inside a packed tower.

    Args:
        tower: its forward takes grid_thw, its blocks cu_seqlens and position_embeddings.
        schedule: counts groups of s x s patches, of each image.

    Raises:
        TypeError: it is no such tower.
    """

    queries: Tensor | None

    def __init__(self, tower: nn.Module, schedule: Schedule):
        super().__init__()
        self.schedule = schedule
        self.blocks = _Hidden(blocks_of(tower))
        self.group = int(tower.spatial_merge_size) ** 2  # type: ignore[arg-type]
        self.register_buffer("queries", None, persistent=False)  # (modules, D)
        self.states = _States()
        self.hooks: list[RemovableHandle] = [
            tower.register_forward_pre_hook(self._before_tower, with_kwargs=True),
            tower.register_forward_hook(self._after_tower, always_call=True),
        ]
        blocks = self.blocks.modules
        inside = {module for block in blocks for module in block.modules()}
        for layer, block in enumerate(blocks):
            self.hooks += [
                block.register_forward_pre_hook(
                    partial(self._before_block, layer), with_kwargs=True
                ),
                block.register_forward_hook(partial(self._after_block, layer)),
            ]
        for module in tower.modules():
            if (
                module is not tower
                and module not in inside
                and next(module.parameters(), None) is not None
            ):
                self.hooks.append(module.register_forward_pre_hook(self._before_reader))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "states": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "states": _States()})

    def extra_repr(self) -> str:
        return str(self.schedule)

    @property
    def depth(self) -> int:
        return len(self.blocks.modules)

    def features(self, call: Callable[[], Any]) -> tuple[Any, Tensor]:
        """Compute image features, and tell of each row whether the tower has left it.

        NaN in rows that count for nothing would be NaN in gradients of what reads them. So with
        gradients these rows are 0, and NaN marks them in a second, shorter pass.
        """
        output = call()
        if not torch.is_grad_enabled():
            return output, finite_rows(entries_of(output.pooler_output))
        self.states.marks = True
        try:
            with torch.no_grad():
                marked = call()
        finally:
            self.states.marks = False
        return output, finite_rows(entries_of(marked.pooler_output))

    def num_kept(self, num_groups: int) -> int:
        """Count the groups of an image that leave the tower, of `num_groups`."""
        return self.schedule.counts(num_groups, self.depth, 0)[-1]

    @contextmanager
    def observing(self, observe: Observe) -> Iterator[list[int]]:
        """Prune nothing in this thread, and call `observe` after every block; the list receives the
        groups of each image."""
        num_groups: list[int] = []
        self.states.observe = observe
        self.states.num_groups = num_groups
        try:
            yield num_groups
        finally:
            self.states.observe = None

    def _before_tower(
        self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        arguments = dict(zip(inspect.signature(tower.forward).parameters, args)) | kwargs
        num_groups = [int(rows) // self.group for rows in arguments["grid_thw"].prod(1)]
        if self.states.observe is not None:
            self.states.num_groups.extend(num_groups)
        counts = [self.schedule.counts(count, self.depth, 0) for count in num_groups]
        self.states.state = PackedState(num_groups, counts, active=list(num_groups))

    def _after_tower(self, tower: nn.Module, args: object, output: object) -> None:
        self.states.state = None

    def _before_block(
        self, layer: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Reduce segments and rotary rows to those of the active rows."""
        state = self.states.state
        if state is None or state.next_layer != layer:
            raise RuntimeError(
                f"cropr: block {layer} of a pruned tower ran without those before it "
                "(recomputation in backward is not supported inside packed towers)"
            )
        state.next_layer += 1
        arguments = dict(zip(inspect.signature(block.forward).parameters, args)) | kwargs
        if layer == 0:
            state.num_rows = len(next(iter(arguments.values())))
        if state.positions is None:
            return None
        first = next(iter(arguments))
        selected = select_rows(arguments, state.positions)
        return (selected.pop(first),), selected

    def _after_block(self, layer: int, block: nn.Module, args: object, output: Tensor) -> Tensor:
        """Prune groups of the output (rows, D); after the last block put the others in place."""
        state = self.states.state
        if state is None:
            return output
        if self.states.observe is not None:
            self.states.observe(layer, output)
            return output
        if layer == self.depth - 1:
            return self._restored(state, output)
        counts = [image[layer] for image in state.counts]
        if self.states.marks:
            counts = [1] * len(counts)
        if counts == state.active:
            return output
        rows = output.unflatten(0, (-1, self.group))
        query = None if self.queries is None else self.queries[layer]
        index: list[Tensor] = []
        start = 0
        for count, active in zip(counts, state.active):
            groups = rows[start : start + active].detach().float().mean(1)
            index.append(start + choose(groups, count, query))
            start += active
        kept = torch.cat(index)
        positions = torch.arange(state.num_rows, device=output.device)
        positions = positions if state.positions is None else state.positions
        state.positions = positions.unflatten(0, (-1, self.group))[kept].flatten()
        state.active = counts
        return rows[kept].flatten(0, 1)

    def _restored(self, state: PackedState, rows: Tensor) -> Tensor:
        """Put the rows after the last block where they were."""
        if not self.states.marks:
            self.states.survivors = state.positions
            return self._in_place(state, rows)
        survivors = self.states.survivors
        full = rows.new_zeros(state.num_rows, *rows.shape[1:])
        if survivors is None:
            return full
        return full.fill_(float("nan")).index_fill(0, survivors, 0.0)

    def _in_place(self, state: PackedState, rows: Tensor) -> Tensor:
        """Put active rows where they were, (T, D); NaN where a group is pruned, for gradients 0."""
        if state.positions is None:
            return rows
        fill = 0.0 if torch.is_grad_enabled() else float("nan")
        full = rows.new_full((state.num_rows, *rows.shape[1:]), fill)
        return full.index_copy(0, state.positions, rows)

    def _before_reader(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Give all rows to a module that reads the tokens between two blocks (deepstack)."""
        state = self.states.state
        if state is None or state.positions is None or not args:
            return None
        if not 0 < state.next_layer < self.depth or not isinstance(args[0], Tensor):
            return None
        if len(args[0]) != len(state.positions):
            return None
        return self._in_place(state, args[0]), *args[1:]


class _Hidden:
    """Modules that are registered elsewhere."""

    def __init__(self, modules: list[nn.Module]):
        self.modules = modules


def find_tower(model: nn.Module) -> nn.Module | None:
    """Find the tower that packs its images; None if there is none."""
    for module in model.modules():
        if hasattr(module, "spatial_merge_size") and _takes(module, "grid_thw"):
            return module
    return None


def blocks_of(tower: nn.Module) -> list[nn.Module]:
    """The blocks of a packed tower; TypeError if it has none that take segments."""
    for children in tower.children():
        if isinstance(children, nn.ModuleList) and len(children) > 1:
            blocks = list(children)
            names = ("cu_seqlens", "position_embeddings")
            if all(_takes(block, name) for block in blocks for name in names):
                return blocks
    raise TypeError(
        f"cropr.prune_image_tokens: {type(tower).__name__} has no blocks that take cu_seqlens and "
        "position_embeddings"
    )


def _takes(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


def select_rows(arguments: dict[str, Any], positions: Tensor) -> dict[str, Any]:
    """Reduce the segments and rotary tables of a block's arguments to the rows at `positions`."""
    cu_seqlens: Tensor = arguments["cu_seqlens"]
    # Segments in which no row is left are gone
    ends = torch.searchsorted(positions, cu_seqlens.to(positions.dtype)).unique_consecutive()
    selected = arguments | {
        "cu_seqlens": ends.to(cu_seqlens.dtype),
        "position_embeddings": tuple(
            table[positions] for table in arguments["position_embeddings"]
        ),
    }
    longest = arguments.get("max_seqlen")
    if longest is not None:
        value = (ends[1:] - ends[:-1]).max()
        selected["max_seqlen"] = value.to(longest) if isinstance(longest, Tensor) else int(value)
    return selected
