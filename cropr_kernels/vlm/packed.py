"""Pruning inside towers that pack images into one row, which cu_seqlens cuts (Qwen-VL, GLM-V).

Blocks see the rows of active groups, with their rotary rows and segments; without gradients, after
calibration, the engine runs them (`packed_engine`).
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..importance import importance
from ..models.adapters.base import is_hooked
from ..pruning.merging import Merge
from ..schedule import Schedule
from .features import VisionLanguageModel
from .groups import SegmentSizes, packed_order
from .packed_engine import PackedBlock, PackedRun, runs_packed
from .towers import Attention, GroupTower, TowerState, named_arguments

_CAPTURES = ("output_hidden_states", "output_attentions")


class PackedTower(GroupTower):
    """Pruning inside a packed tower.

    Args:
        tower: its forward takes grid_thw, its blocks cu_seqlens and position_embeddings.
        schedule: counts groups of s x s patches, of each image.
        merge: groups merge into others of their image, instead of being lost.

    Raises:
        TypeError: it is no such tower.
    """

    def __init__(self, tower: nn.Module, schedule: Schedule, merge: Merge | None = None):
        side: Any = tower.spatial_merge_size
        blocks = blocks_of(tower)
        has_engine = runs_packed(blocks)
        super().__init__(blocks, int(side), schedule, merge)
        if has_engine:
            self.hooks += [
                ReplacedForward(block, partial(self._run_block, layer))
                for layer, block in enumerate(blocks)
            ]
        pixels: Any = getattr(tower, "window_size", None)
        patch: Any = getattr(tower, "patch_size", None)
        self.window = None if pixels is None else pixels // self.side // patch
        self.hooks.append(tower.register_forward_pre_hook(self._before_tower, with_kwargs=True))
        inside = {module for block in self.blocks.modules for module in block.modules()}
        for module in tower.modules():
            if (
                module is not tower
                and module not in inside
                and next(module.parameters(), None) is not None
            ):
                self.hooks.append(module.register_forward_pre_hook(self._before_reader))

    def _before_tower(
        self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        arguments = named_arguments(tower, args, kwargs)
        captures = [arguments.get(name, getattr(tower.config, name, False)) for name in _CAPTURES]
        self.states.captures = any(flag not in (None, False) for flag in captures)
        # Each frame of a video is pruned as an image
        grids = arguments["grid_thw"].tolist()
        self.states.grids = [(1, *grid[1:]) for grid in grids for _ in range(int(grid[0]))]

    def begin(self, arguments: dict[str, Any]) -> TowerState:
        grids = self.states.grids
        orders = [packed_order(grid, self.side, self.window) for grid in grids]
        state = self.state_of(grids, orders)
        x: Tensor = next(iter(arguments.values()))
        if self.queries is not None and self._takes_engine(state, x):
            state.run = PackedRun(
                x,
                cast(list[PackedBlock], self.blocks.modules),
                arguments["position_embeddings"],
                state.num_groups,
                self.queries,
                self.merge,
                state.colors,
            )
        return state

    def _takes_engine(self, state: TowerState, x: Tensor) -> bool:
        """Tell whether the engine runs this forward, as far as it depends on the call."""
        blocks = self.blocks.modules
        prunes = any(image[-1] < count for image, count in zip(state.counts, state.num_groups))
        return (
            prunes
            and "forward" in vars(blocks[0])
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x.device.type)
            and self.states.observe is None
            and not self.states.captures
            and not self.states.marks
            and all(
                cast(PackedBlock, block).attn.config._attn_implementation == "sdpa"
                for block in blocks
            )
            and not any(
                is_hooked(block.get_submodule(name))
                for block in blocks
                for name in ("", "norm1", "norm2", "attn")
            )
        )

    def _run_block(self, layer: int, *args: object, **kwargs: object) -> Tensor:
        """The forward of a block: by the engine, if it runs this batch."""
        block = self.blocks.modules[layer]
        state = self.states.state
        if state is None or state.run is None:
            output: Tensor = type(block).forward(block, *args, **kwargs)
            return output
        arguments = named_arguments(block, args, kwargs)
        counts = state.active
        if layer < self.depth - 1:
            counts = [image[layer] for image in state.counts]
        is_same = counts == state.active
        x = state.run.step(layer, arguments["cu_seqlens"], None if is_same else counts)
        if not is_same:
            state.active, state.positions = counts, state.run.rows
            state.sizes = state.run.sizes
        return x

    def rows_of(self, state: TowerState, output: Tensor) -> Tensor:
        return output

    def tokens_of(self, state: TowerState, rows: Tensor, output: Tensor) -> Tensor:
        return rows

    def select(
        self, state: TowerState, arguments: dict[str, Any]
    ) -> tuple[dict[str, Any], SegmentSizes | None]:
        if state.positions is None or state.run is not None:
            return arguments, None
        selected = select_rows(arguments, state.positions)
        if state.sizes is None:
            return selected, None
        ends = selected["cu_seqlens"]
        sizes = state.sizes.repeat_interleave(self.group)
        return selected, SegmentSizes(sizes.unsqueeze(0), (ends[1:] - ends[:-1]).tolist())

    def attention_to_rows(self, inputs: Sequence[Attention]) -> Tensor:
        segments = [importance(segment, 0, class_token=False) for segment in inputs]
        return torch.cat([segment[0] * segment.shape[1] for segment in segments])

    def _before_reader(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Give all rows to a module that reads the tokens between two blocks (deepstack)."""
        state = self.states.state
        if state is None or state.positions is None or not args:
            return None
        if not 0 < state.next_layer < self.depth or not isinstance(args[0], Tensor):
            return None
        num_rows = len(state.positions) if state.run is None else state.num_rows
        if len(args[0]) != num_rows:
            return None
        return self.in_place(state, args[0]), *args[1:]

    def in_place(self, state: TowerState, output: Tensor) -> Tensor:
        return super().in_place(state, output) if state.run is None else state.run.marked()


class ReplacedForward:
    """A handle of a module whose forward is another."""

    def __init__(self, module: nn.Module, forward: Callable[..., Tensor]):
        self.module = module
        module.forward = forward

    def remove(self) -> None:
        del self.module.forward


def find_tower(model: nn.Module | VisionLanguageModel) -> nn.Module | None:
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
    return name in inspect.signature(type(module).forward).parameters


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
