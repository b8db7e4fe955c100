"""Last Layer Fusion: restores all tokens before the last blocks (paper section 3.2), or after
them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..utils.numbers import integer

Restore = Literal["as_pruned", "track_parent"]
# Values in files written before they had these names.
SAVED_RESTORE: dict[object, Restore] = {"left": "as_pruned", "host": "track_parent"}


@dataclass(frozen=True)
class Fusion:
    """Restoration of pruned tokens before the last blocks.

    Args:
        restore: "as_pruned": as they were when they were pruned, as published; for a network
            trained with it. "track_parent": with the change of their parent since, pruned + (parent
            now - parent then); for any other network, which has never seen tokens that are many
            blocks old. The parent is the kept token that a pruned one was most like (cosine, class
            token and registers aside), or the one that it merged into. None: "track_parent" if
            tokens merge or queries are calibrated, else "as_pruned".
        blocks: >= 0, the number of last blocks that see all tokens. 0: tokens are restored after
            the last block, which costs nothing; needs "track_parent".

    Raises:
        ValueError: an option is out of range.
    """

    restore: Restore | None = None
    blocks: int = 1

    def __post_init__(self) -> None:
        if self.restore not in (None, *get_args(Restore)):
            raise ValueError(
                f"Fusion: restore must be 'as_pruned' or 'track_parent', got {self.restore!r}"
            )
        object.__setattr__(self, "blocks", integer("Fusion: blocks", self.blocks, 0))
        if self.blocks == 0 and self.restore == "as_pruned":
            raise ValueError(
                "Fusion: restore='as_pruned' needs a block that sees the tokens: blocks must be "
                ">= 1, got 0"
            )
        if self.blocks == 0:
            object.__setattr__(self, "restore", "track_parent")

    @classmethod
    def of(cls, llf: "bool | Restore | Fusion") -> "Fusion | None":
        """Return the fusion that `llf` of `apply` stands for."""
        if isinstance(llf, Fusion):
            return llf
        if isinstance(llf, str):
            return cls(llf)
        return cls() if llf else None

    @classmethod
    def from_saved(cls, llf: object) -> "Fusion | None":
        """Return the fusion that a file holds: its fields, `restore` alone, or true for
        "as_pruned"."""
        if isinstance(llf, str):
            llf = {"restore": llf}
        if not isinstance(llf, Mapping):
            return cls("as_pruned") if llf else None  # true: written when there was no choice
        restore = llf.get("restore")
        return cls(SAVED_RESTORE.get(restore, restore), llf.get("blocks", 1))

    def with_default(self, restore: Restore) -> "Fusion":
        """Fill in `restore` if it is open."""
        return self if self.restore is not None else replace(self, restore=restore)

    @property
    def tracks_parents(self) -> bool:
        return self.restore == "track_parent"

    def __str__(self) -> str:
        last = {0: ", after the last block", 1: ""}.get(self.blocks, f", {self.blocks} blocks")
        return f"{self.restore or 'as_pruned'}{last}"
