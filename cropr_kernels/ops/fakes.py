"""Fake kernels: dtypes and sizes of results, for torch.compile and torch.export.

They raise the errors of the real kernels, but for what depends on the memory of a tensor.
"""

import re
from collections.abc import Callable
from typing import Any

import torch

from .reference import accumulation_dtype
from .validation import check_shapes

_SPLIT = "x B,num_keep,D; int64 B,num_keep; x B,N-num_keep,D; int64 B,N-num_keep"
_CHOICE = "int64 B,num_keep; int64 B,T+C-num_keep; float32 B,num_keep"
# Dtype and sizes of each result. The dtype may be that of an argument or the one that sums run in;
# sizes are sums of letters of the table in csrc/library.h and of arguments.
_RESULTS = {
    "scores": "float32 B,N",
    "select": "int64 B,num_keep; int64 B,N-num_keep",
    "prune": _SPLIT,
    "split": _SPLIT,
    "gather": "x B,K,D",
    "restore": "kept B,K+R,D",
    "attend": "x B,M,D",
    "attend_scores": "x B,M,D; float32 B,N",
    "attend_backward": "queries M,D",
    "merge": f"x B,num_keep,D; {_CHOICE}; int64 B,N",
    "parent_offsets": "x B,R,D; int64 B,R",
    "add_parents": "x B,N,D",
    "gather_norm": "x B,K,D",
    "add_": "",
    "add_norm_": "x B,K,D",
    "add_select_": "int64 B,num_keep; int64 B,K-num_keep",
    "merge_": _CHOICE,
    "parent_offsets_": "",
    "rotate_": "",
    "ragged_add_select_": "int64 T",
    "ragged_nearest": "sums B,num_candidates; int64 B,num_candidates",
    "ragged_merge_": "int64 num_kept; int64 S; float32 num_kept",
    "attend_segments": "q T,H,C",
}


def fake_kernel(op: str) -> Callable[..., Any]:
    """Return the fake kernel of an op that is defined."""
    results = [result.split() for result in _RESULTS[op].split("; ") if result]
    arguments = getattr(torch.ops.cropr, op).default._schema.arguments

    def fake(*args: Any, **kwargs: Any) -> Any:
        defaults = (
            kwargs.get(argument.name, argument.default_value) for argument in arguments[len(args) :]
        )
        values = [*args, *defaults]
        sizes = check_shapes(op, *values) | {
            argument.name: value for argument, value in zip(arguments, values)
        }
        outputs = []
        for dtype_name, shape in results:
            sums = [re.findall(r"(-?)(\w+)", size) for size in shape.split(",")]
            dims = [
                sum(-sizes[name] if minus else sizes[name] for minus, name in terms)
                for terms in sums
            ]
            if dtype_name == "sums":
                dtype = accumulation_dtype(values[0].dtype)
            elif dtype_name in sizes:
                dtype = sizes[dtype_name].dtype
            else:
                dtype = getattr(torch, dtype_name)
            outputs.append(values[0].new_empty(dims, dtype=dtype))
        if not outputs:
            return None
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    return fake
