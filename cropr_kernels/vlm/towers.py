"""Pruning inside towers by groups of s x s patches, which become one token: what the towers share.

A tower's blocks see the active groups; what reads the tokens later sees NaN where a group is
pruned.
"""

import inspect
import itertools
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..importance import AttentionInput
from ..pruning.merging import Merge
from ..schedule import Schedule
from .features import entries_of, finite_rows
from .groups import Reduced, SegmentSizes, drop_groups, group_colors, merge_groups
from .packed_engine import PackedRun

# Called after every block with its output, when nothing is pruned
Observe = Callable[[int, Tensor], None]
Attention = AttentionInput | Tensor


@dataclass
class TowerState:
    """The forward of one batch of images, in one thread."""

    num_groups: list[int]  # of each image
    counts: list[list[int]]  # kept groups after each block, of each image
    orders: list[Tensor]  # (groups,) of each image: the group at each place
    colors: Tensor | None = None  # (groups,), of all images, if groups merge
    num_rows: int = 0  # T, of all images
    num_prefix: int = 0  # of each image, tokens before its patches
    patches: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    active: list[int] = field(default_factory=list)  # active groups of each image
    positions: Tensor | None = None  # (rows,), of the active rows; None: all
    sizes: Tensor | None = None  # (groups,), of the active groups; None: all are 1
    attention: SegmentSizes | None = None  # in the block that runs
    run: PackedRun | None = None  # the engine, if it runs the blocks
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
    state: TowerState | None = None
    observe: Observe | None = None
    num_groups: list[int]  # of each image that is observed
    grids: Sequence[Sequence[int]]  # of each image, if the tower is given them
    survivors: Tensor | None = None  # positions of the rows that left the tower last
    sizes: Tensor | None = None  # (groups,), as the tower left them last; 0: pruned
    captures: bool = False  # the caller wants the outputs of all blocks
    marks: bool = False  # NaN stands for what is no survivor, whatever the blocks give


class Handle(Protocol):
    """A change of a module, which `remove` undoes."""

    def remove(self) -> None: ...


