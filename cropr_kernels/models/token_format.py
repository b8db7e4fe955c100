"""Tokens as a model passes them between its blocks, and as pruning sees them: (B, N, D), prefix
first."""

from dataclasses import dataclass

import torch
from torch import Tensor


def tokens_of(value: object) -> Tensor:
    """Return the tokens in what a block takes or returns: alone, or first in a tuple or a list.

    Raises:
        TypeError: there is no tensor.
    """
    tokens = value[0] if isinstance(value, tuple | list) else value
    if not isinstance(tokens, Tensor):
        raise TypeError(f"a block takes or returns {type(tokens).__name__}, not tokens")
    return tokens


@dataclass(frozen=True)
class TokenFormat:
    """How a model passes tokens between its blocks."""

    # Tokens that are no patches, before these and after these; None: before them, if any
    around: tuple[int, int] | None = None
    sequence_first: bool = False  # (N, B, D)
    in_list: bool = False  # in a list of one tensor
    # The axis of the channels of maps: 3 of (B, height, width, D), 1 of (B, D, height, width)
    map_axis: int | None = None

    def decode(self, value: object, num_images: int | None = None) -> Tensor:
        """Return the tokens (B, N, D), prefix first, in what a block takes or returns; with
        num_images they stand in one row there, (1, B N, D)."""
        tokens = tokens_of(value)
        if self.map_axis is not None:
            return tokens.movedim(self.map_axis, 3).flatten(1, 2)
        tokens = tokens.transpose(0, 1) if self.sequence_first else tokens
        if num_images is not None:
            tokens = tokens[0].unflatten(0, (num_images, -1))
        return self.prefix_first(tokens)

    def encode(self, x: Tensor, like: object, *, in_row: bool = False) -> object:
        """Return `like`, which a block takes or returns, with other tokens x (B, K, D), in one row
        or not."""
        if self.map_axis is not None:
            return self.encode_map(x, like, self.grid_of(like))
        tokens = self.in_place(x)
        if in_row:
            tokens = tokens.flatten(0, 1).unsqueeze(0)
        if self.sequence_first:
            tokens = tokens.transpose(0, 1)
        if isinstance(like, tuple):
            return (tokens, *like[1:])
        return [tokens] if isinstance(like, list) else tokens

    def grid_of(self, value: object) -> tuple[int, int]:
        """Height and width of a map that a block takes or returns."""
        height, width, _ = tokens_of(value).movedim(self.map_axis or 0, 3).shape[1:]
        return height, width

    def encode_map(self, x: Tensor, like: object, grid: tuple[int, int]) -> object:
        """Return `like` with a map of all tokens x (B, N, D)."""
        tokens = x.unflatten(1, grid).movedim(3, self.map_axis or 3)
        return (tokens, *like[1:]) if isinstance(like, tuple) else tokens

    def prefix_first(self, x: Tensor) -> Tensor:
        """Move what stands after the patches of x (B, K, ...) in front of them."""
        if self.around is None:
            return x
        before, after = self.around
        end = x.shape[1] - after
        return torch.cat([x[:, :before], x[:, end:], x[:, before:end]], 1)

    def in_place(self, x: Tensor) -> Tensor:
        """Undo `prefix_first`."""
        if self.around is None:
            return x
        before, after = self.around
        prefix = before + after
        return torch.cat([x[:, :before], x[:, prefix:], x[:, before:prefix]], 1)

    def positions_in_place(self, positions: Tensor, num_tokens: int) -> Tensor:
        """Positions (B, K) of tokens in the order in which the model has them, of N."""
        if self.around is None:
            return positions
        order = torch.arange(num_tokens, device=positions.device).unsqueeze(0)
        return self.in_place(self.prefix_first(order)[0][positions])


BATCH_FIRST = TokenFormat()  # (B, N, D), prefix first
