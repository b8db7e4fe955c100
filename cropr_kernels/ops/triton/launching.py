"""Launching kernels: the first call through Triton, those like it from a plan, without Python (csrc/launch.cpp).

Triton's front end takes longer to launch a kernel than a small kernel runs. What is launched for an op follows from the
dtypes, sizes, strides and alignments of its arguments, so a recorder keeps it, with what was allocated, as their plan.
An op that computes something with PyTorch on its way, as attend_backward does, has no plan, and launches as at first.
"""

import functools
import re
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..extension import keep_plan, load_driver

# Compiler options that decide the bits of a sum, so that they do not follow Triton's defaults.
_PINNED = {"enable_fp_fusion": True}
_MAX_LAUNCHES = 4  # more are chunks of a long computation: their scratch would be held all at once
_NUMBER, _ARGUMENT, _ALLOCATION = range(3)
_Place = tuple[int, int, Tensor]  # an argument or an allocation: kind, index, tensor

aten = torch.ops.aten
_EMPTY = (aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default)
_ZEROS = (aten.zeros.default, aten.new_zeros.default)

_under_way = threading.local()
_kept: set[Any] = set()  # kernels that plans launch: Triton unloads those that nobody holds


def launch(kernel: Any, grid: int, *args: Any, **options: Any) -> None:
    """kernel[(grid,)](*args, **options), on the current device; a recorder learns of it."""
    compiled = kernel[(grid,)](*args, **options, **_PINNED)
    recorder = getattr(_under_way, "recorder", None)
    if recorder is not None:
        recorder.launches.append((compiled, grid, dict(zip(kernel.arg_names, args)) | options))


def record(launcher: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """launcher(*args), on the device of args[0], after cropr_replay had no plan; what it does becomes one."""
    recorder = _under_way.recorder = _Recorder(args)
    try:
        with torch.cuda.device_of(args[0]), recorder:
            result = launcher(*args)
    finally:
        _under_way.recorder = None
    plan = recorder.plan(() if result is None else result if isinstance(result, tuple) else (result,))
    if plan is not None:
        _load_driver()
        keep_plan(*plan)
    return result


@functools.cache
def _load_driver() -> None:
    load_driver("libcuda.so.1")


class _Recorder(TorchDispatchMode):
    """What a launcher allocates and launches, and whether that is all it does."""

    def __init__(self, args: tuple[Any, ...]):
        super().__init__()
        self.args = args
        self.allocated: list[tuple[Tensor, bool]] = []
        self.launches: list[tuple[Any, int, dict[str, Any]]] = []
        self.computes = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func in _EMPTY or func in _ZEROS:
            self.allocated.append((result, func in _ZEROS))
        elif not func.is_view:
            self.computes = True
        return result

    def plan(self, results: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
        """The arguments of keep_plan; None where the launcher does what a plan cannot."""
        if self.computes or len(self.launches) > _MAX_LAUNCHES:
            return None
        places: list[_Place] = [(_ALLOCATION, i, tensor) for i, (tensor, _) in enumerate(self.allocated)]
        places += [(_ARGUMENT, i, arg) for i, arg in enumerate(self.args) if isinstance(arg, Tensor)]
        launches = []
        for compiled, grid, values in self.launches:
            parameters = _parameters(compiled, values, places)
            if parameters is None:
                return None
            about = compiled.metadata
            threads = about.num_warps * about.target.warp_size
            launches.append((compiled.function, grid, threads, about.shared, parameters))
        outputs = [_find(result, places) for result in results]
        if any(place is None or place[0] != _ALLOCATION or place[2] is not r for place, r in zip(outputs, results)):
            return None
        _kept.update(compiled for compiled, *_ in self.launches)
        allocations = [
            (str(tensor.dtype).removeprefix("torch."), list(tensor.shape), tensor.nbytes if zero else 0)
            for tensor, zero in self.allocated
        ]
        return allocations, launches, [place[1] for place in outputs if place]


def _find(tensor: Tensor, places: list[_Place]) -> _Place | None:
    """The argument or allocation that this is, or else the only one that it can be a part of."""
    for place in places:
        if place[2] is tensor:  # given twice, it is so in every call of this plan
            return place
    storage = tensor.untyped_storage()._cdata
    found = [place for place in places if place[2].untyped_storage()._cdata == storage]
    return found[0] if len(found) == 1 else None


def _parameters(compiled: Any, values: dict[str, Any], places: list[_Place]) -> list[tuple[int, int, int]] | None:
    """What a kernel is launched with: (kind, index, bits or bytes), in the order of its parameters."""
    if compiled is None or compiled.metadata.num_ctas > 1:  # the interpreter; clusters
        return None
    parameters = []
    for name, kind in compiled.src.signature.items():
        for leaf, value in _leaves(kind, values[name]):
            if leaf.startswith("*"):
                place = _find(value, places)
                if place is None:
                    return None
                parameters.append((*place[:2], value.data_ptr() - place[2].data_ptr()))
            elif leaf in ("fp32", "fp64"):
                bits = struct.pack("<f" if leaf == "fp32" else "<d", value).ljust(8, b"\0")
                parameters.append((_NUMBER, 0, int.from_bytes(bits, "little", signed=True)))
            else:
                parameters.append((_NUMBER, 0, int(value)))
    # Behind them Triton has scratch buffers, of no size here: null.
    entry = re.search(r"\.entry\s+\w+\((.*?)\)", compiled.asm["ptx"], re.DOTALL)
    scratch = entry.group(1).count(".param") - len(parameters) if entry else -1
    sizes = [getattr(compiled.metadata, f"{name}_scratch_size", 0) for name in ("global", "profile")]
    return None if scratch < 0 or any(sizes) else parameters + [(_NUMBER, 0, 0)] * scratch


def _leaves(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Types and values of a parameter that are not compiled in; those of the members of a tuple."""
    if isinstance(kind, tuple):
        for one, member in zip(kind, value):
            yield from _leaves(one, member)
    elif kind != "constexpr":
        yield kind, value
