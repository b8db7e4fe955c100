"""Legal calls of every op, made from csrc/library.h: what a check of the kernels begins with."""

from typing import Any

import torch

from .validation import OPS

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Sizes by their letters in the table, and what numbers are that no range bounds.
SIZES = {"B": 2, "N": 9, "D": 6, "K": 4, "R": 5, "M": 3, "S": 4, "C": 5, "F": 7, "P": 8, "H": 3}
NUMBERS = {"scale": 0.4, "eps": 1e-6, "size_weight": 2.0, "cost_weight": 0.5, "half": False, "offsets": False}


def legal_call(op: str, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Any]:
    """Arguments by name, in the order of the schema; every optional tensor is there."""
    spec, sizes = OPS[op], SIZES | ({"C": 6} if op == "rotate_" else {}) | sizes
    args: dict[str, Any] = dict.fromkeys(spec.arguments) | {n: v for n, v in NUMBERS.items() if n in spec.arguments}
    given, order = 0, torch.stack([torch.randperm(sizes["N"]) for _ in range(sizes["B"])])
    for input in spec.inputs:
        shape = [factor * sizes[letter] for factor, letter in input.shapes[-1]]
        if input.name == "parent":  # all lead to the first token
            args[input.name] = (torch.arange(sizes["N"]) // 2).repeat(sizes["B"], 1)
        elif input.dtypes == "int64":  # all lists of an op together hold no position twice
            args[input.name] = order[:, given : given + shape[1]].sort(1).values
            given += shape[1]
        elif input.dtypes == "int8 or bool":
            args[input.name] = torch.randint(-1, 2, shape, dtype=torch.int8)
        elif input.dtypes == "float32":
            args[input.name] = torch.rand(shape) + 1
        else:
            args[input.name] = torch.randn(shape).to(dtype)
    for name, low, high in spec.ranges:
        least, most = (sum(sizes[letter] for letter in text if letter.isupper()) for text in (low, high))
        args[name] = 1 if low == "0" else (least + most + 1) // 2
    return args


def bare_call(op: str, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Any]:
    """The same without any optional tensor: where no positions are given, all tokens are meant."""
    optional = OPS[op].optional
    every = {"K": (SIZES | sizes)["N"]} if "idx" in optional else {}
    return legal_call(op, dtype, **sizes | every) | dict.fromkeys(optional)
