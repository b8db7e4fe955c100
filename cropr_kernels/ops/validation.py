"""Checks arguments against csrc/library.h, for the fake and the CUDA kernels.

csrc/checks.cpp does the same for the CPU kernels: same table, same order, same messages.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .extension import table

Dims = dict[str, int]  # sizes by their letters in the table
Arguments = dict[str, Any]  # tensors, numbers and None, by name
Shape = list[tuple[int, str]]  # factor and letter of each dimension
_ANY, _CONTIGUOUS, _DENSE_ROWS = range(3)


class Input(NamedTuple):
    name: str
    dtypes: str  # text in error messages
    allowed: list[torch.dtype]  # empty: the dtype of the first tensor
    shapes: list[Shape]  # alternatives
    layout: int


class _Op(NamedTuple):
    arguments: tuple[str, ...]  # names, in the order of the schema
    inputs: tuple[Input, ...]
    ranges: tuple[tuple[str, str, str], ...]  # name, low, high
    optional: tuple[str, ...]  # tensors that may be None


def _parse_shape(text: str) -> Shape:
    return [(int(factor or 1), letter) for factor, letter in re.findall(r"(\d?)([A-Z])", text)]


def _parse_input(name: str, dtypes: str, shape: str, layout: int) -> Input:
    allowed = (
        []
        if dtypes.startswith("the dtype")
        else [getattr(torch, name) for name in re.split(", | or ", dtypes)]
    )
    shapes = [_parse_shape(alternative) for alternative in shape.split("|")]
    return Input(name, dtypes, allowed, shapes, layout)


def _parse(
    schema: str,
    inputs: tuple[tuple[str, str, str, int], ...],
    ranges: tuple[tuple[str, str, str], ...],
) -> tuple[str, _Op]:
    names = tuple(re.findall(r"(\w+)(?:=[\w.]+)?[,)]", schema.partition(" ->")[0]))
    parsed = tuple(_parse_input(*fields) for fields in inputs)
    return schema.partition("(")[0], _Op(
        names, parsed, ranges, tuple(re.findall(r"Tensor(?:\(\w!\))?\? (\w+)", schema))
    )


OPS = dict(_parse(*row) for row in table)


def check(op: str, *args: object) -> Dims:
    """Check all arguments of a call, in the order of the schema, and return the sizes by letter.

    Raises RuntimeError with one sentence: the op, the argument, the allowed and the actual value.
    """
    dims = check_shapes(op, *args)
    spec = OPS[op]
    if any(input.layout != _ANY for input in spec.inputs):
        values: Arguments = dict(zip(spec.arguments, args))
        _check_overlap(op, spec, {input.name: values[input.name] for input in spec.inputs})
    return dims


def _check_overlap(op: str, spec: "_Op", tensors: dict[str, Tensor | None]) -> None:
    """Raise an error if a tensor that changes in place shares memory with another argument."""
    for changed in (input.name for input in spec.inputs if input.layout != _ANY):
        written = tensors[changed]
        if written is None:
            continue
        storage = written.untyped_storage()._cdata
        for name, tensor in tensors.items():
            if tensor is None or name == changed or tensor.untyped_storage()._cdata != storage:
                continue
            begin, end = _extent(written)
            first, last = _extent(tensor)
            if first < end and begin < last:
                _fail(op, f"{name} must not share memory with {changed}, which changes in place")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The memory range of a tensor: addresses of its first byte and past its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    count = (last + 1) * tensor.element_size() if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + count


def check_shapes(op: str, *args: object) -> Dims:
    """Check what does not depend on memory, for fake tensors; `check` without overlaps."""
    spec = OPS[op]
    values: Arguments = dict(zip(spec.arguments, args, strict=True))
    first: Tensor = values[spec.inputs[0].name]
    dims: Dims = {}
    for input in spec.inputs:
        if values[input.name] is None:
            for _, letter in input.shapes[0]:
                dims[letter] = dims.get(letter, dims.get("N", 0))
        else:
            _check_input(op, input, values[input.name], first, dims)
    for name, low, high in spec.ranges:
        smallest = _bound(low, dims, values)
        largest = _bound(high, dims, values)
        if not smallest <= values[name] <= largest:
            _fail(
                op,
                f"{name} must be in [{low}, {high}] = [{smallest}, {largest}], got {values[name]}",
            )
    if op in _RULES:
        _RULES[op](op, dims, values)
    return dims


def _check_input(op: str, input: Input, tensor: Tensor, first: Tensor, dims: Dims) -> None:
    name = input.name
    if tensor.device != first.device:
        _fail(
            op,
            f"{name} must be on the same device as the other tensors, {first.device}, got "
            f"{tensor.device}",
        )
    if tensor.dtype not in (input.allowed or [first.dtype]):
        allowed = input.dtypes if input.allowed else f"{input.dtypes}, {_dtype(first)}"
        _fail(op, f"{name} must be {allowed}, got {_dtype(tensor)}")
    if not any(_fits(shape, tensor.shape, dims) for shape in input.shapes):
        shapes = " or ".join(_expected(shape, dims) for shape in input.shapes)
        _fail(op, f"{name} must have shape {shapes}, got {tuple(tensor.shape)}")
    if input.layout == _CONTIGUOUS and not tensor.is_contiguous():
        _fail(
            op, f"{name} must be contiguous, as it changes in place, got strides {tensor.stride()}"
        )
    if input.layout == _DENSE_ROWS and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        rows = "a stride of 1 in the last dimension"
        _fail(op, f"{name} must have {rows}, as it changes in place, got strides {tensor.stride()}")
    if input.layout == _DENSE_ROWS and any(
        size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride())
    ):
        _fail(
            op,
            f"{name} must not be expanded, as it changes in place, got strides {tensor.stride()}",
        )


def _fits(shape: Shape, sizes: torch.Size, dims: Dims) -> bool:
    """Match sizes to a shape; if they fit, dims receives the sizes of its letters."""
    if len(shape) != len(sizes):
        return False
    num_known = len(dims)
    for (factor, letter), size in zip(shape, sizes):
        if letter not in dims:
            dims[letter] = size
        elif size != factor * dims[letter]:
            while len(dims) > num_known:
                dims.popitem()
            return False
    return True


def _expected(shape: Shape, dims: Dims) -> str:
    """A shape as text, with the sizes that are known: "(B = 2, K)" or "(P, 2 C = 8)"."""
    parts = []
    for factor, letter in shape:
        text = letter if factor == 1 else f"{factor} {letter}"
        parts.append(f"{text} = {factor * dims[letter]}" if letter in dims else text)
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def _bound(text: str, dims: Dims, values: Arguments) -> int:
    if text in dims:
        return dims[text]
    return (
        values[text] if text in values else sum(dims[letter] for letter in text if letter.isupper())
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _fail(op: str, message: str) -> NoReturn:
    raise RuntimeError(f"{op}: {message}")


# Rules that the table of shapes cannot express.


def _require_token(op: str, dims: Dims, values: Arguments) -> None:
    if dims["N"] == 0:
        _fail(op, f"x must have at least one token, got shape {tuple(values['x'].shape)}")


def _require_target(op: str, dims: Dims, values: Arguments) -> None:
    n = dims["N"]
    num_targets = dims["T"]
    num_candidates = dims["C"]
    if op == "merge" and num_targets + num_candidates != n:
        counts = f"{num_targets} + {num_candidates}"
        _fail(
            op, f"target_idx and candidate_idx must together hold N = {n} positions, got {counts}"
        )
    if values["num_keep"] < num_targets + num_candidates and num_targets == values["num_prefix"]:
        _fail(
            op, f"target_idx must hold a token after the prefix, got T = num_prefix = {num_targets}"
        )


def _require_parent(op: str, dims: Dims, values: Arguments) -> None:
    if dims["R"] > 0 and dims["K"] == values["num_prefix"]:
        _fail(op, f"kept_idx must hold a token after the prefix, got K = num_prefix = {dims['K']}")


def _require_rotary_rows(op: str, dims: Dims, values: Arguments) -> None:
    patches = dims["K"] - values["num_prefix"]
    if dims["C"] % 2:
        _fail(op, f"x must have an even number of channels, got {dims['C']}")
    if values["idx"] is None and dims["P"] < patches:
        _fail(op, f"table must have a row for each of the {patches} patches, got {dims['P']}")


def _require_starts(op: str, dims: Dims, values: Arguments) -> None:
    if dims["S"] != dims["B"] + 1:
        _fail(op, f"starts must have shape (B + 1 = {dims['B'] + 1},), got ({dims['S']},)")


def _require_start(op: str, dims: Dims, values: Arguments) -> None:
    if dims["S"] == 0:
        _fail(op, "starts must hold at least 0, got shape (0,)")


_RULES: dict[str, Callable[[str, Dims, Arguments], None]] = {
    "attend": _require_token,
    "attend_scores": _require_token,
    "attend_backward": _require_token,
    "merge": _require_target,
    "merge_": _require_target,
    "parent_offsets": _require_parent,
    "parent_offsets_": _require_parent,
    "rotate_": _require_rotary_rows,
    "ragged_add_select_": _require_starts,
    "ragged_nearest": _require_starts,
    "ragged_merge_": _require_starts,
    "attend_segments": _require_start,
}
