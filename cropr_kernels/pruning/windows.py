"""Window attention as ViTDet uses it: most blocks attend within windows, a few over the full map
(Li et al. 2022).

Tokens are stored window by window, one row of the batch each. Every window drops equally many, so
that a block over the full map is the same block on another view of the same memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..utils.numbers import integer, integers


@dataclass(frozen=True)
class Windows:
    """Square windows over the patch grid.

    Args:
        size: patches on a side.
        global_blocks: the blocks that attend over all windows; the others stay within one.

    Raises:
        ValueError: size is no integer or below 1, or a block is no integer or negative.
    """

    size: int
    global_blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", integer("Windows: size", self.size, 1))
        object.__setattr__(
            self, "global_blocks", integers("Windows: global_blocks", self.global_blocks, 0)
        )

    def count(self, grid: tuple[int, int]) -> int:
        """Number of windows of a patch grid; ValueError if its sides are no multiples of the
        window's."""
        if grid[0] % self.size or grid[1] % self.size:
            raise ValueError(
                f"Windows: a grid of {grid[0]} x {grid[1]} patches must be a multiple of "
                f"{self.size}"
            )
        return grid[0] // self.size * (grid[1] // self.size)

    def order(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Positions in the patch grid, window by window: (windows, size * size) int64."""
        self.count(grid)
        cells = torch.arange(grid[0] * grid[1], device=device).view(
            grid[0] // self.size, self.size, grid[1] // self.size, self.size
        )
        return cells.transpose(1, 2).reshape(-1, self.size**2)

    def split(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Split patches (B, H * W, D) into windows (B * windows, size * size, D)."""
        return x[:, self.order(grid, x.device).flatten()].reshape(-1, self.size**2, x.shape[-1])

    def join(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Invert `split`."""
        order = self.order(grid, x.device).flatten()
        return x.reshape(-1, len(order), x.shape[-1])[:, order.argsort()]

    def rope(self, table: Tensor, grid: tuple[int, int], batch: int) -> Tensor:
        """Arrange a rotary table (H * W, C) as the rows of `split`: (B * windows, size * size,
        C)."""
        return table[self.order(grid, table.device)].repeat(batch, 1, 1)
