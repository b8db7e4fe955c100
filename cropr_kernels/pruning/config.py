"""The pruning configuration of a model."""

from dataclasses import dataclass

from ..schedule import Schedule
from .fusion import Fusion
from .merging import Merge
from .windows import Windows


@dataclass(frozen=True)
class PruningConfig:
    """The options of `apply`, resolved."""

    schedule: Schedule
    llf: Fusion | None  # all tokens are restored before the last blocks
    merge: Merge | None  # pruned tokens merge into kept ones
    windows: Windows | None
    grid: tuple[int, int]  # patches in height and width that the schedule is checked against

    def __str__(self) -> str:
        merge = "" if self.merge is None else f", {self.merge}"
        return f"{self.schedule}, llf={self.llf or False}{merge}"

    @property
    def full_blocks(self) -> int:
        """The number of last blocks that see all tokens by fusion."""
        return 0 if self.llf is None else self.llf.blocks

    @property
    def tracks_parents(self) -> bool:
        """Fusion needs the parent of each pruned token."""
        return self.llf is not None and self.llf.tracks_parents

    def counts(self, num_tokens: int, depth: int, num_prefix: int) -> list[int]:
        """Kept tokens after each module, for images of num_tokens tokens; with windows for a
        window."""
        if self.windows is not None:
            num_tokens = self.windows.size**2
            num_prefix = 0
        return self.schedule.counts(num_tokens, depth, num_prefix, self.full_blocks)