class GroupTower(nn.Module):
    """A tower whose blocks see the active groups alone.

    Args:
        blocks: of the tower.
        side: s.
        schedule: counts groups, of each image.
        merge: groups merge into others of their image, instead of being lost.
    """

    queries: Tensor | None

    def __init__(
        self, blocks: list[nn.Module], side: int, schedule: Schedule, merge: Merge | None = None
    ):
        super().__init__()
        self.schedule = schedule
        self.merge = merge
        self.blocks = Hidden(blocks)
        self.side = side
        self.group = side**2
        self.register_buffer("queries", None, persistent=False)  # (modules, D)
        self.states = _States()
        self.hooks: list[Handle] = []
        for layer, block in enumerate(blocks):
            self.hooks += [
                block.register_forward_pre_hook(
                    partial(self._before_block, layer), with_kwargs=True
                ),
                block.register_forward_hook(self._end_attention, always_call=True),
                block.register_forward_hook(partial(self._after_block, layer)),
            ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "states": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "states": _States()})

    def extra_repr(self) -> str:
        return str(self.schedule) + ("" if self.merge is None else f", {self.merge}")

    @property
    def depth(self) -> int:
        return len(self.blocks.modules)

    @abstractmethod
    def begin(self, arguments: dict[str, Any]) -> TowerState:
        """The state of a batch, whose first block has these arguments."""

    @abstractmethod
    def rows_of(self, state: TowerState, output: Tensor) -> Tensor:
        """The rows (rows, D) of the active patches in a block's output, group after group."""

    @abstractmethod
    def tokens_of(self, state: TowerState, rows: Tensor, output: Tensor) -> Tensor:
        """Tokens in the form of a block's output, with these rows (rows, D) for its patches.

        All rows of a tower are put back in its order.
        """

    @abstractmethod
    def select(
        self, state: TowerState, arguments: dict[str, Any]
    ) -> tuple[dict[str, Any], SegmentSizes | None]:
        """Reduce a block's arguments to the active rows; and a mode that weighs these by sizes."""

    @abstractmethod
    def attention_to_rows(self, inputs: Sequence[Attention]) -> Tensor:
        """The attention of a block to each row (rows,), as `rows_of` orders them; the mean of a
        segment is 1."""

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
            raise RuntimeError("cropr: this model has another order of groups than its tower")
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

    def state_of(self, grids: Sequence[Sequence[int]], orders: list[Tensor]) -> TowerState:
        """Begin the forward of images of these grids, whose groups are in these orders."""
        num_groups = [len(order) for order in orders]
        if self.states.observe is not None:
            self.states.num_groups.extend(num_groups)
        counts = [self.schedule.counts(count, self.depth, 0) for count in num_groups]
        state = TowerState(num_groups, counts, orders, active=list(num_groups))
        state.num_rows = sum(num_groups) * self.group
        if self.merge is not None:
            colors = [group_colors(grid, self.side, order) for grid, order in zip(grids, orders)]
            state.colors = torch.cat(colors)
        if not self.states.marks:
            self.states.sizes = None
        return state

    def observed_rows(self, output: Tensor) -> Tensor:
        """The rows (rows, D) of the output of a block that prunes nothing."""
        if self.states.state is None:
            raise RuntimeError("cropr: no tower is observed")
        return self.rows_of(self.states.state, output)

    def _before_block(
        self, layer: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        arguments = named_arguments(block, args, kwargs)
        if layer == 0:
            self.states.state = self.begin(arguments)
        state = self.states.state
        if state is None or state.next_layer != layer:
            raise RuntimeError(
                f"cropr: block {layer} of a pruned tower ran without those before it "
                "(recomputation in backward is not supported inside towers)"
            )
        state.next_layer += 1
        if state.positions is None:
            return None
        recomputes = getattr(block, "gradient_checkpointing", False) and block.training
        if self.merge is not None and recomputes:
            raise RuntimeError(
                "cropr: a tower whose groups merge cannot recompute its blocks in backward, where "
                "their sizes do not weigh attention; switch its gradient checkpointing off, or "
                "set merge=False"
            )
        first = next(iter(arguments))
        selected, state.attention = self.select(state, arguments)
        if state.attention is not None:
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
        """Prune groups of the output; after the last block put the others in place."""
        state = self.states.state
        if state is None:
            return output
        last = layer == self.depth - 1
        if self.states.observe is not None:
            self.states.observe(layer, output)
        elif last:
            output = self._restored(state, output)
        else:
            counts = [1 if self.states.marks else image[layer] for image in state.counts]
            if counts != state.active:
                groups = self.rows_of(state, output).unflatten(0, (-1, self.group))
                output = self.tokens_of(state, self._reduced(state, layer, groups, counts), output)
        if last:
            self.states.state = None
        return output

    def _reduced(self, state: TowerState, layer: int, groups: Tensor, counts: list[int]) -> Tensor:
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

    def _restored(self, state: TowerState, output: Tensor) -> Tensor:
        """Put the patches in the output of the last block where they were."""
        if not self.states.marks:
            self.states.survivors = state.positions
            self.states.sizes = state.sizes_by_group(self.group)
            return self.in_place(state, output)
        full = output.new_zeros(state.num_rows, output.shape[-1])
        if self.states.survivors is not None:
            full.fill_(float("nan")).index_fill_(0, self.states.survivors, 0.0)
        return self.tokens_of(state, full, output)

    def in_place(self, state: TowerState, output: Tensor) -> Tensor:
        """Put active patches where they were; NaN where a group is pruned, for gradients 0."""
        if state.positions is None:
            return output
        rows = self.rows_of(state, output)
        fill = 0.0 if torch.is_grad_enabled() else float("nan")
        full = rows.new_full((state.num_rows, *rows.shape[1:]), fill)
        return self.tokens_of(state, full.index_copy(0, state.positions, rows), output)


def named_arguments(
    module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, Any]:
    """The arguments of a module's forward by name."""
    _, *names = inspect.signature(type(module).forward).parameters
    return dict(zip(names, args)) | dict(kwargs)


class Hidden:
    """Modules that are registered elsewhere."""

    def __init__(self, modules: list[nn.Module]):
        self.modules = modules
