"""Every Triton kernel compiles ahead of time, without spilling, for the GPUs it is meant for. Needs no GPU."""

import importlib
import os
import re
import subprocess

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets kernels", allow_module_level=True)

from benchmarks.kernels.resources import ARCHITECTURES, TYPES, compile_launches, constants, launches, resources, tool
from cropr_kernels.ops.registration import FILES


def test_every_kernel_is_among_the_launches():
    modules = [importlib.import_module(f"cropr_kernels.ops.triton.{file}") for file in set(FILES.values())]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {launch.kernel.__name__ for launch in launches("bfloat16")} == kernels


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills(architecture, dtype, tmp_path):
    for launch, compiled in compile_launches(launches(dtype), architecture):
        usage = resources(compiled.asm["cubin"], tmp_path)
        where = f"{launch.kernel.__name__} {constants(launch)} sm_{architecture} {dtype}: {usage}"
        assert usage["REG"] <= 255, where
        assert usage["LOCAL"] == 0, where
        assert compiled.metadata.shared <= 99 * 1024, where  # the least an sm_80 to sm_100 block can have
        assert usage["STACK"] == 0, where


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", ["split_kernel", "gather_kernel", "add_norm_kernel"])
def test_rows_move_sixteen_bytes_at_a_time(kernel, dtype, tmp_path):
    chosen = [launch for launch in launches(dtype) if launch.kernel.__name__ == kernel]
    for launch, compiled in compile_launches(chosen, 90):
        path = tmp_path / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        sass = subprocess.run([tool("nvdisasm"), "-c", path], capture_output=True, text=True, check=True).stdout
        stores, loads = re.findall(r"STG\.[\w.]+", sass), re.findall(r"LDG\.[\w.]+", sass)
        assert stores and all(".128" in store for store in stores), (constants(launch), stores)
        assert any(".128" in load for load in loads), (constants(launch), loads)
        if kernel == "add_norm_kernel":
            assert sum(".128" in load for load in loads) >= len(stores), (constants(launch), loads)
