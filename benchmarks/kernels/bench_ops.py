"""Throughput of every op by pytest-benchmark, on CPU and CUDA; results are checked first.

pytest benchmarks/kernels/bench_ops.py -o addopts= --benchmark-only --benchmark-json=ops.json
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.baselines.prune import (
    PREFIX,
    check,
    copy,
    cropr_prune,
    published,
    sort_and_index_select,
    topk_and_index_select,
)
from benchmarks.kernels.shapes import CPU_SHAPES, GPU_SHAPES, make_inputs, num_keep
from benchmarks.utils.timing import compiled
from cropr_kernels.ops.definitions import DEFINITIONS

CELLS = [
    *itertools.product(["cpu"], CPU_SHAPES, (torch.float32, torch.bfloat16)),
    *itertools.product(["cuda"], GPU_SHAPES, (torch.float32, torch.bfloat16, torch.float16)),
]
PRUNE = {
    "cropr::prune": cropr_prune,
    "copy of x": copy,
    "published": published,
    "sort + index_select": sort_and_index_select,
    "top-k + index_select": topk_and_index_select,
    "compiled published": published,
    "compiled sort + index_select": sort_and_index_select,
}


@pytest.fixture(
    params=CELLS, ids=lambda cell: f"{cell[0]}-{'x'.join(map(str, cell[1]))}-{str(cell[2])[6:]}"
)
def cell(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor, int]:
    device, shape, dtype = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    x, query = make_inputs(shape, dtype, device)
    with torch.inference_mode():
        check(x, query, num_keep(shape[1]))
    return x, query, num_keep(shape[1])


def time_call(benchmark: Any, x: torch.Tensor, function: Callable[..., Any], *args: Any) -> None:
    """Time one call, with the GPU's work, and record the bytes of x."""

    def call() -> Any:
        result = function(*args)
        if x.is_cuda:
            torch.cuda.synchronize()
        return result

    with torch.inference_mode():
        benchmark.extra_info["bytes of x"] = x.nbytes
        benchmark(call)


@pytest.mark.parametrize("name", PRUNE)
def test_prune(benchmark: Any, cell: tuple[torch.Tensor, torch.Tensor, int], name: str) -> None:
    function = compiled(PRUNE[name]) if name.startswith("compiled") else PRUNE[name]
    benchmark.group = f"prune {tuple(cell[0].shape)} {cell[0].dtype} {cell[0].device.type}"
    time_call(benchmark, cell[0], function, *cell)


@pytest.mark.parametrize("name", ["scores", "select", "split", "gather", "restore"])
def test_parts(benchmark: Any, cell: tuple[torch.Tensor, torch.Tensor, int], name: str) -> None:
    x, query, keep = cell
    ops = torch.ops.cropr
    with torch.inference_mode():
        scores = ops.scores(x, query)
        kept, kept_idx, pruned, pruned_idx = ops.prune(x, query, keep, PREFIX)
    args = {
        "scores": (x, query),
        "select": (scores, keep, PREFIX),
        "split": (x, scores, keep, PREFIX),
        "gather": (x, kept_idx),
        "restore": (kept, kept_idx, pruned, pruned_idx),
    }[name]
    benchmark.group = f"{name} {tuple(x.shape)} {x.dtype} {x.device.type}"
    time_call(benchmark, x, getattr(ops, name), *args)


@pytest.mark.parametrize(
    "name",
    ["merge_", "parent_offsets_", "gather_norm", "add_", "add_norm_", "add_select_", "rotate_"],
)
def test_stream(benchmark: Any, cell: tuple[torch.Tensor, torch.Tensor, int], name: str) -> None:
    x, query, keep = cell
    batch, n, _ = x.shape
    ops = torch.ops.cropr
    with torch.inference_mode():
        idx = ops.prune(x, query, keep, PREFIX)[1]
        update = torch.zeros_like(x[:, :keep])
        weight = torch.ones_like(x[0, 0])
        bias = torch.zeros_like(x[0, 0])
        table = torch.zeros(n, 128, device=x.device)
        # Rotation by zero and update of zero: repeated calls do not change the values
        table[:, 64:] = 1.0
        sizes = torch.ones(batch, n, device=x.device)
        parent = torch.arange(n, device=x.device).repeat(batch, 1)
        args: dict[str, tuple[Any, ...]] = {
            "merge_": (
                x,
                idx[:, : keep - 16],
                idx[:, keep - 16 :],
                sizes,
                parent,
                keep - 8,
                PREFIX,
            ),
            "parent_offsets_": (x, idx[:, : keep - 8], idx[:, keep - 8 :], parent, PREFIX),
            "gather_norm": (x, idx, weight, bias, 1e-6),
            "add_": (x, idx, update, None),
            "add_norm_": (x, idx, update, None, weight, bias, 1e-6),
            "add_select_": (x, idx, update, None, query, keep - 8, PREFIX),
            "rotate_": (x[:, :keep].unflatten(2, (-1, 64)), table, idx, PREFIX),
        }
        op_args = [arg.clone() if torch.is_tensor(arg) else arg for arg in args[name]]
        reference_args = [arg.clone() if torch.is_tensor(arg) else arg for arg in args[name]]
        result = getattr(ops, name)(*op_args)
        expected = DEFINITIONS[name](*reference_args)
        if name == "parent_offsets_":
            # Parents of near-ties may differ
            assert (op_args[3] == reference_args[3]).double().mean() > 0.99
        elif name == "merge_":
            assert (result[0] == expected[0]).double().mean() > 0.9
            assert torch.equal(result[2].sum(1), expected[2].sum(1))
        else:
            assert torch.equal(op_args[0], args[name][0])
        if name.endswith("norm") or name.endswith("norm_"):
            torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)
    benchmark.group = f"{name} {tuple(x.shape)} {x.dtype} {x.device.type}"
    time_call(benchmark, x, getattr(ops, name), *args[name])


@pytest.mark.parametrize("name", ["cropr::attend_scores", "PyTorch"])
@pytest.mark.parametrize("count", [1, 196])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_attend_forward_and_backward(benchmark: Any, device: str, count: int, name: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    x, _ = make_inputs((8 if device == "cpu" else 256, 197, 384), torch.float32, device)
    queries = torch.randn(count, 384, device=device, requires_grad=True)
    scale = 384**-0.5

    def plain() -> torch.Tensor:
        return torch.softmax(scale * (queries @ x.transpose(1, 2)), -1) @ x

    def fused() -> torch.Tensor:
        return torch.ops.cropr.attend_scores(x, queries, scale)[0]

    torch.testing.assert_close(fused(), plain(), rtol=1e-3, atol=1e-3)
    function = fused if name == "cropr::attend_scores" else plain

    def step() -> None:
        queries.grad = None
        function().sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"attend, {count} queries, {device}"
    benchmark(step)
