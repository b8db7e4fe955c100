"""Inputs for all op tests: one table of shapes, and illegal calls of every op, made from
csrc/library.h."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cropr_kernels.ops.sample_inputs import DTYPES as DTYPES
from cropr_kernels.ops.sample_inputs import legal_call
from cropr_kernels.ops.validation import OPS, Input

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Kernel tests that are slow in Triton's interpreter: make test leaves them to make test-all.
slow_interpreted = pytest.mark.slow if INTERPRETED else pytest.mark.kernels
# Triton's interpreter multiplies bfloat16 matrices as integers.
MATRIX_DTYPES = [dtype for dtype in DTYPES if not (INTERPRETED and dtype == torch.bfloat16)]
# (B, N, D, K, P)
SHAPES = [
    (1, 1, 1, 1, 0),
    (1, 2, 3, 1, 1),
    (2, 5, 8, 3, 1),
    (3, 17, 33, 9, 2),
    (2, 50, 96, 25, 5),
    (2, 65, 48, 52, 1),
    (4, 37, 100, 36, 0),
    (1, 197, 192, 188, 1),
    (2, 40, 64, 5, 5),  # K = P
    (2, 40, 64, 40, 1),  # K = N
    (2, 40, 64, 0, 0),  # K = 0
    (0, 10, 16, 5, 1),  # B = 0
]


def tokens(batch: int, n: int, dim: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(batch, n, dim, device=device).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Compare bit for bit, NaN payloads and signs of zero included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def odd_layouts(x: Tensor) -> dict[str, Tensor]:
    """Return the same values in every layout a caller may pass."""
    batch, n, dim = x.shape
    offset = torch.empty(batch * n * dim + 3, dtype=x.dtype, device=x.device)[3:].view(
        batch, n, dim
    )
    wide = torch.empty(batch, n, 2 * dim, dtype=x.dtype, device=x.device)
    padded = torch.empty(batch, n + 4, dim, dtype=x.dtype, device=x.device)
    return {
        "transposed": x.transpose(1, 2).contiguous().transpose(1, 2),
        "batch inside": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every other column": wide[:, :, ::2].copy_(x),
        "left half of wider rows": wide.clone()[:, :, :dim].copy_(x),
        "part of a longer sequence": padded[:, 2 : n + 2].copy_(x),
        "odd storage offset": offset.copy_(x),
    }


def illegal_calls(op: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield calls with one illegal argument, by the table of ops, and the name of that argument."""
    legal, spec, known = legal_call(op), OPS[op], set()
    sizes = {
        letter: size // factor
        for input in spec.inputs
        for (factor, letter), size in zip(input.shapes[-1], legal[input.name].shape)
    }
    for i, input in enumerate(spec.inputs):
        for wrong in _wrong(input, legal[input.name], known, first=i == 0):
            yield legal | {input.name: wrong}, input.name
        known |= {letter for _, letter in input.shapes[0]}
    for name, low, high in spec.ranges:
        least, most = (
            legal[text]
            if text in legal
            else sum(sizes[letter] for letter in text if letter.isupper())
            for text in (low, high)
        )
        for value in (least - 1, most + 1):
            yield legal | {name: value}, name


def _wrong(input: Input, tensor: Tensor, known: set[str], *, first: bool) -> Iterator[Tensor]:
    yield tensor.int() if input.dtypes != "float32" else tensor.double()
    if not (input.allowed or first):
        yield tensor.half()
    yield tensor[0] if tensor.ndim > 1 and len(input.shapes) == 1 else tensor[None, None]
    for axis, (_, letter) in enumerate(input.shapes[-1]):
        if letter in known:
            yield tensor.narrow(axis, 0, tensor.shape[axis] - 1)
    if input.layout:
        yield tensor.transpose(-2, -1).contiguous().transpose(-2, -1)
        yield tensor[:1].expand_as(tensor)
