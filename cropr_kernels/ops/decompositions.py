"""Ops in standard PyTorch operators, under the same names, for files that run without this package.

Of the layers that prune, `pruning.portable` has the whole.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import accumulation_dtype, hops


def static_size(x: Tensor, dim: int) -> int:
    """The size of a dimension as a number: TorchScript traces sizes as tensors."""
    size = x.shape[dim]
    return int(size) if isinstance(size, Tensor) else size


def gather(x: Tensor, idx: Tensor) -> Tensor:
    """Take rows of the flattened batch: runtimes copy them whole."""
    batch, n, _ = x.shape
    first = torch.arange(batch, device=x.device).unsqueeze(1) * n
    return F.embedding(idx + first, x.flatten(0, 1))


def restore(kept: Tensor, kept_idx: Tensor, pruned: Tensor, pruned_idx: Tensor) -> Tensor:
    rows = torch.cat([kept, pruned], 1)
    positions = torch.cat([kept_idx, pruned_idx], 1)
    indices = torch.arange(positions.shape[1], device=rows.device).expand(positions.shape[0], -1)
    return gather(rows, torch.zeros_like(positions).scatter(1, positions, indices))


def add_parents(x: Tensor, parent: Tensor) -> Tensor:
    rows = x.to(accumulation_dtype(x.dtype))
    for hop in hops(parent, static_size(parent, 1)):
        rows = rows + gather(torch.cat([rows, torch.zeros_like(rows[:, :1])], 1), hop)
    return rows.to(x.dtype)
