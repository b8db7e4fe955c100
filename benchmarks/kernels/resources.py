"""Registers, shared memory and spills of every Triton kernel, compiled ahead of time. Needs no GPU.

python -m benchmarks.kernels.resources [--arch 90] [--dtype bfloat16]
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cropr_kernels.ops.reference import accumulation_dtype
from cropr_kernels.ops.triton import attend, merge, residual, scores, select
from cropr_kernels.ops.triton import prune as rows
from cropr_kernels.ops.triton.utils import PINNED, registers, triton_accumulator

ARCHITECTURES = [80, 90, 100]
TYPES = {"float32": "*fp32", "float64": "*fp64", "bfloat16": "*bf16", "float16": "*fp16"}
# Arguments that are multiples of 16 in every real model: pointers, widths and strides.
ALIGNED = re.compile(r"_ptr$|^dim$|^stride_")


def absent(*names: str) -> dict[str, None]:
    """Optional pointers that a launch leaves out."""
    return {f"{name}_ptr": None for name in names}


PRIORITIES: list[dict[str, Any]] = [{}, absent("priority")]


def variants(dtype: str) -> Iterator[tuple[Any, dict[str, Any], int]]:
    """(kernel, constants, num_warps) in the shapes the launchers choose for D = 768 and D = 1536."""
    tiles = attend.matrix_tiles(getattr(torch, dtype))
    edge, inner, warps = tiles["edge"], tiles["inner"], tiles["num_warps"]
    torch_dtype = getattr(torch, dtype)
    for n in (20, 197, 1025, 4096, 9216):
        for priority in PRIORITIES:
            constants, num_warps = select.select_blocks(n, torch_dtype)
            yield select.select_kernel, constants | priority, num_warps
            constants, num_warps = select.select_blocks(n, torch.float32, embedded=True)
            num_warps = max(num_warps, 4)
            constants |= scores.row_blocks(768, num_warps, torch_dtype)
            yield scores.scores_kernel, constants | priority, num_warps
        yield scores.scores_kernel, constants | absent("counters", "kept_idx", "pruned_idx", "priority"), num_warps
    acc = triton_accumulator(torch_dtype)
    for dim in (768, 1536):
        blocks = {"ACC": acc} | residual.row_blocks(dim, 4, torch_dtype)
        for missing in ((), ("update", "gamma"), ("weight", "bias", "out")):
            yield residual.add_norm_kernel, blocks | absent(*missing), 4
        for n in (197, 9216) if dim == 768 else (1025,):
            constants, num_warps = select.select_blocks(n, torch.float32, embedded=True)
            num_warps = max(num_warps, 4)
            constants |= {"ACC": acc} | residual.row_blocks(dim, num_warps, torch_dtype)
            for sizes in ({}, absent("sizes")):
                for priority in PRIORITIES:
                    yield residual.add_select_kernel, constants | sizes | priority, num_warps
    for half in (False, True):
        yield residual.rotate_kernel, {"HALF": half, "BLOCK_H": 32, "BLOCK_W": 64, "ACC": acc}, 4
    for in_place in (False, True):
        yield merge.targets_kernel, {"IN_PLACE": in_place, **merge.target_blocks(torch_dtype), "ACC": acc}, 4
        columns = 1024 // accumulation_dtype(torch_dtype).itemsize
        yield (
            merge.means_kernel,
            {"IN_PLACE": in_place, "BLOCK_R": merge.means_rows(torch_dtype), "BLOCK_D": columns, "ACC": acc},
            4,
        )
    yield rows.gather_kernel, {"BLOCK_R": 8, "BLOCK_D": 256}, 4
    for flag in (False, True):
        yield rows.split_kernel, {"SCATTER": flag, "BLOCK_R": 8, "BLOCK_D": 256}, 4
        one = {"SCALE": 0.03, "BLOCK_N": attend.one_query_rows(torch_dtype), "BLOCK_D": 2048}
        yield attend.attend_one_kernel, one | absent("raw" if flag else "grad"), 8
        yield attend.softmax_kernel, {"BLOCK_N": 1024} | ({} if flag else absent("slope")), 4
        yield (
            attend.weighted_rows_kernel,
            {"SUM_BATCH": flag, "BLOCK_M": edge, "BLOCK_D": edge, "BLOCK_K": inner},
            warps,
        )
    yield attend.rows_dot_rows_kernel, {"BLOCK_M": edge, "BLOCK_N": edge, "BLOCK_K": inner}, warps


WITH_BUDGET = (scores.scores_kernel, residual.add_norm_kernel, residual.add_select_kernel)


def signature(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    acc = "*fp64" if dtype == "float64" else "*fp32"
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("idx_ptr"):
            types[name] = "*i64"
        elif name in ("sizes_ptr", "kept_sizes_ptr"):
            types[name] = "*fp32"
        elif name in ("partial_ptr", "similarity_ptr"):
            types[name] = acc
        elif name in ("counters_ptr", "is_pruned_ptr"):
            types[name] = "*i32"
        elif name == "priority_ptr":
            types[name] = "*i8"
        elif name == "raw_ptr":
            types[name] = "*fp32"
        elif name in ("eps", "size_weight"):
            types[name] = "fp32"
        elif name in ("query_ptr", "logits_ptr", "slope_ptr") or (
            name == "weight_ptr" and kernel is attend.weighted_rows_kernel
        ):
            types[name] = acc
        elif name == "table_ptr" or (kernel is not select.select_kernel and name == "scores_ptr"):
            types[name] = "*fp32"
        elif name == "out_ptr" and (
            kernel is attend.rows_dot_rows_kernel
            or constants.get("SUM_BATCH")
            or (kernel is attend.attend_one_kernel and "grad_ptr" not in constants)
        ):
            types[name] = acc
        elif name.endswith("_ptr"):
            types[name] = TYPES[dtype]
        else:
            types[name] = "i32"
    return types


def compile_kernel(kernel: Any, constants: dict[str, Any], num_warps: int, dtype: str, architecture: int) -> Any:
    types = signature(kernel, dtype, constants)
    names = kernel.arg_names
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind != "constexpr" and ALIGNED.search(name)
    }
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()}, aligned)
    budget = registers(num_warps) if kernel in WITH_BUDGET else {}
    budget = merge.target_registers(getattr(torch, dtype)) if kernel is merge.targets_kernel else budget
    options = {"num_warps": num_warps, **budget, **PINNED}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


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
            for kernel, constants, num_warps in variants(options.dtype):
                compiled = compile_kernel(kernel, constants, num_warps, options.dtype, architecture)
                usage = resources(compiled.asm["cubin"], Path(folder))
                shown = " ".join(f"{name}={value}" for name, value in constants.items() if value is not False)
                print(
                    f"{kernel.__name__:24}{architecture:>4}{num_warps:>6}{usage['REG']:>10}"
                    f"{compiled.metadata.shared:>8}{usage['STACK']:>6}  {shown}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
