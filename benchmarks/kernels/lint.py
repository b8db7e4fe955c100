"""Checks of compiled kernels by their TTGIR and PTX, for faults that no interpreter shows."""

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils._pytree import tree_leaves

from benchmarks.kernels.launches import Launch

_SHARED_KIB = {80: 163, 90: 227, 100: 227}  # limit of a block by architecture; 99 for others
_MOVES_ROWS = (
    "split_kernel",
    "gather_kernel",
    "scores_kernel",
    "attend_one_kernel",
    "add_norm_kernel",
    "add_select_kernel",
    "rotate_kernel",
)


def cuda_tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def resources(compiled: Any) -> dict[str, int]:
    """Registers and stack of a thread, shared memory of a block, as reported by the assembler."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [cuda_tool("cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def blocks_a_processor(compiled: Any, usage: dict[str, int]) -> int:
    """Programs that fit a streaming multiprocessor, by registers, threads and shared memory."""
    architecture = compiled.metadata.target.arch
    threads = 32 * compiled.metadata.num_warps
    registers = -(-usage["REG"] // 8) * 8 * threads
    memory = (_SHARED_KIB.get(architecture, 99) + 1) << 10
    max_threads = 2048 if architecture in _SHARED_KIB else 1536
    return min(
        (1 << 16) // registers,
        max_threads // threads,
        memory // (compiled.metadata.shared + 1024),
        32,
    )


def problems(launch: Launch, compiled: Any) -> list[str]:
    """Faults of a kernel that do not depend on its inputs."""
    ptx = compiled.asm["ptx"]
    threads = 32 * compiled.metadata.num_warps
    messages = [*_counter_problems(ptx), *_in_place_problems(launch, compiled)]
    if "ld.global.nc" in ptx:
        messages.append("it reads past the coherent caches")
    if "tf32" in ptx:
        messages.append("it rounds float32 to TF32")
    limit = _SHARED_KIB.get(compiled.metadata.target.arch, 99)
    if compiled.metadata.shared > limit << 10:
        messages.append(
            f"{compiled.metadata.shared} bytes of shared memory, a block may have {limit} KiB"
        )
    usage = resources(compiled)
    if usage["REG"] * threads > 1 << 16:
        messages.append(f"{threads} threads of {usage['REG']} registers do not fit a processor")
    return messages


def _counter_problems(ptx: str) -> list[str]:
    """A counter of finished programs must publish all stores before any thread continues."""
    events = re.findall(
        r"\b(bar\.sync|atom\.[\w.:]+|red\.[\w.:]+|(?:ld|st)\.global[\w.:]*|cp\.async\.c[\w.]+)", ptx
    )
    messages = []
    for i, event in enumerate(events):
        if event.startswith(("atom", "red")) and ".add.u32" in event:
            if event != "atom.global.gpu.acq_rel.add.u32":
                messages.append(f"a counter without acquire and release for the whole GPU: {event}")
            if events[i - 1 : i + 2 : 2] != ["bar.sync"] * 2:
                messages.append(
                    f"a counter without a barrier on both sides: {events[max(i - 1, 0) : i + 2]}"
                )
    return messages


def _in_place_problems(launch: Launch, compiled: Any) -> list[str]:
    """Memory that changes in place must be loaded once, before any thread stores it.

    If a tile has fewer elements than the program has threads, several warps hold each element: one
    may load it late, after another has stored it.
    """
    code = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", code, re.M))
    accesses = list(_accesses(launch, code))
    messages = []
    in_place: set[Any] = set()
    pending: set[tuple[Any, bool]] = set()
    for access, memory, pointer_type in accesses:
        if access == "barrier":
            pending = set()
        elif access == "load":
            pending.add((memory, _one_thread_each(pointer_type, layouts)))
        else:
            in_place |= {memory} & {loaded for loaded, _ in pending}
            if (memory, False) in pending and compiled.metadata.num_warps > 1:
                messages.append(
                    "no barrier between a load by several warps and the store through "
                    f"{pointer_type}"
                )
    stages = (_accesses(launch, compiled.asm["ttir"]), accesses)
    before, after = (
        sum(access == "load" and memory in in_place for access, memory, _ in stage)
        for stage in stages
    )
    if before != after:
        messages.append(f"{before} loads of memory that changes in place have become {after}")
    return messages


def _accesses(launch: Launch, code: str) -> Iterator[tuple[str, Any, str]]:
    """Yield loads, stores and barriers in order: (kind, memory, pointer type).

    Views of one tensor share its memory.
    """
    header = code[code.index("tt.func public") :].split("\n", 1)[0]
    tensors = [leaf for leaf in tree_leaves(launch.args) if isinstance(leaf, torch.Tensor)]
    memory = {
        name: tensor.untyped_storage()._cdata
        for name, tensor in zip(re.findall(r"(%[\w.]+): !tt\.ptr", header), tensors, strict=True)
    }
    for line in code.splitlines():
        for name, origin in re.findall(r"(%[\w.]+) = (?:tt\.\w+ |ttg\.\w+ )?(%[\w.]+)", line):
            # A pointer derives from the first operand of its definition
            memory[name] = memory.get(origin)
        access = re.search(r"tt\.(load|store) (%[\w.]+).* : (.*?)(?: loc|$)", line)
        if access:
            yield access[1], memory[access[2]], access[3]
        elif re.search(r"\bbarrier\b|tt\.atomic_rmw", line):
            yield "barrier", None, ""


def _one_thread_each(type: str, layouts: dict[str, str]) -> bool:
    """True if each element of a tensor of pointers belongs to one thread.

    Args:
        type: as in TTGIR, `tensor<8x256x!tt.ptr<bf16>, #blocked>`.
    """
    tensor = re.fullmatch(r"tensor<([\dx]+)x!tt\.ptr<\w+>, (#\w+)>", type)
    parts = dict(re.findall(r"(\w+) = \[([\d, ]+)\]", layouts[tensor[2]])) if tensor else {}
    if not parts.keys() >= {"sizePerThread", "threadsPerWarp", "warpsPerCTA"}:
        return False  # a scalar, or a layout that repeats along the dimension it is a slice of
    names = ("sizePerThread", "threadsPerWarp", "warpsPerCTA")
    per_thread, lanes, warps = (map(int, parts[name].split(",")) for name in names)
    shape = map(int, tensor[1].split("x"))
    return all(
        math.prod(factors) <= size for size, *factors in zip(shape, per_thread, lanes, warps)
    )


def narrow_rows(launch: Launch, compiled: Any) -> list[str]:
    """Accesses narrower than possible, of a kernel whose rows are multiples of 16 bytes.

    A thread should access 16 bytes at a time, or less if a tile has less for each thread.
    """
    if launch.kernel.__name__ not in _MOVES_ROWS:
        return []
    missing: Counter[tuple[str, int]] = Counter()
    ptx = compiled.asm["ptx"]
    tiles = re.findall(
        r"tt\.(load|store) %.* : tensor<(\d+x\d+)x!tt\.ptr<[a-z]+(\d+)>", compiled.asm["ttgir"]
    )
    for access, shape, bits in tiles:
        size = (
            math.prod(map(int, shape.split("x")))
            * int(bits)
            // 8
            // (32 * compiled.metadata.num_warps)
        )
        missing[access, min(size, 16)] += max(size // 16, 1)
    for access, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.c\w)?(?:\.v(\d))?\.b(\d+)", ptx):
        missing[{"ld": "load", "st": "store"}[access], int(vector or 1) * int(bits) // 8] -= 1
    return [
        f"{count} times no {access} of {size} bytes"
        for (access, size), count in missing.items()
        if count > 0
    ]


def sum_order(compiled: Any) -> list[str]:
    """Layouts of all sums and products of floats: they decide the order of the terms."""
    code = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", code, re.M))
    sums = re.findall(
        r'"tt\.reduce"\(.*?<\{(.*?)\}>(?:.*\n){2} .*arith\.addf(?:.*\n){2} *\}\) : \((.*?)\) ->',
        code,
    )
    dots = re.findall(r"(tt\.dot|ttng\.warp_group_dot) .* -> (tensor<.*?>)(?: loc|$)", code, re.M)
    return [
        re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), " ".join(names))
        for names in sums + dots
    ]
