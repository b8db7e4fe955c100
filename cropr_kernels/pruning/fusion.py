"""Last Layer Fusion: all tokens are restored before the last blocks (paper section 3.2), or behind them."""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

Restore = Literal["left", "host"]


@dataclass(frozen=True)
class Fusion:
    """How pruned tokens are restored before the last blocks.

    Args:
        restore: "left": as they were when they were pruned, as published; for a network that is trained so. "host":
            each with the change that its host lived through since, left + (host now - host then); for any other
            network, which has never seen tokens that are many blocks old. The host is the kept token that it was most
            like (cosine, class token and registers aside), or the one that it merged into. None: "host" where tokens
            merge or queries are calibrated, else "left".
        blocks: >= 0, how many last blocks see all tokens. 0: none does, they are restored after the last, which costs
            nothing; needs "host".

    Raises:
        ValueError: an option is out of range.
    """

    restore: Restore | None = None
    blocks: int = 1

    def __post_init__(self) -> None:
        if self.restore not in (None, *get_args(Restore)):
            raise ValueError(f"Fusion: restore must be 'left' or 'host', got {self.restore!r}")
        if not isinstance(self.blocks, int) or self.blocks < 0:
            raise ValueError(f"Fusion: blocks must be an integer >= 0, got {self.blocks!r}")
        if self.blocks == 0 and self.restore == "left":
            raise ValueError("Fusion: tokens as they left need a block that sees them: blocks must be >= 1, got 0")
        if self.blocks == 0:
            object.__setattr__(self, "restore", "host")

    @classmethod
    def of(cls, llf: Any) -> "Fusion | None":
        """What `llf` of `apply` stands for; a dict is what `options_of` gave."""
        if isinstance(llf, Fusion):
            return llf
        if isinstance(llf, dict):
            return cls(**llf)
        if isinstance(llf, str):
            return cls(llf)  # type: ignore[arg-type]
        return cls() if llf else None

    def by_default(self, restore: Restore) -> "Fusion":
        """This, with `restore` where it leaves that open."""
        return self if self.restore is not None else replace(self, restore=restore)

    @property
    def by_host(self) -> bool:
        return self.restore == "host"

    def __str__(self) -> str:
        last = {0: ", behind the last block", 1: ""}.get(self.blocks, f", {self.blocks} blocks")
        return f"{self.restore or 'left'}{last}"
