"""What must hold in every compiled kernel, read from its TTGIR and PTX, that no interpreter shows."""

import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils._pytree import tree_leaves

from .launches import Launch

_SHARED_KIB = {80: 163, 90: 227, 100: 227}  # that a block may have; elsewhere 99
_MOVES_ROWS = ("split_kernel", "gather_kernel", "add_norm_kernel")
_READS_ROWS = (*_MOVES_ROWS, "scores_kernel", "add_select_kernel", "attend_one_kernel")


def tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def resources(compiled: Any) -> dict[str, int]:
    """Registers and stack of a thread, and shared memory of a block in bytes, as the assembler reports them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool("cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def problems(launch: Launch, compiled: Any) -> list[str]:
    """What is wrong with a kernel, whatever its inputs."""
    ptx, threads = compiled.asm["ptx"], 32 * compiled.metadata.num_warps
    found = [*_counter_problems(ptx), *_in_place_problems(launch, compiled)]
    if "ld.global.nc" in ptx:
        found.append("it reads past the coherent caches")
    if "tf32" in ptx:
        found.append("it rounds float32 to TF32")
    limit = _SHARED_KIB.get(compiled.metadata.target.arch, 99)
    if compiled.metadata.shared > limit << 10:
        found.append(f"{compiled.metadata.shared} bytes of shared memory, a block may have {limit} KiB")
    usage = resources(compiled)
    if usage["REG"] * threads > 1 << 16:
        found.append(f"{threads} threads of {usage['REG']} registers do not fit a processor")
    return found


def _counter_problems(ptx: str) -> list[str]:
    """A count of finished programs publishes what all threads stored, and no thread goes on before it is known."""
    events = re.findall(r"\b(bar\.sync|atom\.[\w.:]+|red\.[\w.:]+|(?:ld|st)\.global[\w.:]*|cp\.async\.c[\w.]+)", ptx)
    found = []
    for i, event in enumerate(events):
        if event.startswith(("atom", "red")) and ".add.u32" in event:
            if event != "atom.global.gpu.acq_rel.add.u32":
                found.append(f"a counter without acquire and release for the whole GPU: {event}")
            if events[i - 1 : i + 2 : 2] != ["bar.sync"] * 2:
                found.append(f"a counter without a barrier on both sides: {events[max(i - 1, 0) : i + 2]}")
    return found


def _in_place_problems(launch: Launch, compiled: Any) -> list[str]:
    """What is stored where it was loaded from is loaded once, before any thread stores it.

    Where a tile has fewer elements than the program has threads, several warps hold each: one may load it late, when
    another has stored it.
    """
    code = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", code, re.M))
    accesses = list(_accesses(launch, code))
    found, in_place, pending = [], set(), set()
    for kind, memory, where in accesses:
        if kind == "barrier":
            pending = set()
        elif kind == "load":
            pending.add((memory, _one_thread_each(where, layouts)))
        else:
            in_place |= {memory} & {loaded for loaded, _ in pending}
            if (memory, False) in pending and compiled.metadata.num_warps > 1:
                found.append(f"no barrier between a load by several warps and the store through {where}")
    before, after = (
        sum(kind == "load" and memory in in_place for kind, memory, _ in some)
        for some in (_accesses(launch, compiled.asm["ttir"]), accesses)
    )
    if before != after:
        found.append(f"{before} loads of what changes in place have become {after}")
    return found


def _accesses(launch: Launch, code: str) -> Iterator[tuple[str, Any, str]]:
    """Loads, stores and barriers in order: memory, shared by arguments that are views of one another; pointer type."""
    header = code[code.index("tt.func public") :].split("\n", 1)[0]
    tensors = [leaf for leaf in tree_leaves(launch.args) if isinstance(leaf, torch.Tensor)]
    memory = {
        name: tensor.untyped_storage()._cdata
        for name, tensor in zip(re.findall(r"(%[\w.]+): !tt\.ptr", header), tensors, strict=True)
    }
    for line in code.splitlines():
        for name, origin in re.findall(r"(%[\w.]+) = (?:tt\.\w+ |ttg\.\w+ )?(%[\w.]+)", line):
            memory[name] = memory.get(origin)  # a pointer comes from the first operand of what defines it
        access = re.search(r"tt\.(load|store) (%[\w.]+).* : (.*?)(?: loc|$)", line)
        if access:
            yield access[1], memory[access[2]], access[3]
        elif re.search(r"\bbarrier\b|tt\.atomic_rmw", line):
            yield "barrier", None, ""


def _one_thread_each(type: str, layouts: dict[str, str]) -> bool:
    """Whether no two threads hold one element of a tensor of pointers: `tensor<8x256x!tt.ptr<bf16>, #blocked>`."""
    tensor = re.fullmatch(r"tensor<([\dx]+)x!tt\.ptr<\w+>, (#\w+)>", type)
    parts = dict(re.findall(r"(\w+) = \[([\d, ]+)\]", layouts[tensor[2]])) if tensor else {}
    if not parts.keys() >= {"sizePerThread", "threadsPerWarp", "warpsPerCTA"}:
        return False  # a scalar, or a layout that repeats along what it is a slice of
    per_thread, lanes, warps = (
        map(int, parts[name].split(",")) for name in ("sizePerThread", "threadsPerWarp", "warpsPerCTA")
    )
    shape = map(int, tensor[1].split("x"))
    return all(math.prod(factors) <= size for size, *factors in zip(shape, per_thread, lanes, warps))


def narrow_rows(launch: Launch, compiled: Any) -> list[str]:
    """What is wrong with a kernel whose rows are a multiple of 16 bytes: they move 16 bytes at a time."""
    accesses = re.findall(r"\b(ld|st)\.global(?:\.\w+)*?((?:\.v\d)?)\.b(\d+)", compiled.asm["ptx"])
    widths = [(kind, int(vector[2:] or 1) * int(bits) // 8) for kind, vector, bits in accesses]
    wide = {kind: sum(width == 16 for one, width in widths if one == kind) for kind in ("ld", "st")}
    name, found = launch.kernel.__name__, []
    if name in _READS_ROWS and wide["ld"] < max(wide["st"], 1):
        found.append(f"rows are loaded in pieces: {widths}")
    if name in _MOVES_ROWS and any(width < 16 for kind, width in widths if kind == "st"):
        found.append(f"rows are stored in pieces: {widths}")
    if name == "add_select_kernel" and not wide["st"]:
        found.append(f"rows are stored in pieces: {widths}")
    return found


def sum_order(compiled: Any) -> list[str]:
    """The layouts of all sums and products of floats, in which the order of their terms is decided."""
    code = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", code, re.M))
    sums = re.findall(r'"tt\.reduce"\(.*?<\{(.*?)\}>(?:.*\n){2} .*arith\.addf(?:.*\n){2} *\}\) : \((.*?)\) ->', code)
    dots = re.findall(r"(tt\.dot|ttng\.warp_group_dot) .* -> (tensor<.*?>)(?: loc|$)", code, re.M)
    return [re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), f"{how} {type}") for how, type in sums + dots]
