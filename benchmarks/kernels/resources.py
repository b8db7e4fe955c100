"""Registers, shared memory and spills of every Triton kernel, compiled ahead of time. Needs no GPU.

python -m benchmarks.kernels.resources [--arch 90] [--dtype bfloat16]
"""

import argparse
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from cropr_kernels.ops.registration import FILES
from cropr_kernels.ops.validation import OPS

ARCHITECTURES = [80, 90, 100]
TYPES = ["float32", "float64", "bfloat16", "float16"]
# Tokens and channels: every width of the selection, in registers and in chunks.
SHAPES = [(197, 768), (1025, 1536), (4096, 768), (9216, 768)]
_NUMBERS = {"scale": 0.03, "eps": 1e-6, "size_weight": 2.0}


class Launch(NamedTuple):
    """One call of a kernel: its arguments, tensors of which have no data, and its options."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


class _Driver:
    """What Triton asks a driver for before it compiles. Kernels are kept by device: here, by architecture."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def launches(dtype: str, shapes: Sequence[tuple[int, int]] = SHAPES) -> list[Launch]:
    """Every kernel as the launchers launch it, for tensors without data of so many tokens and channels."""
    found: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(Launch(kernel, args, options))

    run, JITFunction.run = JITFunction.run, record
    try:
        for op, file in FILES.items():
            launcher = getattr(importlib.import_module(f"cropr_kernels.ops.triton.{file}"), op)
            for args in _calls(op, getattr(torch, dtype), shapes):
                launcher(**args)
    finally:
        JITFunction.run = run
    return found


def compile_launches(launches: list[Launch], architecture: int) -> Iterator[tuple[Launch, Any]]:
    """Every specialisation among the launches, bound and compiled as a launch on that architecture would, each once."""
    active, driver._active = driver._active, _Driver(architecture)
    try:
        seen = set()
        for launch in launches:
            compiled = launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
            if compiled.hash not in seen:
                seen.add(compiled.hash)
                yield launch, compiled
    finally:
        driver._active = active


def _calls(op: str, dtype: torch.dtype, shapes: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """Calls of an op, with and without its optional tensors, with one and with many queries."""
    spec = OPS[op]
    for n, dim in shapes:
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


def constants(launch: Launch) -> dict[str, Any]:
    """The constants of a launch, by name."""
    values = dict(zip(launch.kernel.arg_names, launch.args)) | launch.options
    return {parameter.name: values[parameter.name] for parameter in launch.kernel.params if parameter.is_constexpr}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--dtype", choices=TYPES, default="bfloat16")
    options = parser.parse_args()
    print(f"{'kernel':24}{'sm':>4}{'warps':>6}{'registers':>10}{'shared':>8}{'stack':>6}  constants")
    with tempfile.TemporaryDirectory() as folder:
        for architecture in [options.arch] if options.arch else ARCHITECTURES:
            for launch, compiled in compile_launches(launches(options.dtype), architecture):
                usage = resources(compiled.asm["cubin"], Path(folder))
                shown = " ".join(f"{name}={value}" for name, value in constants(launch).items())
                print(
                    f"{launch.kernel.__name__:24}{architecture:>4}{launch.options['num_warps']:>6}{usage['REG']:>10}"
                    f"{compiled.metadata.shared:>8}{usage['STACK']:>6}  {shown}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
