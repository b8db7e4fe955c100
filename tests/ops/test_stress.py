"""Races: many launches with random sizes and ties on two streams at once. The full number runs on a
GPU only."""

import itertools
import random

import pytest
import torch

from cropr_kernels.ops import reference
from cropr_kernels.ops.definitions import DEFINITIONS

ops = torch.ops.cropr


def launch(generator, device):
    """Call prune, add_select_ and merge once at random, with scores that often tie; return inputs
    and results."""
    batch, n, dim = (
        generator.randint(1, 9),
        generator.choice([generator.randint(1, 300), 1025, 4097]),
        16,
    )
    prefix = generator.randint(0, min(n, 5))
    keep = generator.randint(prefix, n)
    x = torch.zeros(batch, n, dim, device=device)
    x[..., 0] = torch.randint(-3, 4, (batch, n), device=device).float()
    x[..., 1] = torch.arange(n, device=device)  # rows tell themselves apart
    query = torch.zeros(dim, device=device)
    query[0] = 1.0
    kept, kept_idx, pruned, pruned_idx = ops.prune(x, query, keep, prefix)
    idx, update = kept_idx, torch.zeros(batch, keep, dim, device=device)
    again = generator.randint(min(prefix, keep), keep)
    composed, _ = ops.add_select_(x.clone(), idx, update, None, query, again, prefix)
    merged = None
    if prefix < keep < n:
        stay = generator.randint(keep, n)
        merged = [
            ops.merge(x, kept_idx, pruned_idx, torch.ones_like(x[..., 0]), stay, prefix)
            for _ in range(2)
        ]
    return x, (kept, kept_idx, pruned, pruned_idx), composed, (keep, prefix, again), merged


def verify(x, split, composed, counts, merged):
    if merged is not None:
        for first, second in zip(*merged):
            assert torch.equal(first, second)
        tokens, kept_at, pruned_at, sizes, _ = merged[0]
        everyone = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        assert torch.equal(torch.cat([kept_at, pruned_at], 1).sort(1).values, everyone)
        assert (sizes.sum(1) == x.shape[1]).all()
        torch.testing.assert_close(
            tokens.norm(dim=2), reference.gather(x, kept_at).norm(dim=2), rtol=1e-4, atol=1e-4
        )
    kept, kept_idx, pruned, pruned_idx = split
    keep, prefix, again = counts
    expected = reference.select(x[..., 0], keep, prefix)
    assert torch.equal(kept_idx, expected[0]) and torch.equal(pruned_idx, expected[1])
    assert torch.equal(ops.restore(kept, kept_idx, pruned, pruned_idx), x)
    assert torch.equal(
        composed, kept_idx.gather(1, reference.select(kept[..., 0], again, prefix)[0])
    )


def verify_ragged(generator):
    """Select, choose and merge once at random; compare with the definitions."""
    n, prefix = generator.randint(1, 60), generator.randint(0, 2)
    n = max(n, prefix)
    counts = [generator.randint(prefix, n) for _ in range(generator.randint(0, 6))]
    candidates = generator.randint(0, n)
    rows = [torch.empty(0, dtype=torch.int64)]
    for b, count in enumerate(counts):
        patches = (prefix + torch.randperm(n - prefix)[: count - prefix]).sort().values
        rows.append(b * n + torch.cat([torch.arange(prefix), patches]))
    rows, starts = torch.cat(rows), torch.tensor([0, *itertools.accumulate(counts)])
    # Products and lengths are exact, and many scores and costs are equal
    x = torch.randint(-1, 2, (len(counts), n, 16)).float()
    sizes, parent = torch.ones(len(counts), n), torch.arange(n).repeat(len(counts), 1)
    update, query = torch.zeros(len(rows), 16), torch.eye(16)[0]
    order = ops.ragged_add_select_(x, rows, starts, update, None, query, candidates, prefix)
    definition = DEFINITIONS["ragged_add_select_"]
    expected = definition(x, rows, starts, update, None, query, candidates, prefix)
    assert torch.equal(order, expected)
    costs, nearest = ops.ragged_nearest(x, order, starts, candidates, prefix)
    expected = DEFINITIONS["ragged_nearest"](x, order, starts, candidates, prefix)
    torch.testing.assert_close(costs, expected[0], rtol=0, atol=1e-6)
    prune = costs < generator.random()
    num_kept = len(rows) - int(prune.sum())
    results, merged = [], []
    for op in (ops.ragged_merge_, DEFINITIONS["ragged_merge_"]):
        parts = x.clone(), sizes.clone(), parent.clone()
        lists = op(parts[0], order, starts, prune, nearest, *parts[1:], num_kept, prefix, True)
        results.append([*lists, *parts[1:]])
        merged.append(parts[0])
    assert all(map(torch.equal, *results))
    torch.testing.assert_close(*merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_ragged_calls_with_ties_are_exact(count):
    generator = random.Random(0)
    for _ in range(count):
        verify_ragged(generator)


@pytest.mark.parametrize("count", [40, pytest.param(150, marks=pytest.mark.slow)])
def test_random_calls_with_ties_are_exact(count):
    generator = random.Random(0)
    for _ in range(count):
        verify(*launch(generator, "cpu"))


@pytest.mark.gpu
def test_ten_thousand_launches_on_two_streams_are_exact():
    generator = random.Random(0)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(625):  # 16 launches of two ops before each look at the results
        pending = []
        for i in range(8):
            with torch.cuda.stream(streams[i % 2]):
                pending.append(launch(generator, "cuda"))
        torch.cuda.synchronize()
        for results in pending:
            verify(*results)


@pytest.mark.gpu
def test_every_replay_of_a_graph_is_exact():
    x, query = torch.randn(64, 577, 256, device="cuda"), torch.randn(256, device="cuda")
    for _ in range(3):
        ops.prune(x, query, 500, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ops.prune(x, query, 500, 1)
    for _ in range(200):
        x.normal_()
        graph.replay()
        expected = reference.select(ops.scores(x, query), 500, 1)
        assert torch.equal(results[1], expected[0]) and torch.equal(results[3], expected[1])


@pytest.mark.gpu
def test_replays_of_compiled_cuda_graphs_agree_with_eager_calls():
    """The counter of finished programs must not outlive a launch: replays would start from its last
    value."""

    def step(x, update, query):
        x = x.clone()
        kept_idx, pruned_idx = ops.add_select_(x, None, update, None, query, 400, 1)
        return ops.merge(x, kept_idx, pruned_idx, torch.ones_like(x[..., 0]), 500, 1)

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for _ in range(20):
        x, update, query = (
            torch.randn(shape, device="cuda") for shape in ((8, 577, 256), (8, 577, 256), (256,))
        )
        torch.compiler.cudagraph_mark_step_begin()
        got, expected = (
            [part.clone() for part in compiled(x, update, query)],
            step(x, update, query),
        )
        assert all(map(torch.equal, got, expected))
