"""Launches of Triton kernels, recorded instead of run, and compiled; needs no GPU."""

import importlib
import itertools
import pkgutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

import cropr_kernels as cropr
from cropr_kernels.models.vit import ViT, ViTConfig
from cropr_kernels.ops import triton as kernel_files
from cropr_kernels.ops.cuda import FILES
from cropr_kernels.ops.validation import OPS
from cropr_kernels.pruning.deployment import deployed_copy

ARCHITECTURES = [80, 86, 89, 90, 100, 120]
TYPES = ["float32", "float64", "bfloat16", "float16"]
# Of Vision Transformers with published weights
WIDTHS = [192, 384, 768, 1024, 1152, 1280, 1408, 1536, 1664]
# Sides of the grid of patches: 197, 577 and 1025 tokens have keys in registers, 9217 do not.
SIDES = [14, 24, 32, 96]
_NUMBERS = {"scale": 0.03, "eps": 1e-6, "size_weight": 2.0, "cost_weight": 0.25}
# Blocks that call the ops with other arguments: LayerScale and sizes of tokens; rotary positions;
# fusion; RMSNorm without and with LayerScale.
_MODELS: list[tuple[dict[str, Any], type[torch.nn.Module], dict[str, Any]]] = [
    ({}, torch.nn.LayerNorm, {}),
    ({"init_values": 1e-5}, torch.nn.LayerNorm, {"merge": True, "llf": "track_parent"}),
    (
        {"rope": True, "swiglu": True, "qkv": "joint_eva", "global_pool": "avg"},
        torch.nn.RMSNorm,
        {"llf": "track_parent"},
    ),
    ({"init_values": 1e-5}, torch.nn.RMSNorm, {}),
]


class Launch(NamedTuple):
    """One launch of a kernel, with its arguments and options."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def constants(self) -> dict[str, Any]:
        """Constants of the kernel by name."""
        values = dict(zip(self.kernel.arg_names, self.args)) | self.options
        return {
            parameter.name: values[parameter.name]
            for parameter in self.kernel.params
            if parameter.is_constexpr
        }

    def __str__(self) -> str:
        return " ".join(
            [self.kernel.__name__, *(f"{name}={value}" for name, value in self.constants.items())]
        )


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record launches instead of running kernels."""
    recorded: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        recorded.append(Launch(kernel, args, options))

    original_run = JITFunction.run
    JITFunction.run = record
    try:
        yield recorded
    finally:
        JITFunction.run = original_run


def kernels() -> dict[str, JITFunction]:
    """Functions of Triton in all files of kernels, by name."""
    modules = [
        importlib.import_module(f"{kernel_files.__name__}.{file.name}")
        for file in pkgutil.iter_modules(kernel_files.__path__)
    ]
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    }


def launcher(op: str) -> Any:
    """Return the function that the dispatcher calls for tensors on CUDA."""
    return getattr(importlib.import_module(f"cropr_kernels.ops.triton.{FILES[op]}"), op)


class _Launching(TorchDispatchMode):
    """Launch the CUDA kernels of this package's ops too, on any device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cropr":
            launcher(func._schema.name.removeprefix("cropr::"))(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def launches(dtype: str, widths: list[int] = WIDTHS, sides: list[int] = SIDES) -> list[Launch]:
    """Record the launches of models on the engine, and of the ops that only users call."""
    with recording() as recorded:
        for width, side in itertools.product(widths, sides):
            _run_engine(getattr(torch, dtype), width, side)
            for op in OPS:
                if op.startswith("ragged_") or not op.endswith(("_", "norm")):
                    for args in _calls(op, getattr(torch, dtype), width, side * side + 1):
                        launcher(op)(**args)
    return recorded


def _run_engine(dtype: torch.dtype, width: int, side: int) -> None:
    """Run pruned models on the engine with tensors without data."""
    with torch.device("meta"), torch.no_grad():
        images = torch.empty(2, 3, 16 * side, 16 * side, dtype=dtype)
        protect, padding = (torch.empty(2, side, side, dtype=torch.bool) for _ in range(2))
        for architecture, norm, pruning in _MODELS:
            sizes = {
                "img_size": 16 * side,
                "embed_dim": width,
                "num_heads": width // 64,
                "depth": 3,
            }
            model = ViT(ViTConfig(num_classes=10, **sizes, **architecture))
            for block in model.blocks:
                block.norm1, block.norm2 = norm(width), norm(width)
            model = deployed_copy(cropr.apply(model.to(dtype), ratio=0.2, num_outputs=0, **pruning))
            with _Launching():
                model(images)
                model(images, protect=protect)
                if "merge" not in pruning:
                    model(images, padding=padding)


def _calls(op: str, dtype: torch.dtype, width: int, n: int) -> Iterator[dict[str, Any]]:
    """Yield calls of an op on tensors without data.

    With and without optional tensors, with one query and with 64.
    """
    spec = OPS[op]
    for queries in (1, 64):
        sizes = {
            "B": 2,
            "N": n,
            "D": width,
            "K": n,
            "R": n // 4,
            "M": queries,
            "S": 3,
            "T": n - n // 4,
            "C": n // 4,
            "F": width,
        }
        if op == "attend_segments":
            sizes |= {"T": 2 * n, "H": width // 64, "C": 64, "S": 3}
        args: dict[str, Any] = {name: _NUMBERS.get(name) for name in spec.arguments}
        for input in spec.inputs:
            allowed = input.allowed[0] if input.allowed and len(input.allowed) < 4 else dtype
            shape = [factor * sizes[letter] for factor, letter in input.shapes[0]]
            args[input.name] = torch.empty(shape, dtype=allowed, device="meta")
        args |= {name: 1 if low == "0" else n - n // 8 for name, low, _ in spec.ranges}
        yield args
        if spec.optional:
            yield args | dict.fromkeys(spec.optional)


class Compiler:
    """The part of a driver that compilation needs. Kernels are cached by device."""

    def __init__(self, architecture: int, device: int) -> None:
        self.architecture = architecture
        self.device = device

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def compile_launches(
    launches: list[Launch], architecture: int, *, layouts_only: bool = False
) -> Iterator[tuple[Launch, Any]]:
    """Compile every specialization among the launches once, for an architecture.

    Args:
        launches: as `recording` yields them.
        architecture: compute capability times ten.
        layouts_only: compile to TTGIR, which takes less than half the time; `asm` has neither PTX
            nor cubin.
    """
    active = driver._active
    driver._active = Compiler(architecture, -architecture if layouts_only else architecture)
    try:
        with _ending_at_layouts() if layouts_only else nullcontext():
            hashes = set()
            for launch in launches:
                compiled = launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
                if compiled.hash not in hashes:
                    hashes.add(compiled.hash)
                    yield launch, compiled
    finally:
        driver._active = active


@contextmanager
def _ending_at_layouts() -> Iterator[None]:
    """Leave out the stages after TTGIR, and Triton's cache on disk, which would keep the result."""
    backend = backends["nvidia"].compiler
    all_stages = backend.add_stages

    def add_stages(self: Any, stages: dict[str, Any], options: Any, language: Any) -> None:
        all_stages(self, stages, options, language)
        del stages["llir"], stages["ptx"]
        stages["cubin"] = lambda module, metadata: metadata.update(name="", shared=0) or b""

    backend.add_stages = add_stages
    try:
        with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
            knobs.cache.dir = folder
            yield
    finally:
        backend.add_stages = all_stages
