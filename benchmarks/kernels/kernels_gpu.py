"""Speed of selection, the engine's stream, merging and attention on a CUDA GPU.

python -m benchmarks.kernels.kernels_gpu [--out benchmarks/results/gpu_kernels.json] [--device cpu
--rounds 3]

An interrupted run resumes with the same --out.

Interleaved replays of CUDA graphs, medians, as in prune_gpu; cold inputs are copies that exceed the
L2 together. The marginal cost of pruning is add_select_ and gather_norm together, less the
add_norm_ of a block without pruning. With --device cpu the same calls are checked and timed by the
clock, to test this script.
"""

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cropr_kernels as cropr
from benchmarks.kernels.shapes import GPU_SHAPES, num_keep
from benchmarks.utils.results import RESULTS, Results, Row, environment, name_of
from benchmarks.utils.timing import capture, clocked, cold_copies, quantile, replay
from cropr_kernels.models.blocks import attention_by_bias, attention_by_dimension
from cropr_kernels.ops import reference
from cropr_kernels.pruning.merging import COST_WEIGHT

ops = torch.ops.cropr
Calls = dict[str, Callable[[Tensor], Any]]
KEYS = ("kernel", "shape", "dtype", "L2")


def timed(calls: Calls, inputs: list[Tensor], rounds: int) -> Row:
    """Microseconds of one call of each function: medians with p10 and p90."""
    if inputs[0].is_cuda:
        times = replay(
            {name: capture(call, inputs) for name, call in calls.items()}, len(inputs), rounds
        )
    else:
        times = clocked(calls, inputs, rounds)
    row: Row = {}
    for name, values in times.items():
        row[f"{name}, us"] = round(quantile(values, 0.5), 3)
        row[f"{name}, us p10 p90"] = [round(quantile(values, q), 3) for q in (0.1, 0.9)]
    return row


def copies(x: Tensor, cold: bool) -> list[Tensor]:
    if not cold:
        return [x] * 4
    return cold_copies(x) if x.is_cuda else [x.clone() for _ in range(2)]


def require(correct: bool, name: str) -> None:
    if not correct:
        raise RuntimeError(f"{name}: wrong result, not timed")


def selection(shape: tuple[int, int], device: str, rounds: int) -> Row:
    scores = torch.randn(shape, device=device)
    keep = num_keep(shape[1])
    idx = ops.select(scores, keep, 1)
    expected = reference.select(scores, keep, 1)
    require(all(torch.equal(a, b) for a, b in zip(idx, expected)), "select")
    calls: Calls = {
        "select": lambda s: ops.select(s, keep, 1),
        "topk": lambda s: s.topk(keep, dim=1).indices,
        "argsort": lambda s: s.argsort(dim=1, descending=True),
    }
    return {"kernel": "select", "shape": list(shape)} | timed(calls, [scores] * 4, rounds)


def require_same_stream(
    x: Tensor, update: Tensor, norm: tuple[Tensor, Tensor], query: Tensor, keep: int
) -> Tensor:
    """Check add_select_, gather_norm and restore by their definitions; return the kept positions.

    Args:
        norm: weight and bias of the LayerNorm.
    """
    pruned_x = x.clone()
    plain_x = x.clone()
    idx, _ = ops.add_select_(pruned_x, None, update, None, query, keep, 1)
    reference.add_(plain_x, None, update, None)
    require((pruned_x.float() - plain_x.float()).abs().max().item() < 0.1, "add_select_")
    exact = pruned_x.double() @ query.double()
    is_kept = torch.zeros_like(exact, dtype=torch.bool).scatter(1, idx, True)
    lowest_kept = exact.masked_fill(~is_kept, float("inf"))[:, 1:].amin(1)
    highest_pruned = exact.masked_fill(is_kept, -float("inf")).amax(1)
    require(bool((lowest_kept + 1e-5 * exact.abs().max() >= highest_pruned).all()), "add_select_")
    require(bool(is_kept[:, 0].all()), "add_select_")
    normed = ops.gather_norm(pruned_x, idx, *norm, 1e-6)
    expected = reference.gather_norm(pruned_x, idx, *norm, 1e-6)
    require((normed.float() - expected.float()).abs().max().item() < 0.1, "gather_norm")
    require(torch.equal(ops.restore(*ops.prune(x, query, keep, 1)), x), "restore")
    return idx


