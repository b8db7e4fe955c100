"""Window attention as ViTDet uses it: most blocks attend within windows, a few over the full map
(Li et al. 2022).

Every window drops equally many (`windowed_state.py`), so that the tokens of a window are a row of a
batch.
"""

from dataclasses import dataclass

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

    def require_multiple(self, grid: tuple[int, int]) -> None:
        """Raise ValueError if the sides of a patch grid are no multiples of the window's."""
        if grid[0] % self.size or grid[1] % self.size:
            raise ValueError(
                f"Windows: a grid of {grid[0]} x {grid[1]} patches must be a multiple of "
                f"{self.size}"
            )
