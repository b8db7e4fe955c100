"""Kernels whose programs synchronize: results do not depend on the order of programs."""

import os

import pytest
import torch
from helpers.cases import INTERPRETED, same_bits, slow_interpreted

from cropr_kernels.ops import reference

pytestmark = pytest.mark.kernels
if not INTERPRETED:
    pytest.skip("programs take turns in Triton's interpreter only", allow_module_level=True)

import triton  # noqa: E402
from helpers.interleaved import counting_loads, interleaved  # noqa: E402

COUNT = int(os.environ.get("CROPR_SEEDS", 10))
SEEDS = [range(2), pytest.param(range(2, COUNT), marks=pytest.mark.slow)]


def integers(*shape, low=-2, high=3):
    """Return small numbers, whose scores are exact and tie."""
    return torch.randint(low, high, shape).float()


def prune(backend):
    return backend.prune(integers(2, 70, 4), integers(4), 40, 1)


def prune_by_priority(backend):
    return backend.prune(integers(2, 40, 4), integers(4), 20, 1, integers(2, 40) > 1)


def add_select(backend):
    x, idx = integers(2, 11, 512), torch.arange(1, 10).repeat(2, 1)
    return x, *backend.add_select_(x, idx, integers(2, 9, 512), None, integers(512), 5, 1)


def add_select_by_size(backend):
    x, sizes = integers(2, 9, 512), integers(2, 9, low=1, high=5)
    cost_scale = torch.zeros(2, 9)
    parts = (5, 1, sizes, 1.5, None, cost_scale, 0.5)
    return (
        x,
        cost_scale,
        *backend.add_select_(x, None, integers(2, 9, 512), None, integers(512), *parts),
    )


def merge(backend):
    target_idx, candidate_idx = reference.select(integers(2, 90), 70, 1)
    parts = (integers(2, 90, low=1), 75, 1, integers(2, 90, low=1))
    return backend.merge(torch.randn(2, 90, 8), target_idx, candidate_idx, *parts)


def merge_in_place(backend):
    target_idx, candidate_idx = reference.select(integers(2, 90), 70, 1)
    x, sizes, parent = torch.randn(2, 90, 8), integers(2, 90, low=1), torch.arange(90).repeat(2, 1)
    return (
        x,
        sizes,
        parent,
        *backend.merge_(x, target_idx, candidate_idx, sizes, parent, 75, 1, True),
    )


def offsets_in_place(backend):
    x, parent = torch.randn(2, 90, 8), torch.arange(90).repeat(2, 1)
    backend.parent_offsets_(x, *reference.select(integers(2, 90), 50, 1), parent, 1)
    return x, parent


def ragged_rows():
    """Return rows of two images, 60 and 45 of 70, and where they begin."""
    rows = [torch.arange(60), 70 + torch.arange(45)]
    return torch.cat(rows), torch.tensor([0, 60, 105])


def ragged_add_select(backend):
    rows, starts = torch.cat([torch.arange(9), 11 + torch.arange(6)]), torch.tensor([0, 9, 15])
    x, sizes, cost_scale = integers(2, 11, 512), integers(2, 11, low=1, high=5), torch.zeros(2, 11)
    parts = (None, integers(512), 3, 1, sizes, 1.5, None, cost_scale, 0.5)
    order = backend.ragged_add_select_(x, rows, starts, integers(15, 512), *parts)
    return x, cost_scale, order


def ragged_nearest(backend):
    return backend.ragged_nearest(torch.randn(2, 70, 8), *ragged_rows(), 25, 1)


def ragged_merge(backend):
    order, starts = ragged_rows()
    x, sizes, parent = torch.randn(2, 70, 8), integers(2, 70, low=1), torch.arange(70).repeat(2, 1)
    prune = torch.rand(2, 20) < 0.6
    nearest = torch.randint(1, 25, (2, 20)) + torch.tensor([[0], [70]])
    num_kept = 105 - int(prune.sum())
    parts = (prune, nearest, sizes, parent, num_kept, 1, True)
    return x, sizes, parent, *backend.ragged_merge_(x, order, starts, *parts)


def attend_segments(backend):
    q, k, v = torch.randn(3, 80, 2, 16).unbind()
    return (backend.attend_segments(q, k, v, torch.tensor([0, 10, 10, 80]), 70, torch.rand(80)),)


CALLS = [
    attend_segments,
    prune,
    prune_by_priority,
    add_select,
    add_select_by_size,
    merge,
    merge_in_place,
    offsets_in_place,
    ragged_add_select,
    ragged_nearest,
    ragged_merge,
]


@pytest.mark.parametrize("seeds", SEEDS, ids=["few", "many"])
@pytest.mark.parametrize("call", CALLS)
def test_no_order_of_programs_changes_a_result(backend, call, seeds):
    expected = call(backend)
    for seed in seeds:
        torch.manual_seed(0)
        with interleaved(seed):
            got = call(backend)
        for a, b in zip(got, expected):
            assert same_bits(a, b) if a.is_floating_point() else torch.equal(a, b), seed


def longest(call, backend, n):
    """Return the most loads that any program makes."""
    with counting_loads() as loads:
        call(backend, n)
    return max(loads.values())


def select_of(backend, n):
    backend.select(integers(1, n), n // 2, 1)


def add_select_of(backend, n):
    x = integers(1, n, 16)
    backend.add_select_(
        x, None, torch.zeros_like(x), None, integers(16), n // 2, 1, integers(1, n, low=1), 1.0
    )


def merge_of(backend, n):
    target_idx, candidate_idx = reference.select(integers(1, n), n * 3 // 5, 1)
    backend.merge(integers(1, n, 4), target_idx, candidate_idx, torch.ones(1, n), n * 4 // 5, 1)


@slow_interpreted
@pytest.mark.parametrize(("call", "n"), [(select_of, 8192), (add_select_of, 4096), (merge_of, 400)])
def test_loads_of_a_program_grow_no_faster_than_the_tokens(backend, call, n):
    single, double, quadruple = (longest(call, backend, count) for count in (n, 2 * n, 4 * n))
    assert quadruple - double <= 2.2 * (double - single), (single, double, quadruple)


def test_no_order_of_images_changes_a_result(backend, monkeypatch):
    """Kernels that read rows again may begin with the first image or with the last."""
    x, query, update = integers(3, 37, 48), integers(48), integers(3, 20, 48)

    def results():
        kept, idx, *rest = backend.prune(x, query, 20, 1)
        buffer = x.clone()
        split = backend.add_select_(buffer, idx, update, None, query, 12, 1)
        norms = [backend.gather_norm(x, idx, None, None, 1e-6, rms) for rms in (False, True)]
        return [kept, idx, *rest, *norms, buffer, *split]

    expected = results()
    for module in ("utils", "residual"):
        monkeypatch.setattr(
            f"cropr_kernels.ops.triton.{module}.RECENT_FIRST", triton.language.constexpr(True)
        )
    assert all(torch.equal(got, before) for got, before in zip(results(), expected, strict=True))
