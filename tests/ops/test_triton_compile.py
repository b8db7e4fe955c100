"""Every Triton kernel compiles ahead of time, without spilling, for the GPUs it is meant for. Needs no GPU."""

import os
import re
import subprocess

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets kernels", allow_module_level=True)

from benchmarks.kernels.resources import ARCHITECTURES, TYPES, compile_kernel, resources, rows, tool, variants


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills(architecture, dtype, tmp_path):
    for kernel, constants, num_warps in variants(dtype):
        compiled = compile_kernel(kernel, constants, num_warps, dtype, architecture)
        usage = resources(compiled.asm["cubin"], tmp_path)
        where = f"{kernel.__name__} {constants} sm_{architecture} {dtype}: {usage}"
        assert usage["REG"] <= 255, where
        assert usage["LOCAL"] == 0, where
        assert compiled.metadata.shared <= 99 * 1024, where  # the least an sm_80 to sm_100 block can have
        assert usage["STACK"] == 0, where


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scatter", [False, True])
def test_rows_move_sixteen_bytes_at_a_time(dtype, scatter, tmp_path):
    constants = {"SCATTER": scatter, "BLOCK_R": 8, "BLOCK_D": 256}
    compiled = compile_kernel(rows.split_kernel, constants, 4, dtype, 90)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    sass = subprocess.run([tool("nvdisasm"), "-c", path], capture_output=True, text=True, check=True).stdout
    stores = re.findall(r"STG\.[\w.]+", sass)
    assert stores
    assert all(".128" in store for store in stores), stores
    assert any(".128" in load for load in re.findall(r"LDG\.[\w.]+", sass))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_the_residual_move_sixteen_bytes_at_a_time(dtype, tmp_path):
    for kernel, constants, num_warps in variants(dtype):
        if kernel.__name__ != "add_norm_kernel":
            continue
        compiled = compile_kernel(kernel, constants, num_warps, dtype, 90)
        path = tmp_path / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        sass = subprocess.run([tool("nvdisasm"), "-c", path], capture_output=True, text=True, check=True).stdout
        stores, loads = re.findall(r"STG\.[\w.]+", sass), re.findall(r"LDG\.[\w.]+", sass)
        assert stores and all(".128" in store for store in stores), (constants, stores)
        assert sum(".128" in load for load in loads) >= len(stores), (constants, loads)
