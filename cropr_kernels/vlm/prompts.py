"""Prompts without the placeholders of pruned image tokens."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED_LABEL = -100  # of the cross-entropy of transformers


@dataclass(frozen=True)
class KeptColumns:
    """The columns of a prompt (B, L) that stay.

    Rows of which fewer stay are padded, on the left or on the right.
    """

    index: Tensor  # (B, K) int64, columns of the full prompt; -1 is padding
    num_columns: int  # L

    @classmethod
    def of(cls, mask: Tensor, *, pad_left: bool) -> "KeptColumns":
        """Take the columns that a mask (B, L) bool keeps."""
        counts = mask.sum(1)
        longest = int(counts.max())
        # A stable sort of the flags puts the kept columns first, in order.
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
        slots = torch.arange(longest, device=mask.device).expand(len(mask), -1)
        if pad_left:
            shift = (longest - counts).unsqueeze(1)
            index = order.gather(1, (slots - shift).clamp_min(0))
            return cls(index.masked_fill(slots < shift, -1), mask.shape[1])
        return cls(order.masked_fill(slots >= counts.unsqueeze(1), -1), mask.shape[1])

    def take(self, values: Tensor, padding: int) -> Tensor:
        """Select the columns of values (..., B, L)."""
        index = self.index.to(values.device)
        rows = index.clamp_min(0).expand(*values.shape[:-1], -1)
        return values.gather(-1, rows).masked_fill(index < 0, padding)

    def then(self, other: "KeptColumns") -> "KeptColumns":
        """Keep the columns of a prompt that goes on with those of another."""
        index = other.index + self.num_columns * (other.index >= 0)
        columns = self.num_columns + other.num_columns
        return KeptColumns(torch.cat([self.index, index], 1), columns)

    def extended(self, count: int) -> "KeptColumns":
        """Keep also the next `count` columns."""
        rest = torch.arange(count, device=self.index.device).expand(len(self.index), -1)
        return self.then(KeptColumns(rest, count))


def placeholder_runs(mask: Tensor) -> list[int]:
    """Lengths of the runs of placeholders in a mask (B, L) bool, row by row."""
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    starts = (mask & ~before)[mask]  # of each placeholder: it begins a run
    lengths = torch.bincount(starts.cumsum(0) - 1) if len(starts) else starts
    return [int(length) for length in lengths]


def split_at_both(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Lengths of the pieces of a row that is cut into lengths `first` and into lengths `second`."""
    ends: set[int] = set()
    for lengths in (first, second):
        ends |= {sum(lengths[: count + 1]) for count in range(len(lengths))}
    edges = [0, *sorted(ends)]
    return [end - start for start, end in itertools.pairwise(edges) if end > start]


def shorten_tensors(
    inputs: Mapping[str, object], columns: KeptColumns, pad_token: int
) -> dict[str, object]:
    """Select the columns of all inputs of the shape (B, L) of the prompt: ids, masks, labels, token
    types.

    Raises:
        ValueError: the attention mask is none of (B, L).
    """
    shape = (len(columns.index), columns.num_columns)
    attention_mask = inputs.get("attention_mask")
    if isinstance(attention_mask, Tensor) and attention_mask.shape != shape:
        raise ValueError(
            f"cropr: the attention_mask of a model with pruned image tokens must be (B, L) = "
            f"{shape}, got {tuple(attention_mask.shape)}"
        )
    padding = {"input_ids": pad_token, "labels": IGNORED_LABEL}
    shortened = dict(inputs)
    for name, value in inputs.items():
        is_image = name.startswith(("pixel", "image", "video"))
        if isinstance(value, Tensor) and value.shape == shape and not is_image:
            shortened[name] = columns.take(value, padding.get(name, 0))
    return shortened