def stream(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, cold: bool, rounds: int
) -> Row:
    """Time the end of a block with and without pruning, restore, and concatenation."""
    batch, n, dim = shape
    keep = num_keep(n)
    x = torch.randn(shape, device=device).to(dtype)
    update, weight, bias = (torch.randn(s, device=device).to(dtype) for s in (shape, dim, dim))
    query = torch.randn(dim, device=device)
    update *= 1e-3  # every call updates the stream
    idx = require_same_stream(x, update, (weight, bias), query, keep)
    split = ops.prune(x, query, keep, 1)

    def pruning(y: Tensor) -> Tensor:
        chosen, _ = ops.add_select_(y, None, update, None, query, keep, 1)
        return ops.gather_norm(y, chosen, weight, bias, 1e-6)

    sizes = torch.ones(batch, n, device=device)
    parent = torch.arange(n, device=device).repeat(batch, 1)
    cost_scale = torch.ones_like(sizes)
    num_targets = cropr.Merge().num_targets(n, keep, 1)

    def merging(y: Tensor) -> Tensor:
        split = ops.add_select_(
            y, None, update, None, query, num_targets, 1, sizes, 2.0, None, cost_scale, COST_WEIGHT
        )
        chosen, _, _ = ops.merge_(y, *split, sizes, parent, keep, 1, False, cost_scale)
        sizes.fill_(1.0)
        return ops.gather_norm(y, chosen, weight, bias, 1e-6)

    require_same_merge(x, query, num_targets, keep)
    calls: Calls = {
        "add_norm_": lambda y: ops.add_norm_(y, None, update, None, weight, bias, 1e-6),
        "add_select_": lambda y: ops.add_select_(y, None, update, None, query, keep, 1),
        "gather_norm": lambda y: ops.gather_norm(y, idx, weight, bias, 1e-6),
        "add_select_ + gather_norm": pruning,
        "add_select_ + merge_ + gather_norm": merging,
        "fill of sizes": lambda y: sizes.fill_(1.0),
        "torch add + layer_norm": lambda y: torch.layer_norm(
            y.add_(update), (dim,), weight, bias, 1e-6
        ),
        "copy of x": lambda y: y.clone(),
        "restore": lambda y: ops.restore(*split),
        "concatenation": lambda y: torch.cat([split[0], split[2]], 1),
    }
    row: Row = {
        "kernel": "stream",
        "shape": list(shape),
        "dtype": name_of(dtype),
        "L2": "cold" if cold else "hot",
    }
    row |= timed(calls, copies(x, cold), rounds)
    row["marginal cost of pruning, us"] = round(
        row["add_select_ + gather_norm, us"] - row["add_norm_, us"], 3
    )
    merging_us = row["add_select_ + merge_ + gather_norm, us"] - row["fill of sizes, us"]
    row["merging over pruning, us"] = round(merging_us - row["add_select_ + gather_norm, us"], 3)
    row["marginal cost / copy of x"] = round(
        row["marginal cost of pruning, us"] / row["copy of x, us"], 4
    )
    return row


def require_same_merge(x: Tensor, query: Tensor, num_targets: int, keep: int) -> None:
    """Check the merge against its definition, in float32, where few similarities tie."""
    split = ops.select(ops.scores(x, query), num_targets, 1)
    sizes = torch.ones(x.shape[:2], device=x.device)
    merged = ops.merge(x.float(), *split, sizes, keep, 1)
    expected = reference.merge(x.float(), *split, sizes, keep, 1)
    require((merged[1] == expected[1]).double().mean().item() > 0.99, "merge, kept tokens")
    equal_rows = (merged[4] == expected[4]).all(1)
    require(
        torch.allclose(merged[0][equal_rows], expected[0][equal_rows], rtol=1e-4, atol=1e-4),
        "merge, merged rows",
    )
    kept_norms = ops.gather(x.float(), merged[1]).norm(dim=2)
    require(torch.allclose(merged[0].norm(dim=2), kept_norms, rtol=1e-4), "merge, norms")


