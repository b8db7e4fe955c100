"""Launching kernels: first through Triton, then from recorded launches without Python
(csrc/launch.cpp).

Triton's front end takes longer to launch a kernel than a small kernel runs. The launches of an op
follow from the dtypes, sizes, strides and alignments of its arguments, so they are recorded once,
with the allocations, and repeated for similar arguments. An op that also computes with PyTorch, as
attend_backward does, is not recorded and always launches through Triton.
"""

import functools
import re
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..extension import keep_launches, load_driver

# Compiler options that decide the bits of a sum, so that they do not follow Triton's defaults.
_PINNED = {"enable_fp_fusion": True}
_MAX_LAUNCHES = 4  # more are chunks of a long computation: their scratch would be held all at once
_NUMBER, _ARGUMENT, _ALLOCATION = range(3)

# What _C.keep_launches takes of one op.
_Parameter = tuple[int, int, int]  # kind, index, bits of a number or offset in bytes
_Launch = tuple[int, int, int, int, list[_Parameter]]  # function, grid, threads, shared memory
_Allocation = tuple[str, list[int], int]  # dtype, sizes, bytes to zero
_Recording = tuple[list[_Allocation], list[_Launch], list[int]]

aten = torch.ops.aten
_EMPTY = (aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default)
_ZEROS = (aten.zeros.default, aten.new_zeros.default)

_state = threading.local()  # recorder: the one that is entered in this thread
# Compiled kernels of recorded launches: Triton unloads unreferenced ones
_kernels: set[Any] = set()


class _TensorReference(NamedTuple):
    """A tensor that kernel arguments may point into: an argument of the op or an allocation."""

    source: int  # _ARGUMENT or _ALLOCATION
    index: int
    tensor: Tensor


def launch(kernel: Any, grid: int, *args: object, **options: object) -> None:
    """Launch kernel[(grid,)](*args, **options) on the current device, and tell the recorder."""
    compiled = kernel[(grid,)](*args, **options, **_PINNED)
    recorder = getattr(_state, "recorder", None)
    if recorder is not None:
        recorder.launches.append((compiled, grid, dict(zip(kernel.arg_names, args)) | options))


def record(launcher: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Return launcher(*args), run on the device of args[0], and keep its launches for replay."""
    recorder = _state.recorder = _Recorder(args)
    try:
        with torch.cuda.device_of(args[0]), recorder:
            result = launcher(*args)
    finally:
        _state.recorder = None
    results = () if result is None else result if isinstance(result, tuple) else (result,)
    recording = recorder.recording(results)
    if recording is not None:
        _load_driver()
        keep_launches(*recording)
    return result


@functools.cache
def _load_driver() -> None:
    load_driver("libcuda.so.1")


class _Recorder(TorchDispatchMode):
    """Records the allocations and launches of a launcher, and whether it computes anything else."""

    def __init__(self, args: tuple[object, ...]):
        super().__init__()
        self.args = args
        self.allocated: list[tuple[Tensor, bool]] = []
        self.launches: list[tuple[Any, int, dict[str, object]]] = []
        self.computes = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> Any:
        result = func(*args, **kwargs or {})
        if func in _EMPTY or func in _ZEROS:
            self.allocated.append((result, func in _ZEROS))
        elif not func.is_view:
            self.computes = True
        return result

    def recording(self, results: tuple[Tensor, ...]) -> _Recording | None:
        """The arguments of keep_launches, or None if the launcher cannot be replayed."""
        if self.computes or len(self.launches) > _MAX_LAUNCHES:
            return None
        references = [
            _TensorReference(_ALLOCATION, i, tensor) for i, (tensor, _) in enumerate(self.allocated)
        ]
        references += [
            _TensorReference(_ARGUMENT, i, arg)
            for i, arg in enumerate(self.args)
            if isinstance(arg, Tensor)
        ]
        launches = []
        for compiled, grid, values in self.launches:
            parameters = _parameters(compiled, values, references)
            if parameters is None:
                return None
            metadata = compiled.metadata
            threads = metadata.num_warps * metadata.target.warp_size
            launches.append((compiled.function, grid, threads, metadata.shared, parameters))
        outputs = []
        for result in results:
            output = _find(result, references)
            if output is None or output.source != _ALLOCATION or output.tensor is not result:
                return None
            outputs.append(output.index)
        _kernels.update(compiled for compiled, *_ in self.launches)
        allocations = [
            (
                str(tensor.dtype).removeprefix("torch."),
                list(tensor.shape),
                tensor.nbytes if zero else 0,
            )
            for tensor, zero in self.allocated
        ]
        return allocations, launches, outputs


def _find(tensor: Tensor, references: list[_TensorReference]) -> _TensorReference | None:
    """Return the reference to this tensor, or else the only one that it can be a view of."""
    for reference in references:
        # An argument passed twice is so in every call of this recording
        if reference.tensor is tensor:
            return reference
    storage = tensor.untyped_storage()._cdata
    bases = [
        reference
        for reference in references
        if reference.tensor.untyped_storage()._cdata == storage
    ]
    return bases[0] if len(bases) == 1 else None


def _parameters(
    compiled: Any, values: dict[str, object], references: list[_TensorReference]
) -> list[_Parameter] | None:
    """The parameters of a launch in the kernel's order, or None if they cannot be replayed."""
    if compiled is None or compiled.metadata.num_ctas > 1:  # the interpreter; clusters
        return None
    parameters = []
    for name, signature in compiled.src.signature.items():
        for leaf_type, value in _leaves(signature, values[name]):
            if leaf_type.startswith("*"):
                reference = _find(value, references)
                if reference is None:
                    return None
                offset = value.data_ptr() - reference.tensor.data_ptr()
                parameters.append((reference.source, reference.index, offset))
            elif leaf_type in ("fp32", "fp64"):
                bits = struct.pack("<f" if leaf_type == "fp32" else "<d", value).ljust(8, b"\0")
                parameters.append((_NUMBER, 0, int.from_bytes(bits, "little", signed=True)))
            else:
                parameters.append((_NUMBER, 0, int(value)))
    # Triton appends scratch buffers, which are of size 0 here: null.
    entry = re.search(r"\.entry\s+\w+\((.*?)\)", compiled.asm["ptx"], re.DOTALL)
    num_scratch = entry.group(1).count(".param") - len(parameters) if entry else -1
    sizes = [
        getattr(compiled.metadata, f"{name}_scratch_size", 0) for name in ("global", "profile")
    ]
    return None if num_scratch < 0 or any(sizes) else parameters + [(_NUMBER, 0, 0)] * num_scratch


def _leaves(signature: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the types and values of a parameter that are not compiled in, tuples flattened."""
    if isinstance(signature, tuple):
        for member_type, member in zip(signature, value):
            yield from _leaves(member_type, member)
    elif signature != "constexpr":
        yield signature, value
