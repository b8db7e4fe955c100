"""Every Triton kernel compiles ahead of time for its GPUs, and the result passes the lint.

Here the launches of models of known widths; those of the op tests are checked by their backend
"compiled".
"""

import os
import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets kernels", allow_module_level=True)

from helpers.cases import DTYPES, legal_call, odd_layouts
from helpers.compiled import compiled_op

from benchmarks.kernels.launches import (
    ARCHITECTURES,
    WIDTHS,
    compile_launches,
    kernels,
    launcher,
    launches,
    recording,
)
from benchmarks.kernels.lint import narrow_rows, problems, resources, sum_order
from cropr_kernels.ops.triton.utils import STREAM, row_blocks

# Types, widths and sides of the grid of patches: 577 tokens, whose keys fit registers, and 9217,
# whose keys do not.
KNOWN = [
    *(("bfloat16", width, 24) for width in WIDTHS),
    *(("float32", width, 24) for width in (192, 1024)),
    ("float16", 768, 24),
    ("float64", 768, 24),
    ("bfloat16", 768, 96),
]

# All variants of a kernel where it needs most registers, with a row in two blocks or in one;
# elsewhere those with most tensors.
ALL_VARIANTS = [("bfloat16", 768, 24), ("bfloat16", 1024, 24), ("float32", 1024, 24)]

# Tolerated bytes of stack a thread, by kernel and architecture.
STACK = {("weighted_rows_kernel", 120): 8}


def largest_variants(recorded):
    """Leave out launches whose tensors are all among those of another with the same constants."""
    variants = {(str(launch), indices_of_tensors(launch)): launch for launch in recorded}
    return [
        launch
        for (constants, tensors), launch in variants.items()
        if not any(constants == other and tensors < more for other, more in variants)
    ]


def indices_of_tensors(launch):
    leaves = enumerate(tree_leaves(launch.args))
    return frozenset(index for index, leaf in leaves if isinstance(leaf, torch.Tensor))


def verify(dtype, width, side, architecture, *, all_variants=False):
    recorded = launches(dtype, [width], [side])
    if not all_variants:
        recorded = largest_variants(recorded)
    for launch, compiled in compile_launches(recorded, architecture):
        faults = problems(launch, compiled) + narrow_rows(launch, compiled)
        assert not faults, f"{launch} {dtype} sm_{architecture}: {faults}"
        usage = resources(compiled)
        message = f"{launch} {dtype} sm_{architecture}: {usage}"
        assert usage["LOCAL"] == 0, message
        assert usage["STACK"] <= STACK.get((launch.kernel.__name__, architecture), 0), message


def test_every_kernel_is_among_the_launches():
    names = {name for name in kernels() if name.endswith("_kernel")}
    assert {launch.kernel.__name__ for launch in launches("bfloat16", [384], [14])} == names


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "width", "side"), KNOWN)
def test_kernels_of_known_widths_pass_the_lint_and_keep_all_in_registers(dtype, width, side):
    verify(dtype, width, side, 90, all_variants=(dtype, width, side) in ALL_VARIANTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "dtype", "width"),
    [
        *((architecture, "bfloat16", 384) for architecture in ARCHITECTURES if architecture != 90),
        *((architecture, "float32", 1024) for architecture in (80, 120)),
    ],
)
def test_kernels_pass_the_lint_on_every_architecture(architecture, dtype, width):
    verify(dtype, width, 24, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float64])
@pytest.mark.parametrize("width", [16, 32, 48, 72, 80, 88, 128, 256])
def test_heads_of_known_widths_attend_in_registers(width, dtype):
    args = legal_call("attend_segments", dtype, T=400, C=width)
    for call in (args, args | {"log_sizes": None}):
        with recording() as recorded:
            launcher("attend_segments")(**call)
        for launch, compiled in compile_launches(recorded, 90):
            faults, usage = problems(launch, compiled), resources(compiled)
            assert not faults and usage["LOCAL"] == usage["STACK"] == 0, f"{launch}: {usage}"


@pytest.mark.each_choice
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("width", [272, 528, 1040])
@pytest.mark.parametrize("op", ["add_norm_", "add_select_", "ragged_add_select_"])
def test_narrow_second_blocks_are_not_shared_by_threads(op, width, dtype):
    compiled_op(op)(**legal_call(op, dtype, N=197, K=197, D=width))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_tiles_of_rows_have_an_element_for_every_thread(dtype):
    for dim in range(1, 4200):
        blocks = row_blocks(dim, dtype)
        assert blocks.first + blocks.rest >= dim
        for width in filter(None, (blocks.first, blocks.rest)):
            assert blocks.rows * width >= 32 * STREAM["num_warps"], (dim, blocks)


def orders(op, call):
    """Return the order in which each kernel sums its floats."""
    with recording() as recorded:
        launcher(op)(**call)
    return {
        launch.kernel.__name__: sum_order(compiled)
        for launch, compiled in compile_launches(recorded, 90, layouts_only=True)
    }


