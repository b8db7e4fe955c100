"""The definition of the ops on ragged batches in plain PyTorch, as `reference`.

Tokens stand in one row, image after image; starts (B + 1,) says where each image begins. Arguments
are documented in `functional`.
"""

import itertools

import torch
from torch import Tensor


def attend_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    log_sizes: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T + log_sizes) v within each image, in float32 or float64."""
    dtype = q.dtype
    acc = torch.promote_types(dtype, torch.float32)
    q, k, v = (heads.transpose(0, 1).to(acc) for heads in (q, k, v))  # (H, T, C)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    bounds = starts.tolist()
    parts = [q.new_empty(q.shape[0], 0, q.shape[2])]
    for begin, end in itertools.pairwise(bounds):
        logits = scale * q[:, begin:end] @ k[:, begin:end].transpose(1, 2)
        if log_sizes is not None:
            logits = logits + log_sizes[begin:end].to(acc)
        parts.append(logits.softmax(-1) @ v[:, begin:end])
    return torch.cat(parts, 1).transpose(0, 1).to(dtype).contiguous()
