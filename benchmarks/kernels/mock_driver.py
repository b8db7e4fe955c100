"""A CUDA driver that runs nothing: kernels are compiled and launched as on a GPU, on CPU tensors.

Everything but the driver is real: Triton's front end, compiler and launcher, and the recorded
launches of csrc/launch.cpp. A hook receives each launch.
"""

import ctypes
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

from benchmarks.kernels.launches import Compiler, kernels
from cropr_kernels.ops.cuda import FILES, cuda_kernel
from cropr_kernels.ops.extension import NAMES, forget_launches, table

_SOURCE = r"""
#include <cstddef>
#include <cstring>
extern "C" {
typedef void (*Hook)(void*, unsigned, unsigned, unsigned, void**);
static Hook hook = nullptr;
static size_t functions = 0;
static int error = 0;
void mock_set_hook(Hook value) { hook = value; }
void mock_set_error(int value) { error = value; }
struct Config { unsigned grid[3], block[3], shared; };
int cuLaunchKernel(void* f, unsigned x, unsigned, unsigned, unsigned threads, unsigned, unsigned,
                   unsigned shared, void*, void** parameters, void**) {
  if (hook) hook(f, x, threads, shared, parameters);
  return error;
}
int cuLaunchKernelEx(const Config* c, void* f, void** parameters, void**) {
  if (hook) hook(f, c->grid[0], c->block[0], c->shared, parameters);
  return 0;
}
int cuMemsetD8Async(void* to, unsigned char value, size_t bytes, void*) {
  std::memset(to, value, bytes);
  return 0;
}
int cuPointerGetAttribute(void* to, int, size_t address) {
  std::memcpy(to, &address, sizeof address);
  return 0;
}
int cuModuleGetFunction(size_t* f, void*, const char*) { *f = ++functions; return 0; }
int cuDeviceGetAttribute(int* value, int, int) { *value = 232448; return 0; }
int cuFuncGetAttribute(int* value, int, void*) { *value = 1024; return 0; }
int cuGetErrorString(int, const char** text) { *text = "an error of the mock driver"; return 0; }
"""
# Symbols that Triton's launcher links against and never calls here.
_UNUSED = """
    cuInit cuDeviceGet cuDeviceGetCount cuDriverGetVersion cuCtxGetCurrent cuCtxSetCurrent
    cuCtxGetDevice cuCtxGetLimit cuCtxSetLimit cuDevicePrimaryCtxRetain cuModuleLoadData
    cuModuleUnload cuFuncSetAttribute cuFuncSetCacheConfig
    cuOccupancyMaxActiveClusters cuTensorMapEncodeTiled cuTensorMapEncodeIm2col
"""


class MockLaunch(NamedTuple):
    """A launch that the driver received; parameters as bytes."""

    function: int
    grid: int
    threads: int
    shared: int
    parameters: tuple[bytes, ...]


def build(folder: Path) -> ctypes.CDLL:
    """Compile the driver, and load it as libcuda.so.1."""
    source = folder / "mock.cpp"
    library = folder / "libcuda.so.1"
    source.write_text(
        _SOURCE + "".join(f"int {name}(...) {{ return 0; }}\n" for name in _UNUSED.split()) + "}\n"
    )
    compiler = os.environ.get("CXX", "g++")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", f"-Wl,-soname,{library.name}", "-o", library, source],
        check=True,
    )
    return ctypes.CDLL(str(library))


class _Driver(Compiler, CudaDriver):
    """Triton's driver with one device and one stream."""

    def __init__(self, architecture: int) -> None:
        Compiler.__init__(self, architecture, device=architecture)
        self.utils = CudaUtils()
        self.launcher_cls = CudaLauncher


class MockCuda:
    """Records launches in `recording`; `ops` are the CUDA kernels for CPU tensors."""

    def __init__(self, library: ctypes.CDLL):
        self.ops = torch.ops.cropr_mock
        self.launched: list[MockLaunch] = []
        self.library = library
        hook_type = ctypes.CFUNCTYPE(
            None,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.POINTER(ctypes.c_void_p),
        )
        self._hook = hook_type(self._record)
        self._sizes: dict[int, list[int]] = {}

    @contextmanager
    def recording(self) -> Iterator[list[MockLaunch]]:
        """Collect launches in the list returned."""
        self.launched = []
        self.library.mock_set_hook(self._hook)
        try:
            yield self.launched
        finally:
            self.library.mock_set_hook(None)

    def _record(self, function: int, grid: int, threads: int, shared: int, parameters: Any) -> None:
        sizes = self._sizes.get(function) or self._sizes.setdefault(
            function, _parameter_sizes(function)
        )
        values = tuple(ctypes.string_at(parameters[i], size) for i, size in enumerate(sizes))
        self.launched.append(MockLaunch(function, grid, threads, shared, values))


def _parameter_sizes(function: int) -> list[int]:
    """Bytes of each parameter of a kernel, as declared in its PTX."""
    for kernel in kernels().values():
        for cache, *_ in kernel.device_caches.values():
            for compiled in cache.values():
                if compiled.function == function:
                    declared = compiled.asm["ptx"].partition(".entry")[2].partition(")")[0]
                    return [
                        int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", declared)
                    ]
    raise LookupError(f"no kernel has the function {function}")


@contextmanager
def mock_cuda(folder: Path, architecture: int = 90) -> Iterator[MockCuda]:
    """Run CUDA kernels on CPU tensors; `folder` holds the driver."""
    library = build(folder)
    triton.knobs.nvidia.libcuda_path = str(folder)
    active = triton.runtime.driver._active
    triton.runtime.driver._active = _Driver(architecture)
    mocked = torch.library.Library("cropr_mock", "DEF")
    for name, (schema, *_) in zip(NAMES, table):
        mocked.define(schema)
        mocked.impl(name, cuda_kernel(name, FILES[name]), "CPU")
    try:
        yield MockCuda(library)
    finally:
        mocked._destroy()
        forget_launches()
        triton.runtime.driver._active = active