@pytest.mark.each_choice
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [96, 384, 1024])
def test_scores_are_summed_in_one_order_by_every_op_and_for_any_number_of_tokens(width, dtype):
    call = legal_call("prune", dtype, N=50, D=width, M=1)
    alone = orders("scores", {"x": call["x"], "query": call["query"]})["scores_kernel"]
    for n in (50, 1000, 1200):
        assert (
            alone
            and orders("prune", legal_call("prune", dtype, N=n, D=width, M=1))["scores_kernel"]
            == alone
        )
        call = legal_call("add_select_", dtype, N=n, K=n, D=width, M=1) | {
            "sizes": None,
            "cost_scale": None,
        }
        assert orders("add_select_", call)["add_select_kernel"] == alone
        call = legal_call("ragged_add_select_", dtype, N=n, D=width, M=1)
        call |= {"sizes": None, "cost_scale": None}
        assert orders("ragged_add_select_", call)["add_select_kernel"] == alone


def views_of(call, in_place):
    """Yield the call with each tensor, and with all of them, in layouts that compile
    differently."""
    x = call["x"]
    views = odd_layouts(x) | {
        "odd rows": torch.empty(*x.shape[:2], x.shape[2] + 1, dtype=x.dtype)[:, :, :-1].copy_(x)
    }
    for name, view in views.items():
        if view.is_contiguous() or not in_place:
            yield f"x, {name}", call | {"x": view}
    shifted = {
        name: odd_layouts(value)["odd storage offset"]
        for name, value in call.items()
        if is_rows(value)
    }
    for name, view in shifted.items():
        yield f"{name}, odd storage offset", call | {name: view}
    yield "all, odd storage offset", call | shifted


def is_rows(value):
    return isinstance(value, torch.Tensor) and value.ndim == 3


SUMMED = [
    "scores",
    "prune",
    "attend",
    "attend_backward",
    "gather_norm",
    "add_norm_",
    "add_select_",
    "merge",
    "merge_",
    "parent_offsets",
    "parent_offsets_",
    "ragged_add_select_",
    "ragged_nearest",
    # Not ragged_merge_: its sums are those of the kernel of merge_
]
WIDTHS = (96, 100, 1024)


def each_op_in_two_widths():
    for index, op in enumerate(SUMMED):
        yield op, WIDTHS[index % 3], torch.float32
        yield op, WIDTHS[(index + 1) % 3], torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize(("op", "width", "dtype"), each_op_in_two_widths())
def test_every_layout_is_summed_in_one_order(op, width, dtype):
    plain_call = legal_call(op, dtype, N=50, D=width, K=30, T=30, C=20, M=1)
    for call in (plain_call, plain_call | {"rms": True}) if "rms" in plain_call else (plain_call,):
        plain = orders(op, call)
        assert any(plain.values())
        for name, view in views_of(call, op.endswith("_")):
            assert orders(op, view) == plain, name


@pytest.mark.parametrize(
    ("op", "kernel"),
    [
        ("prune", "scores_kernel"),
        ("add_select_", "add_select_kernel"),
        ("ragged_add_select_", "add_select_kernel"),
    ],
)
@pytest.mark.parametrize(("n", "after"), [(1024, []), (1025, ["select_kernel"])])
def test_many_tokens_are_selected_by_a_launch_of_their_own(op, kernel, n, after):
    with recording() as recorded:
        launcher(op)(**legal_call(op, torch.bfloat16, N=n, K=n, D=384))
    assert [
        launch.kernel.__name__ for launch in recorded if launch.kernel.__name__ != "split_kernel"
    ] == [
        kernel,
        *after,
    ]
    assert recorded[0].options["num_warps"] == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_copied_16_bytes_at_a_time(dtype):
    """For any number of tokens, which is the width of logits."""
    with recording() as recorded:
        launcher("attend")(**legal_call("attend", dtype, N=197, D=384, M=5))
    for launch, compiled in compile_launches(recorded, 80):
        sizes = re.findall(
            r"cp\.async\.c\w\.shared\.global .*?\], \[.*?\], (\w+)", compiled.asm["ptx"]
        )
        assert set(sizes) == ({"0x10"} if "rows" in launch.kernel.__name__ else set()), launch


@pytest.mark.parametrize(
    ("part", "old", "new", "message"),
    [
        ("ptx", r"bar\.sync\s+0;(?=[^;]*(;[^;]*){0,12}atom\.global)", "", "barrier on both sides"),
        ("ptx", r"(atom\.global.*\n(?s:.*?))bar\.sync\s+0;", r"\1", "barrier on both sides"),
        ("ptx", "gpu.acq_rel", "gpu.relaxed", "without acquire and release"),
        ("ptx", r"ld\.global\.v4", "ld.global.nc.v4", "coherent"),
        ("ttgir", r"( *%\w+ = )(tt\.load %x_\w+, .*)", r"\1\2\n%again = \2", "have become"),
    ],
)
def test_the_lint_reports_planted_faults(part, old, new, message):
    with recording() as recorded:
        launcher("add_select_")(**legal_call("add_select_", torch.float16, N=50, K=50, D=384))
    [(launch, compiled)] = compile_launches(recorded, 90)
    assert not problems(launch, compiled)
    text = re.sub(old, new, compiled.asm[part])
    assert text != compiled.asm[part]
    planted = SimpleNamespace(asm=compiled.asm | {part: text}, metadata=compiled.metadata)
    assert any(message in problem for problem in problems(launch, planted)), problems(
        launch, planted
    )
