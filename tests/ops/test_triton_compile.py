"""Every Triton kernel compiles ahead of time for the GPUs it is meant for, and what is compiled passes the lint.

What the op tests launch is looked at in their own runs (backend "compiled"), here what models of known widths launch.
"""

import importlib
import os
import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets kernels", allow_module_level=True)

from helpers.cases import legal_call, odd_layouts
from helpers.compiled import compiled_op

from benchmarks.kernels.launches import (
    ARCHITECTURES,
    WIDTHS,
    compile_launches,
    launcher,
    launches,
    recording,
)
from benchmarks.kernels.lint import narrow_rows, problems, resources, sum_order
from cropr_kernels.ops.registration import FILES
from cropr_kernels.ops.triton.residual import row_blocks

# Types, widths and sides of the grid of patches: 577 tokens, whose keys fit registers, and 9217, whose keys do not.
KNOWN = [
    *(("bfloat16", width, 24) for width in WIDTHS),
    *(("float32", width, 24) for width in (192, 1024)),
    ("float16", 768, 24),
    ("float64", 768, 24),
    ("bfloat16", 768, 96),
]

# Bytes of stack a thread that are worth no mending.
STACK = {("weighted_rows_kernel", 120): 8}


def verify(dtype, width, side, architecture):
    for launch, compiled in compile_launches(launches(dtype, [width], [side]), architecture):
        found = problems(launch, compiled) + narrow_rows(launch, compiled)
        assert not found, f"{launch} {dtype} sm_{architecture}: {found}"
        usage = resources(compiled)
        where = f"{launch} {dtype} sm_{architecture}: {usage}"
        assert usage["LOCAL"] == 0, where
        assert usage["STACK"] <= STACK.get((launch.kernel.__name__, architecture), 0), where


def test_every_kernel_is_among_the_launches():
    modules = [importlib.import_module(f"cropr_kernels.ops.triton.{file}") for file in set(FILES.values())]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {launch.kernel.__name__ for launch in launches("bfloat16", [384], [14])} == kernels


@pytest.mark.parametrize(("dtype", "width", "side"), KNOWN)
def test_kernels_of_known_widths_pass_the_lint_and_keep_all_in_registers(dtype, width, side):
    verify(dtype, width, side, 90)


@pytest.mark.parametrize(
    ("architecture", "dtype", "width"),
    [
        *((architecture, "bfloat16", 384) for architecture in ARCHITECTURES if architecture != 90),
        *((architecture, "float32", 1024) for architecture in (80, 120)),
    ],
)
def test_they_do_so_on_every_architecture(architecture, dtype, width):
    verify(dtype, width, 24, architecture)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("width", [272, 528, 1040])
@pytest.mark.parametrize("op", ["add_norm_", "add_select_"])
def test_narrow_second_blocks_are_not_shared_by_threads(op, width, dtype):
    compiled_op(op)(**legal_call(op, dtype, N=197, K=197, D=width))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_warps", [4, 8, 16])
def test_tiles_of_rows_have_an_element_for_every_thread(dtype, num_warps):
    for dim in range(1, 4200):
        blocks = row_blocks(dim, num_warps, dtype)
        assert blocks.first + blocks.rest >= dim
        for width in filter(None, (blocks.first, blocks.rest)):
            assert blocks.rows * width >= 32 * num_warps, (dim, blocks)


def orders(op, call):
    """By kernel, the orders in which its floats are summed."""
    with recording() as found:
        launcher(op)(**call)
    return {launch.kernel.__name__: sum_order(compiled) for launch, compiled in compile_launches(found, 90)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [96, 384])
def test_scores_are_summed_in_one_order_with_selection_and_without(width, dtype):
    call = legal_call("prune", dtype, N=197, D=width, M=1)
    alone = orders("scores", {"x": call["x"], "query": call["query"]})
    assert alone["scores_kernel"] and alone["scores_kernel"] == orders("prune", call)["scores_kernel"]


# Ops whose sums follow the alignment of x.
FOLLOWS = pytest.mark.xfail(strict=True, raises=AssertionError, reason="the layout of a tile follows the alignment")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "op",
    [
        *(pytest.param(op, marks=FOLLOWS) for op in ("scores", "prune")),
        *("gather_norm", "add_norm_", "add_select_", "merge", "merge_"),
    ],
)
def test_every_layout_is_summed_in_one_order(op, dtype):
    call = legal_call(op, dtype, N=50, D=96, K=30, S=30, C=20)
    plain = orders(op, call)
    assert any(plain.values())
    for name, view in odd_layouts(call["x"]).items():
        if view.is_contiguous() or not op.endswith("_"):
            assert orders(op, call | {"x": view}) == plain, name


@pytest.mark.parametrize(
    ("part", "old", "new", "said"),
    [
        ("ptx", r"bar\.sync\s+0;(?=[^;]*(;[^;]*){0,12}atom\.global)", "", "barrier on both sides"),
        ("ptx", r"(atom\.global.*\n(?s:.*?))bar\.sync\s+0;", r"\1", "barrier on both sides"),
        ("ptx", "gpu.acq_rel", "gpu.relaxed", "without acquire and release"),
        ("ptx", r"ld\.global\.v4", "ld.global.nc.v4", "coherent"),
        ("ttgir", r"( *%\w+ = )(tt\.load %x_\w+, .*)", r"\1\2\n%again = \2", "have become"),
    ],
)
def test_the_lint_sees_what_it_is_for(part, old, new, said):
    with recording() as found:
        launcher("add_select_")(**legal_call("add_select_", torch.float16, N=50, K=50, D=384))
    [(launch, compiled)] = compile_launches(found, 90)
    assert not problems(launch, compiled)
    text = re.sub(old, new, compiled.asm[part])
    assert text != compiled.asm[part]
    planted = SimpleNamespace(asm=compiled.asm | {part: text}, metadata=compiled.metadata)
    assert any(said in problem for problem in problems(launch, planted)), problems(launch, planted)
