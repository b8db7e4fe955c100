"""Registers, shared memory and spills of every Triton kernel, compiled ahead of time. Needs no GPU.

python -m benchmarks.kernels.resources [--arch 90] [--dtype bfloat16]
"""

import argparse
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from cropr_kernels.ops.registration import FILES
from cropr_kernels.ops.validation import OPS

ARCHITECTURES = [80, 90, 100]
TYPES = {"float32": "*fp32", "float64": "*fp64", "bfloat16": "*bf16", "float16": "*fp16"}
_POINTERS = TYPES | {"int64": "*i64", "int32": "*i32", "int8": "*i8"}
# Tokens and channels: every width of the selection, in registers and in chunks.
_SHAPES = [(197, 768), (1025, 1536), (4096, 768), (9216, 768)]
_NUMBERS = {"scale": 0.03, "eps": 1e-6, "size_weight": 2.0}


class Launch(NamedTuple):
    """What decides the code of one launch: its kernel, constants, types of the other arguments, and options."""

    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str]
    aligned: tuple[str, ...]  # multiples of 16
    options: dict[str, Any]


def launches(dtype: str) -> list[Launch]:
    """Every kernel as the launchers launch it, for tensors without data, each once."""
    found: dict[str, Launch] = {}

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = _launch(kernel, dict(zip(kernel.arg_names, args)) | kwargs)
        found.setdefault(f"{kernel.__name__} {launch[1:]}", launch)

    run, JITFunction.run = JITFunction.run, record
    try:
        for op, file in FILES.items():
            launcher = getattr(importlib.import_module(f"cropr_kernels.ops.triton.{file}"), op)
            for args in _calls(op, getattr(torch, dtype)):
                launcher(**args)
    finally:
        JITFunction.run = run
    return list(found.values())


def _calls(op: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Calls of an op, with and without its optional tensors, with one and with many queries."""
    spec = OPS[op]
    for n, dim in _SHAPES:
        for queries, flag in ((1, False), (64, True)):
            sizes = {"B": 2, "N": n, "D": dim, "K": n, "R": n // 4, "M": queries, "S": n - n // 4, "C": n // 4}
            sizes |= {"F": dim, "P": n} | ({"H": 12, "C": 64} if op == "rotate_" else {})
            args: dict[str, Any] = {name: _NUMBERS.get(name, flag) for name in spec.arguments}
            for input in spec.inputs:
                allowed = input.allowed[0] if input.allowed and len(input.allowed) < 4 else dtype
                shape = [factor * sizes[letter] for factor, letter in input.shapes[0]]
                args[input.name] = torch.empty(shape, dtype=allowed, device="meta")
            args |= {name: 1 if low == "0" else n - n // 8 for name, low, _ in spec.ranges}
            yield args
            if spec.optional:
                yield args | dict.fromkeys(spec.optional)


def _launch(kernel: Any, values: dict[str, Any]) -> Launch:
    constants: dict[str, Any] = {}
    types: dict[str, str] = {}
    aligned: list[str] = []
    for parameter in kernel.params:
        name, value = parameter.name, values.pop(parameter.name)
        number = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (number and value == 1):
            constants[name] = value
        elif isinstance(value, Tensor):
            types[name] = _POINTERS[str(value.dtype).removeprefix("torch.")]
            aligned.append(name)
        else:
            types[name] = "i32" if isinstance(value, int) else "fp32"
            if number and value % 16 == 0:
                aligned.append(name)
    return Launch(kernel, constants, types, tuple(aligned), values)


def compile_launch(launch: Launch, architecture: int) -> Any:
    names = launch.kernel.arg_names
    source = ASTSource(
        launch.kernel,
        {name: launch.types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in launch.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)


def tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack and shared memory in bytes, as the assembler reports them."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    text = subprocess.run(
        [tool("cuobjdump"), "--dump-resource-usage", path], capture_output=True, text=True, check=True
    ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--dtype", choices=TYPES, default="bfloat16")
    options = parser.parse_args()
    print(f"{'kernel':24}{'sm':>4}{'warps':>6}{'registers':>10}{'shared':>8}{'stack':>6}  constants")
    with tempfile.TemporaryDirectory() as folder:
        for architecture in [options.arch] if options.arch else ARCHITECTURES:
            for launch in launches(options.dtype):
                compiled = compile_launch(launch, architecture)
                usage = resources(compiled.asm["cubin"], Path(folder))
                shown = " ".join(f"{name}={value}" for name, value in launch.constants.items())
                print(
                    f"{launch.kernel.__name__:24}{architecture:>4}{launch.options['num_warps']:>6}{usage['REG']:>10}"
                    f"{compiled.metadata.shared:>8}{usage['STACK']:>6}  {shown}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
