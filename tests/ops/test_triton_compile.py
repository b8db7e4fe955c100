"""Every Triton kernel compiles ahead of time, without spilling, for the GPUs it is meant for. Needs no GPU."""

import importlib
import math
import os
import re
import subprocess

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets kernels", allow_module_level=True)

from benchmarks.kernels.resources import ARCHITECTURES, TYPES, compile_launches, constants, launches, resources, tool
from cropr_kernels.ops.registration import FILES
from cropr_kernels.ops.triton.residual import row_blocks


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
def test_no_two_threads_hold_one_element_of_a_row_that_changes_in_place(dtype):
    """Both load it, one stores it: one that loads late would add the update to what has it already."""
    found = launches(dtype, [(50, 64), (197, 272), (197, 528), (197, 1040)])
    changing = [
        one for one in found if one.kernel.__name__ in ("add_norm_kernel", "add_select_kernel", "rotate_kernel")
    ]
    for launch, compiled in compile_launches(changing, 90):
        code = compiled.asm["ttgir"]
        layouts = dict(re.findall(r"(#blocked\d*) = #ttg.blocked<(.*)>", code))
        stores = re.findall(r"tt\.store .*tensor<(\d+)x(\d+)x!tt\.ptr<\w+>, (#blocked\d*)>", code)
        assert stores, launch.kernel.__name__
        for rows, cols, layout in stores:
            parts = re.findall(r"(?:threadsPerWarp|warpsPerCTA) = \[(\d+), (\d+)\]", layouts[layout])
            threads = math.prod(int(number) for part in parts for number in part)
            assert int(rows) * int(cols) >= threads == 32 * launch.options["num_warps"], (launch, rows, cols)


@pytest.mark.parametrize("dim", [96, 768])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_layout_orders_the_sums_of_merge(dtype, dim):
    """A reduction adds up in the order of its layout, which follows the alignment of what is loaded."""
    aligned = [one for one in launches(dtype, [(197, dim)]) if one.kernel.__module__.endswith(".merge")]
    odd = torch.empty(9, dtype=getattr(torch, dtype))[1:]
    unaligned = [one._replace(args=(one.args[0]._replace(ptr=odd), *one.args[1:])) for one in aligned]
    instructions = {}
    for some in (aligned, unaligned):
        for launch, compiled in compile_launches(some, 90):
            code = compiled.asm["ttgir"]
            for reduction in re.findall(r'"tt\.(?:reduce|scan)".*?tt\.(?:reduce|scan)\.return', code, re.DOTALL):
                assert "addf" not in reduction, (launch.kernel.__name__, constants(launch), reduction)
            layouts = instructions.setdefault((launch.kernel.__name__, str(constants(launch))), [])
            layouts.append(re.findall(r"#mma\d* = .*|tt\.dot|ttng\.warp_group_dot ", code))
    assert {name for name, _ in instructions} == {"targets_kernel", "means_kernel"}
    for name, layouts in instructions.items():
        assert len(layouts) == 2 and layouts[0] == layouts[1], name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_warps", [4, 8, 16])
def test_tiles_of_rows_have_an_element_for_every_thread(dtype, num_warps):
    for dim in range(1, 4200):
        blocks = row_blocks(dim, num_warps, dtype)
        assert blocks.first + blocks.rest >= dim
        for width in filter(None, (blocks.first, blocks.rest)):
            assert blocks.rows * width >= 32 * num_warps, (dim, blocks)


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
