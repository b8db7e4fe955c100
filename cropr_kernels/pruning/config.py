"""What `apply` decides once, as one value."""

from dataclasses import dataclass

from ..schedule import Schedule
from .fusion import Fusion
from .merging import Merge
from .windows import Windows


@dataclass(frozen=True)
class PruningConfig:
    """How a model is pruned."""

    schedule: Schedule
    llf: Fusion | None  # all tokens are restored before the last blocks
    merge: Merge | None  # pruned tokens merge into kept ones
    windows: Windows | None
    grid: tuple[int, int]  # patches in height and width that the schedule is checked against

    def __str__(self) -> str:
        merge = "" if self.merge is None else f", {self.merge}"
        return f"{self.schedule}, llf={self.llf or False}{merge}"

    @property
    def whole_blocks(self) -> int:
        """How many last blocks see all tokens by fusion."""
        return 0 if self.llf is None else self.llf.blocks

    def counts(self, num_tokens: int, depth: int, num_prefix: int) -> list[int]:
        """Kept tokens after each module, for images of num_tokens tokens; with windows for a window."""
        if self.windows is not None:
            num_tokens, num_prefix = self.windows.size**2, 0
        return self.schedule.counts(num_tokens, depth, num_prefix, self.whole_blocks)
