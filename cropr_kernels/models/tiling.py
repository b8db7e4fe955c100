"""Windows of a map, in groups of one shape: those at the edges may reach over it."""

from typing import NamedTuple

import torch
from torch import Tensor

Size = tuple[int, int]  # height and width


class WindowGroup(NamedTuple):
    """Windows of which the same part is on the map."""

    cells: Tensor  # (windows, patches) int64: positions on the map, row by row
    size: Size  # of that part

    @property
    def num_patches(self) -> int:
        return self.size[0] * self.size[1]


class AttentionRows(NamedTuple):
    """Rows of tokens that attend to each other: of windows, or of full maps.

    Coordinates are (rows, K) or (1, K) int64.
    """

    per_image: int  # rows of an image
    length: int  # K, tokens in a row
    y: Tensor
    x: Tensor
    area: Size  # of the window or the map
    over_edge: tuple[Tensor, Tensor] | None = None  # y and x of the keys that are zero, (keys,)
    log_sizes: Tensor | None = None  # (rows, K)


class Tiling:
    """The windows of a map.

    Tokens of a map are arranged group by group, window by window: `order` holds their positions.

    Args:
        grid: height and width of the map.
        window: patches on a side of a window; 0: the map is one.
        device: of the indices.
    """

    def __init__(self, grid: Size, window: int, device: torch.device):
        height, width = grid
        self.grid = grid
        self.area = (window, window) if window else grid
        cells = torch.arange(height * width, device=device).view(grid)
        self.groups: list[WindowGroup] = []
        for rows, side_y in _parts(height, self.area[0]):
            for columns, side_x in _parts(width, self.area[1]):
                part = cells[rows, columns].unflatten(0, (-1, side_y)).unflatten(2, (-1, side_x))
                part = part.transpose(1, 2).reshape(-1, side_y * side_x)
                self.groups.append(WindowGroup(part, (side_y, side_x)))
        self.order = torch.cat([group.cells.flatten() for group in self.groups])

    def window_rows(self, group: WindowGroup, positions: Tensor | None) -> AttentionRows:
        """The rows of windows whose tokens at positions (rows, K) of their part on the map are
        left; None: all."""
        if positions is None:
            positions = torch.arange(group.num_patches, device=group.cells.device).unsqueeze(0)
        width = group.size[1]
        return AttentionRows(
            len(group.cells),
            positions.shape[1],
            positions // width,
            positions % width,
            self.area,
            self._over_edge(group),
        )

    def map_rows(self, positions: Tensor) -> AttentionRows:
        """The rows of full maps, of which the tokens at positions (rows, N) are left."""
        width = self.grid[1]
        return AttentionRows(
            1, positions.shape[1], positions // width, positions % width, self.grid
        )

    def _over_edge(self, group: WindowGroup) -> tuple[Tensor, Tensor] | None:
        """The cells of a window that are over the edge of the map."""
        if group.size == self.area:
            return None
        height, width = group.size
        full_height, full_width = self.area
        device = group.cells.device
        strips = [
            torch.cartesian_prod(
                torch.arange(*rows, device=device), torch.arange(*columns, device=device)
            )
            for rows, columns in (
                ((0, height), (width, full_width)),
                ((height, full_height), (0, full_width)),
            )
        ]
        y, x = torch.cat(strips).unbind(1)
        return y, x


def _parts(length: int, side: int) -> list[tuple[slice, int]]:
    """The part of a side of the map that full windows cover, and the rest, each with the side of
    its windows."""
    full = length // side * side
    parts = [(slice(0, full), side), (slice(full, length), length - full)]
    return [(part, side) for part, side in parts if part.stop > part.start]
