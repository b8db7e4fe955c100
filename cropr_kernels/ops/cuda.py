"""The CUDA kernel of each op: recorded launches (csrc/launch.cpp), or else its Triton launcher."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from .extension import replayed

# The ops whose launchers are in each file of triton/.
FAMILIES = {
    "scores": ("scores",),
    "select": ("select",),
    "prune": ("prune", "split", "gather", "restore"),
    "attend": ("attend", "attend_scores", "attend_backward"),
    "segments": ("attend_segments",),
    "merge": ("merge", "merge_"),
    "parent_offsets": ("parent_offsets", "parent_offsets_", "add_parents"),
    "residual": ("gather_norm", "add_", "add_norm_", "add_select_", "rotate_"),
    "ragged": ("ragged_add_select_", "ragged_nearest", "ragged_merge_"),
}
FILES = {op: file for file, ops in FAMILIES.items() for op in ops}


def cuda_kernel(op: str, file: str) -> Callable[..., Any]:
    """Return a kernel that replays recorded launches, or calls the launcher in triton/ and records
    it."""
    replay = getattr(torch.ops.cropr_replay, op).default

    def kernel(*args: Any) -> Any:
        result = replay(*args)
        if replayed():
            return result
        try:
            launching = importlib.import_module("cropr_kernels.ops.triton.launching")
            launchers = importlib.import_module(f"cropr_kernels.ops.triton.{file}")
        except ImportError as error:
            raise ImportError(
                f"cropr::{op}: CUDA tensors need triton: pip install triton ({error})"
            ) from error
        return launching.record(getattr(launchers, op), args)

    return kernel