def sized_attention(
    batch: int, heads: int, n: int, width: int, dtype: torch.dtype, device: str, rounds: int
) -> Row:
    """Time proportional attention: log(size) as a dimension, a bias, or FlexAttention's
    score_mod."""
    from torch.nn.attention.flex_attention import flex_attention

    qkv = torch.randn(3, batch, heads, n, width, device=device).to(dtype)
    log_sizes = torch.randint(1, 9, (batch, n), device=device).float().log()
    calls: Calls = {
        "plain": lambda t: torch.nn.functional.scaled_dot_product_attention(*t.unbind(0)),
        "dimension": lambda t: attention_by_dimension(*t.unbind(0), log_sizes),
        "bias": lambda t: attention_by_bias(*t.unbind(0), log_sizes),
    }
    exact = attention_by_bias(*qkv.double().unbind(0), log_sizes.double())
    if device == "cuda":

        def add_size(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + log_sizes[b, j]

        flex = torch.compile(flex_attention)
        calls["flex"] = lambda t: flex(*t.unbind(0), score_mod=add_size)
    for name in set(calls) - {"plain"}:
        require(
            (calls[name](qkv).double() - exact).abs().max().item() < 0.05, f"attention by {name}"
        )
    row: Row = {
        "kernel": "sized attention",
        "shape": [batch, heads, n, width],
        "dtype": name_of(dtype),
    }
    row |= timed(calls, [qkv] * 2, rounds)
    for name in set(calls) - {"plain"}:
        row[f"{name} / plain"] = round(row[f"{name}, us"] / row["plain, us"], 3)
    return row


def attention(
    batch: int, m: int, n: int, dim: int, dtype: torch.dtype, device: str, rounds: int
) -> Row:
    """Time the training aggregator, forward and backward, and measure its memory for backward."""
    x = torch.randn(batch, n, dim, device=device).to(dtype)
    queries = torch.randn(m, dim, device=device).to(dtype).requires_grad_()
    grad = torch.randn(batch, m, dim, device=device).to(dtype)
    scale = dim**-0.5

    def torch_attend(tokens: Tensor) -> Tensor:
        return torch.softmax(scale * (queries @ tokens.transpose(1, 2)), -1) @ tokens

    def sdpa(tokens: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            queries.expand(batch, -1, -1), tokens, tokens
        )

    def cropr_attend(tokens: Tensor) -> Tensor:
        return ops.attend_scores(tokens, queries, scale)[0]

    def with_backward(attend: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda tokens: torch.autograd.grad(attend(tokens), queries, grad)[0]

    cropr_grad = with_backward(cropr_attend)
    torch_grad = with_backward(torch_attend)
    grad_queries = cropr_grad(x).float()
    expected = torch_grad(x).float()
    require(((grad_queries - expected).norm() / expected.norm()).item() < 0.05, "attend")
    calls: Calls = {"attend": cropr_grad, "torch": torch_grad, "SDPA": with_backward(sdpa)}
    row: Row = {"kernel": "attend", "shape": [batch, m, n, dim], "dtype": name_of(dtype)} | timed(
        calls, [x] * 2, rounds
    )
    for name in ("torch", "SDPA"):
        row[f"{name} / attend"] = round(row[f"{name}, us"] / row["attend, us"], 3)
    if x.is_cuda:
        for name, attend in (("attend", cropr_attend), ("torch", torch_attend)):
            allocated = torch.cuda.memory_allocated()
            kept = attend(x)
            row[f"{name}, saved MiB"] = round(
                (torch.cuda.memory_allocated() - allocated - kept.nbytes) / 2**20, 1
            )
            del kept
    return row


def cells_of(device: str, rounds: int) -> list[tuple[Any, ...]]:
    """A value for each of KEYS, and the function that measures the cell; small shapes on a CPU."""
    small = device == "cpu"
    selections = [(4, 197)] if small else [(256, 197), (64, 1025), (8, 9216), (1, 197)]
    streams = [(2, 197, 384)] if small else list(GPU_SHAPES)
    attends = [(256, 1, 197, 1024), (64, 1, 577, 1024), (16, 1024, 1024, 1024)]
    heads = [(1, 16, 197, 64), (256, 16, 197, 64), (64, 16, 1025, 64), (8, 12, 4096, 64)]
    if small:
        attends = [(2, 1, 50, 64), (2, 40, 50, 64)]
        heads = [(2, 2, 50, 64)]
    half = torch.bfloat16
    half_name = name_of(half)
    cells: list[tuple[Any, ...]] = []
    for shape in selections:
        cells.append(("select", shape, None, None, partial(selection, shape, device, rounds)))
    for shape, dtype, level in itertools.product(
        streams, (half, torch.float16, torch.float32), ("cold", "hot")
    ):
        measure = partial(stream, shape, dtype, device, level == "cold", rounds)
        cells.append(("stream", shape, name_of(dtype), level, measure))
    for shape in attends:
        cells.append(
            ("attend", shape, half_name, None, partial(attention, *shape, half, device, rounds))
        )
    for shape in heads:
        measure = partial(sized_attention, *shape, half, device, rounds)
        cells.append(("sized attention", shape, half_name, None, measure))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_kernels.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    device = options.device
    results = Results(options.out, environment(device), KEYS)
    for *_, measure in results.remaining(cells_of(device, options.rounds)):
        results.add(measure())
        print(
            {key: value for key, value in results.rows[-1].items() if "p10" not in key}, flush=True
        )


if __name__ == "__main__":
    main()
