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

    num_prefix: int = 0  # P, tokens that are no patches
    num_suffix: int = 0  # S of these stand after the patches
    sequence_first: bool = False  # (N, B, D)
    in_list: bool = False  # in a list of one tensor

    def decode(self, value: object) -> Tensor:
        """Return the tokens (B, N, D), prefix first, in what a block takes or returns."""
        tokens = tokens_of(value)
        return self.prefix_first(tokens.transpose(0, 1) if self.sequence_first else tokens)

    def encode(self, x: Tensor, like: object) -> object:
        """Return `like`, which a block takes or returns, with other tokens x (B, K, D)."""
        tokens = self.in_place(x)
        if self.sequence_first:
            tokens = tokens.transpose(0, 1)
        if isinstance(like, tuple):
            return (tokens, *like[1:])
        return [tokens] if isinstance(like, list) else tokens

    def prefix_first(self, x: Tensor) -> Tensor:
        """Move what stands after the patches of x (B, K, ...) in front of them."""
        if not self.num_suffix:
            return x
        first, last = self.num_prefix - self.num_suffix, x.shape[1] - self.num_suffix
        return torch.cat([x[:, :first], x[:, last:], x[:, first:last]], 1)

    def in_place(self, x: Tensor) -> Tensor:
        """Undo `prefix_first`."""
        if not self.num_suffix:
            return x
        first = self.num_prefix - self.num_suffix
        return torch.cat([x[:, :first], x[:, self.num_prefix :], x[:, first : self.num_prefix]], 1)

    def positions_in_place(self, positions: Tensor, num_tokens: int) -> Tensor:
        """Positions (B, K) of tokens in the order in which the model has them, of N."""
        if not self.num_suffix:
            return positions
        order = torch.arange(num_tokens, device=positions.device).unsqueeze(0)
        return self.in_place(self.prefix_first(order)[0][positions])


BATCH_FIRST = TokenFormat()  # (B, N, D), prefix first
