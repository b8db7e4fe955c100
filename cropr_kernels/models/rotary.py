"""Rotary positions of the active tokens."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

ops = torch.ops.cropr


class Rotary(NamedTuple):
    """Rotary positions of the active tokens, by position: timm's table (patches, 2 C), or Hugging
    Face's pair."""

    table: Any
    idx: Tensor | None
    num_prefix: int

    def rotate_(self, heads: Tensor, *, half: bool = False) -> None:
        """Turn queries or keys (B, H, K, C) in place; nothing is gathered."""
        ops.rotate_(heads.transpose(1, 2), self.table, self.idx, self.num_prefix, half)

    def for_one_image(self) -> "Rotary":
        """Leave out the dimensions of images and heads, which are 1, of a table (1, 1, N, C)."""
        if isinstance(self.table, tuple):
            return self._replace(table=tuple(part.reshape(part.shape[-2:]) for part in self.table))
        return self._replace(table=self.table.reshape(self.table.shape[-2:]))

    @property
    def length(self) -> int:
        """The number of rows of the table."""
        return len(self.table[0] if isinstance(self.table, tuple) else self.table)

    def with_prefix(self) -> "Rotary":
        """Give the table rows for the prefix, which turn nothing, so that tokens of several images
        may follow each other."""
        count = self.num_prefix
        pair = self.table if isinstance(self.table, tuple) else self.table.chunk(2, 1)[::-1]
        cos, sin = pair
        cos = torch.cat([cos.new_ones(count, cos.shape[1]), cos])
        sin = torch.cat([sin.new_zeros(count, sin.shape[1]), sin])
        table = (cos, sin) if isinstance(self.table, tuple) else torch.cat([sin, cos], 1)
        return Rotary(table, self.idx, 0)

    def rows(self) -> Any:
        """The rows of the active patches, (B, 1, K - P, C) each."""
        if self.idx is None:
            return self.table
        if isinstance(self.table, tuple):
            return tuple(rope_at(table, self.idx, self.num_prefix) for table in self.table)
        return rope_at(self.table, self.idx, self.num_prefix)


def rope_at(rope: Tensor, positions: Tensor, num_prefix: int) -> Tensor:
    """Rows of a rotary table for the patches at `positions` (B, K): (B, 1, K - P, C).

    The table is (patches, C), or (B, patches, C) if the images of a batch have their own.
    """
    rows = positions[:, num_prefix:] - num_prefix
    if rope.ndim == 3:
        return rope.gather(1, rows.unsqueeze(-1).expand(-1, -1, rope.shape[-1])).unsqueeze(1)
    return rope[rows].unsqueeze(1)


def rotary_at(rope: Tensor, positions: Tensor, num_prefix: int, num_tokens: int) -> Tensor:
    """`rope_at` for a table that may have rows for the prefix too."""
    has_prefix = rope.shape[-2] == num_tokens
    return rope_at(rope, positions, 0 if has_prefix else num_prefix)
