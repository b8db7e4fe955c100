"""Pruning inside towers that pack images into one row, which cu_seqlens cuts (Qwen-VL, GLM-V).

The unit is a group of s x s rows, which the merger makes one token. Blocks see the rows of active
groups, with their rotary rows and segments; what reads them later sees NaN where a group is pruned.
"""

import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..pruning.merging import Merge
from ..schedule import Schedule
from .features import entries_of, finite_rows
from .groups import (
    Reduced,
    SegmentSizes,
    drop_groups,
    merge_groups,
    packed_colors,
    packed_order,
)

# Called after every block with its output, when nothing is pruned
Observe = Callable[[int, Tensor], None]


@dataclass
class PackedState:
    """The forward of one batch of images, in one thread."""

    num_groups: list[int]  # of each image
    counts: list[list[int]]  # kept groups after each block, of each image
    orders: list[Tensor]  # (groups,) of each image: the group at each place
    colors: Tensor | None = None  # (groups,), of all images, if groups merge
    num_rows: int = 0  # T, of all images
    active: list[int] = field(default_factory=list)  # active groups of each image
    positions: Tensor | None = None  # (rows,), of the active rows; None: all
    sizes: Tensor | None = None  # (groups,), of the active groups; None: all are 1
    attention: SegmentSizes | None = None  # in the block that runs
    next_layer: int = 0
    num_reductions: int = 0

    def color_of(self, groups: Tensor) -> Tensor:
        """The priority of groups (G,) of all images: the two colors in turn."""
        if self.colors is None:
            raise RuntimeError("cropr: groups of this tower do not merge")
        color = self.colors.to(groups.device)[groups]
        return color if self.num_reductions % 2 == 0 else 1 - color

    def sizes_by_group(self, group: int) -> Tensor | None:
        """The sizes of all groups, in the order of rows and columns of each image; 0: merged into
        another."""
        if self.sizes is None or self.positions is None:
            return None
        sizes = self.sizes.new_zeros(sum(self.num_groups))
        sizes[self.positions[::group] // group] = self.sizes
        parts = zip(sizes.split(self.num_groups), self.orders)
        return torch.cat([part[order.argsort().to(part.device)] for part, order in parts])


class _States(threading.local):
    state: PackedState | None = None
    observe: Observe | None = None
    num_groups: list[int]  # of each image that is observed
    survivors: Tensor | None = None  # positions of the rows that left the tower last
    sizes: Tensor | None = None  # (groups,), as the tower left them last; 0: pruned
    marks: bool = False  # NaN stands for what is no survivor, whatever the blocks give


class PackedTower(nn.Module):
    """Pruning inside a packed tower.

    Args:
        tower: its forward takes grid_thw, its blocks cu_seqlens and position_embeddings.
        schedule: counts groups of s x s patches, of each image.
        merge: groups merge into others of their image, instead of being lost.

    Raises:
        TypeError: it is no such tower.
    """

    queries: Tensor | None

    def __init__(self, tower: nn.Module, schedule: Schedule, merge: Merge | None = None):
        super().__init__()
        self.schedule = schedule
        self.merge = merge
        self.blocks = _Hidden(blocks_of(tower))
        self.side = int(tower.spatial_merge_size)  # type: ignore[arg-type]
        self.group = self.side**2
        pixels: Any = getattr(tower, "window_size", None)
        patch: Any = getattr(tower, "patch_size", None)
        self.window = None if pixels is None else pixels // self.side // patch
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
                block.register_forward_hook(self._end_attention, always_call=True),
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
        return str(self.schedule) + ("" if self.merge is None else f", {self.merge}")

    @property
    def depth(self) -> int:
        return len(self.blocks.modules)

    def features(self, call: Callable[[], Any]) -> tuple[Any, Tensor]:
        """Compute image features, and the size of each row: groups that it stands for; 0 if the
        tower has pruned it.

        NaN in rows that count for nothing would be NaN in gradients of what reads them. So with
        gradients these rows are 0, and NaN marks them in a second, shorter pass.
        """
        output = marked = call()
        sizes = self.states.sizes
        if torch.is_grad_enabled():
            self.states.marks = True
            try:
                with torch.no_grad():
                    marked = call()
            finally:
                self.states.marks = False
        present = finite_rows(entries_of(marked.pooler_output))
        if sizes is None:
            return output, present.float()
        if not torch.equal(sizes > 0, present):
            raise RuntimeError("cropr: a packed tower has another order of groups than its windows")
        return output, sizes

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
        grids = arguments["grid_thw"].tolist()
        orders = [packed_order(grid, self.side, self.window) for grid in grids]
        num_groups = [len(order) for order in orders]
        if self.states.observe is not None:
            self.states.num_groups.extend(num_groups)
        counts = [self.schedule.counts(count, self.depth, 0) for count in num_groups]
        state = PackedState(num_groups, counts, orders, active=list(num_groups))
        if self.merge is not None:
            colors = [packed_colors(grid, self.side, order) for grid, order in zip(grids, orders)]
            state.colors = torch.cat(colors)
        self.states.state = state
        if not self.states.marks:
            self.states.sizes = None

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
        if state.sizes is not None:
            ends = selected["cu_seqlens"]
            sizes = state.sizes.repeat_interleave(self.group)
            state.attention = SegmentSizes(sizes, (ends[1:] - ends[:-1]).tolist())
            state.attention.__enter__()
        return (selected.pop(first),), selected

    def _end_attention(self, block: nn.Module, args: object, output: object) -> None:
        state = self.states.state
        if state is None or state.attention is None:
            return
        attention, state.attention = state.attention, None
        attention.__exit__(None, None, None)
        if output is not None:
            attention.require_all(type(block).__name__)

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
        return self._reduced(state, layer, output.unflatten(0, (-1, self.group)), counts)

    def _reduced(self, state: PackedState, layer: int, groups: Tensor, counts: list[int]) -> Tensor:
        """Keep `counts` of the active groups (groups, S, D) of each image: rows (rows, D)."""
        query = None if self.queries is None else self.queries[layer]
        places = torch.arange(state.num_rows, device=groups.device)
        places = places if state.positions is None else state.positions
        places = places.unflatten(0, (-1, self.group))
        merges = self.merge is not None and not self.states.marks
        sizes = state.sizes
        if merges and sizes is None:
            sizes = torch.ones(len(groups), device=groups.device)
        reduced = []
        starts = itertools.accumulate(state.active, initial=0)
        for count, active, start in zip(counts, state.active, starts):
            part = slice(start, start + active)
            if self.merge is None or sizes is None or not merges:
                kept = drop_groups(groups[part], count, query)
            elif count == active:
                kept = Reduced(groups[part], places.new_tensor(range(active)), sizes[part])
            else:
                color = state.color_of(places[part, 0] // self.group)
                kept = merge_groups(groups[part], count, query, sizes[part], self.merge, color)
            reduced.append(kept._replace(idx=start + kept.idx))
        state.num_reductions += 1
        state.positions = places[torch.cat([kept.idx for kept in reduced])].flatten()
        state.active = counts
        if merges:
            state.sizes = torch.cat([kept.sizes for kept in reduced if kept.sizes is not None])
        return torch.cat([kept.rows for kept in reduced]).flatten(0, 1)

    def _restored(self, state: PackedState, rows: Tensor) -> Tensor:
        """Put the rows after the last block where they were."""
        if not self.states.marks:
            self.states.survivors = state.positions
            self.states.sizes = state.sizes_by_group(self.group)
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
