"""Pruning inside towers that pack images into one row, which cu_seqlens cuts (Qwen-VL, GLM-V).

Blocks see the rows of active groups, with their rotary rows and segments.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..importance import importance
from ..pruning.merging import Merge
from ..schedule import Schedule
from .features import VisionLanguageModel
from .groups import SegmentSizes, packed_order
from .towers import Attention, GroupTower, TowerState


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
        super().__init__(blocks_of(tower), int(side), schedule, merge)
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
        arguments = dict(zip(inspect.signature(tower.forward).parameters, args)) | kwargs
        # Each frame of a video is pruned as an image
        grids = arguments["grid_thw"].tolist()
        self.states.grids = [(1, *grid[1:]) for grid in grids for _ in range(int(grid[0]))]

    def begin(self, arguments: dict[str, Any]) -> TowerState:
        grids = self.states.grids
        return self.state_of(grids, [packed_order(grid, self.side, self.window) for grid in grids])

    def rows_of(self, state: TowerState, output: Tensor) -> Tensor:
        return output

    def tokens_of(self, state: TowerState, rows: Tensor, output: Tensor) -> Tensor:
        return rows

    def select(
        self, state: TowerState, arguments: dict[str, Any]
    ) -> tuple[dict[str, Any], SegmentSizes | None]:
        if state.positions is None:
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
        if len(args[0]) != len(state.positions):
            return None
        return self.in_place(state, args[0]), *args[1:]


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
