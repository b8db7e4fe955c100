"""Linear layers that multiply by oneDNN, with weights in its blocked layout."""

import copyreg
import platform
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

# Rows of the input for which oneDNN chooses the layout; that for few rows is slower for many
_ROWS = 1024


class _Thread(threading.local):
    packs = False


_thread = _Thread()


class PackedWeight(NamedTuple):
    """A weight in oneDNN's layout."""

    source: Tensor  # shares the memory of the weight, so that no other tensor can take it
    version: int
    packed: Tensor


class PackedLinear(nn.Linear):
    """A Linear layer of the engine.

    Within `packed_weights`, on an x86 CPU in float32 and bfloat16, it packs its weight at the first
    call, and again after a change that autograd counts (not of `weight.data` in place). So the
    weight is in memory twice. Elsewhere it is its base class. Copies and pickles are nn.Linear.

    Measured on an AMD EPYC: 0.87 to 0.93 of the time of nn.Linear in float32, 0.92 to 0.97 in
    bfloat16.
    """

    packed_weight: PackedWeight | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not _takes_packed(x, self.weight):
            return super().forward(x)
        packed = self.packed_weight
        if packed is None or not _holds(packed, self.weight):
            packed = self.packed_weight = _pack(self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, packed.packed, self.bias, "none", [], "")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        self._drop()  # it would stay on the CPU, or in another dtype
        return super()._apply(fn, recurse)

    def _drop(self) -> None:
        vars(self).pop("packed_weight", None)

    def __reduce__(self) -> tuple[object, ...]:
        state = {name: value for name, value in vars(self).items() if name != "packed_weight"}
        return copyreg._reconstructor, (nn.Linear, object, None), state  # type: ignore[attr-defined]


def is_plain_linear(layer: object) -> TypeGuard[nn.Linear]:
    """Tell whether a layer is an nn.Linear, packed or not, but of no other class."""
    return type(layer) in (nn.Linear, PackedLinear)


def pack(layers: Iterable[nn.Linear]) -> None:
    """Make layers PackedLinear, but those of other classes than nn.Linear."""
    for layer in layers:
        if type(layer) is nn.Linear:
            layer.__class__ = PackedLinear


def packed_weights(layers: Iterable[nn.Linear]) -> AbstractContextManager[object]:
    """Context in which layers use packed weights on this thread, unless somebody looks inside.
    Nothing in it may need a gradient."""
    return _packing(layers) if _may_pack() else nullcontext()


@contextmanager
def _packing(layers: Iterable[nn.Linear]) -> Iterator[None]:
    pack(layers)  # those of copies are plain
    outer = _thread.packs
    _thread.packs = True
    try:
        yield
    finally:
        _thread.packs = outer


def unpack(layers: Iterable[nn.Linear]) -> None:
    """Make layers nn.Linear again."""
    for layer in layers:
        if type(layer) is PackedLinear:
            layer._drop()
            layer.__class__ = nn.Linear  # type: ignore[assignment]


def _may_pack() -> bool:
    """Tell whether PyTorch runs eagerly, and nobody records operators."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or not torch._C._get_mkldnn_enabled()
    )


def _takes_packed(x: Tensor, weight: Tensor) -> bool:
    """Tell whether oneDNN multiplies x by a packed weight."""
    return (
        _thread.packs
        and type(x) is Tensor
        and type(weight) is nn.Parameter
        and x.is_cpu
        and weight.is_cpu
        and x.dtype is weight.dtype
        and x.dtype in _dtypes()
        and not weight.is_inference()
        and x.numel() > 0
    )


@cache
def _dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes that oneDNN multiplies on this CPU; those of other CPUs than x86 are not
    measured."""
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return ()
    takes_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if takes_bfloat16 else (torch.float32,)


def _pack(weight: Tensor) -> PackedWeight:
    source = weight.detach()
    version = source._version
    packed = torch.ops.mkldnn._reorder_linear_weight(source, _ROWS)
    return PackedWeight(source, version, packed)


def _holds(packed: PackedWeight, weight: Tensor) -> bool:
    """Tell whether this is the weight that was packed, unchanged."""
    return (
        packed.version == weight._version
        and weight.dtype == packed.source.dtype
        and weight.is_set_to(packed.source)
    )
