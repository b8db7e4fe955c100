"""Sample inputs of every op, generated from csrc/library.h for tests and `cropr doctor`."""

from typing import Any

import torch

from .validation import OPS

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Sizes by their letters in the table, numbers that have no range, and options.
SIZES = {"B": 2, "N": 9, "D": 6, "K": 4, "R": 5, "M": 3, "T": 4, "C": 5, "F": 7, "P": 8, "H": 3}
SIZES |= {"S": SIZES["B"] + 1}
NUMBERS = {"scale": 0.4, "eps": 1e-6, "size_weight": 2.0, "cost_weight": 0.5}
OPTIONS = {"half": False, "offsets": False, "rms": False}


def legal_call(op: str, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Any]:
    """Return valid arguments by name, in the order of the schema, with every optional tensor."""
    spec = OPS[op]
    sizes = SIZES | ({"C": 6} if op == "rotate_" else {}) | sizes
    args: dict[str, Any] = dict.fromkeys(spec.arguments)
    args |= {name: value for name, value in (NUMBERS | OPTIONS).items() if name in args}
    num_listed = 0
    order = torch.rand(sizes["B"], sizes["N"]).argsort(1)
    ragged = _ragged_arguments(**sizes) if {"rows", "order"} & args.keys() else {}
    sizes |= {"T": len(ragged["rows"]), "S": len(ragged["starts"])} if ragged else {}
    for input in spec.inputs:
        shape = [factor * sizes[letter] for factor, letter in input.shapes[-1]]
        if input.name in ragged:
            args[input.name] = ragged[input.name]
        elif input.name == "parent":  # all lead to the first token
            args[input.name] = (torch.arange(sizes["N"]) // 2).repeat(sizes["B"], 1)
        elif input.name == "starts":
            args[input.name] = torch.arange(shape[0]) * sizes["T"] // (shape[0] - 1)
        elif input.dtypes == "int64":  # no position is in two lists, or twice in one
            args[input.name] = order[:, num_listed : num_listed + shape[1]].sort(1).values
            num_listed += shape[1]
        elif input.dtypes == "int8 or bool":
            args[input.name] = torch.randint(-1, 2, shape, dtype=torch.int8)
        elif input.dtypes == "float32":
            args[input.name] = torch.rand(shape) + 1
        else:
            args[input.name] = torch.randn(shape).to(dtype)
    for name, low, high in spec.ranges:
        smallest, largest = (
            sum(sizes[letter] for letter in text if letter.isupper()) for text in (low, high)
        )
        args[name] = 1 if low == "0" else (smallest + largest + 1) // 2
    if "longest" in args:
        args["longest"] = sizes["T"]
    return args | {name: ragged[name] for name in ragged if name in args}


def _ragged_arguments(B: int, N: int, C: int, num_prefix: int = 1, **_: int) -> dict[str, Any]:
    """Return lists of rows of B images with N - 3, N - 2, N - 1, N - 3, ... active tokens."""
    rows, order, starts = [], [], [0]
    prune, nearest = torch.zeros(B, C, dtype=torch.bool), torch.full((B, C), -1)
    for b in range(B):
        patches = torch.randperm(N - num_prefix)[: N - 3 + b % 3 - num_prefix] + num_prefix + b * N
        count = min(C, len(patches) // 2)
        prefix = torch.arange(num_prefix) + b * N
        targets, candidates = patches[count:].sort().values, patches[:count].sort().values
        prune[b, :count] = torch.rand(count) < 0.5
        nearest[b, :count] = targets[torch.randint(len(targets), (count,))]
        rows += [prefix, patches.sort().values]
        order += [prefix, targets, candidates]
        starts.append(starts[-1] + num_prefix + len(patches))
    empty = torch.empty(0, dtype=torch.int64)
    return {
        "rows": torch.cat([empty, *rows]),
        "order": torch.cat([empty, *order]),
        "starts": torch.tensor(starts),
        "num_candidates": C,
        "prune": prune,
        "nearest": nearest,
        "num_kept": starts[-1] - int(prune.sum()),
    }


def bare_call(op: str, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Any]:
    """Return valid arguments without optional tensors, all options on; ops without positions act on
    all tokens."""
    optional = OPS[op].optional
    sizes_of_all = {"K": (SIZES | sizes)["N"]} if "idx" in optional else {}
    args = legal_call(op, dtype, **sizes | sizes_of_all)
    return args | dict.fromkeys(optional) | dict.fromkeys(OPTIONS.keys() & args, True)
