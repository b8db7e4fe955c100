"""cropr::merge and merge_: leaving tokens go into the kept ones they are most like."""

import pytest
import torch
from cases import DTYPES, odd_layouts, same_bits, tokens

from cropr_kernels import reference

pytestmark = pytest.mark.kernels

# (B, N, D, K, P)
MERGES = [
    (1, 2, 3, 1, 0),
    (2, 5, 8, 3, 1),
    (3, 17, 33, 9, 2),
    (2, 50, 96, 6, 5),  # one candidate takes all
    (2, 90, 48, 40, 1),  # more leave than one tile holds
    (1, 197, 192, 188, 1),
    (2, 40, 64, 40, 1),  # nobody leaves
    (2, 6, 8, 6, 6),
    (0, 10, 16, 5, 1),
]
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}


def problem(shape, dtype, device):
    """x, kept_idx, pruned_idx and sizes as they are after some layers."""
    batch, n, dim, keep, prefix = shape
    x = tokens(batch, n, dim, dtype, device)
    kept, pruned = reference.select(torch.randn(batch, n, device=device), keep, prefix)
    return x, kept, pruned, torch.randint(1, 6, (batch, n), device=device).float()


def slow_merge(x, kept_idx, pruned_idx, sizes, slots):
    """One token after the other, given where each of them goes."""
    out, total = x.double().gather(1, kept_idx.unsqueeze(-1).expand(-1, -1, x.shape[2])), sizes.gather(1, kept_idx)
    out = out * total.double().unsqueeze(-1)
    for b in range(x.shape[0]):
        for r, slot in enumerate(slots[b].tolist()):
            position = pruned_idx[b, r]
            out[b, slot] += x[b, position].double() * sizes[b, position].double()
            total[b, slot] += sizes[b, position]
    return out / total.double().unsqueeze(-1), total


def cosines(features, kept_idx, pruned_idx, prefix):
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    return reference.gather(unit, pruned_idx) @ reference.gather(unit, kept_idx[:, prefix:]).transpose(1, 2)


def skip_if_uninterpretable(backend, dtype):
    if backend.interpreted and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as integers")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MERGES)
def test_means_sizes_and_targets_match_a_slow_merge(backend, shape, dtype):
    skip_if_uninterpretable(backend, dtype)
    prefix = shape[4]
    x, kept_idx, pruned_idx, sizes = problem(shape, dtype, backend.device)
    kept, kept_sizes, dest = backend.merge(x, kept_idx, pruned_idx, sizes, None, prefix)
    assert kept.dtype == dtype and kept.is_contiguous() and kept_sizes.dtype == torch.float32
    slots = dest.gather(1, pruned_idx)
    expected, total = slow_merge(x, kept_idx, pruned_idx, sizes, slots)
    torch.testing.assert_close(kept, expected.to(dtype), **TOLERANCE[dtype])
    assert torch.equal(kept_sizes, total)
    assert torch.equal(dest.gather(1, kept_idx), torch.arange(shape[3], device=x.device).expand_as(kept_idx))
    if slots.numel():  # nobody else would have been more similar, and nobody went into the prefix
        assert slots.min() >= prefix
        similarity = cosines(x, kept_idx, pruned_idx, prefix)
        chosen = similarity.gather(2, (slots - prefix).unsqueeze(-1)).squeeze(-1)
        assert (chosen >= similarity.max(-1).values - 1e-5).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MERGES)
def test_rows_that_nobody_comes_to_are_exact_copies(backend, shape, dtype):
    skip_if_uninterpretable(backend, dtype)
    x, kept_idx, pruned_idx, sizes = problem(shape, dtype, backend.device)
    kept, kept_sizes, _ = backend.merge(x, kept_idx, pruned_idx, sizes, None, shape[4])
    alone = kept_sizes == sizes.gather(1, kept_idx)
    assert same_bits(kept[alone], reference.gather(x, kept_idx)[alone])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mass_is_conserved(backend, dtype):
    x, kept_idx, pruned_idx, sizes = problem((3, 70, 40, 50, 1), dtype, backend.device)
    kept, kept_sizes, _ = backend.merge(x, kept_idx, pruned_idx, sizes, None, 1)
    before = (x.double() * sizes.double().unsqueeze(-1)).sum(1)
    torch.testing.assert_close((kept.double() * kept_sizes.double().unsqueeze(-1)).sum(1), before, **TOLERANCE[dtype])
    assert torch.equal(kept_sizes.sum(1), sizes.sum(1))


def test_features_decide_and_may_have_another_width_and_dtype(backend):
    x, kept_idx, pruned_idx, sizes = problem((2, 30, 16, 20, 1), torch.float32, backend.device)
    features = torch.randn(2, 30, 24, device=x.device).half()
    _, _, dest = backend.merge(x, kept_idx, pruned_idx, sizes, features, 1)
    similarity = cosines(features, kept_idx, pruned_idx, 1)
    assert torch.equal(dest.gather(1, pruned_idx) - 1, similarity.argmax(-1))


def test_equal_similarities_go_to_the_lower_position_and_nan_to_none(backend):
    x = torch.ones(1, 80, 16, device=backend.device)
    kept_idx, pruned_idx = torch.arange(70, device=x.device)[None], torch.arange(70, 80, device=x.device)[None]
    sizes = torch.ones(1, 80, device=x.device)
    assert (backend.merge(x, kept_idx, pruned_idx, sizes, None, 2)[2][:, 70:] == 2).all()
    x[0, 2, 3] = float("nan")  # a candidate without a similarity
    x[0, 3] = 0.0  # nor has this one
    x[0, 75] = 0.0  # and this has none to any
    dest = backend.merge(x, kept_idx, pruned_idx, sizes, None, 2)[2]
    assert dest[0, 70:].tolist() == [4, 4, 4, 4, 4, 4, 4, 4, 4, 4]
    x[:] = float("nan")
    assert (backend.merge(x, kept_idx, pruned_idx, sizes, None, 2)[2][:, 70:] == 2).all()


def test_every_layout_gives_the_same_bits(backend):
    x, kept_idx, pruned_idx, sizes = problem((2, 50, 96, 30, 1), torch.float32, backend.device)
    plain = backend.merge(x, kept_idx, pruned_idx, sizes, None, 1)
    flipped = [part.t().contiguous().t() for part in (kept_idx, pruned_idx, sizes)]
    for name, odd in odd_layouts(x).items():
        for got, expected in zip(backend.merge(odd, *flipped, None, 1), plain):
            assert torch.equal(got, expected), name
        assert torch.equal(backend.merge(x, kept_idx, pruned_idx, sizes, odd, 1)[2], plain[2]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MERGES)
def test_in_place_changes_the_targets_and_nothing_else(backend, shape, dtype):
    skip_if_uninterpretable(backend, dtype)
    batch, n, dim, keep, prefix = shape
    x, kept_idx, pruned_idx, sizes = problem(shape, dtype, backend.device)
    expected, expected_sizes, dest = backend.merge(x, kept_idx, pruned_idx, sizes, None, prefix)
    # The same tokens in a longer stream, between tokens that left before.
    at = torch.arange(n, device=x.device) * 2 + 1
    stream, stream_sizes = x.new_full((batch, 2 * n + 1, dim), 7.0), sizes.new_full((batch, 2 * n + 1), 3.0)
    stream[:, at], stream_sizes[:, at] = x, sizes
    parent = torch.arange(2 * n + 1, device=x.device).repeat(batch, 1)
    before = stream.clone()
    tickets = torch.zeros(batch, dtype=torch.int32, device=x.device)
    places = (at[kept_idx], at[pruned_idx])
    got_sizes = backend.merge_(stream, *places, stream_sizes, parent, tickets, None, prefix)
    assert not tickets.any()
    assert torch.equal(got_sizes, expected_sizes)
    assert same_bits(reference.gather(stream, places[0]), expected)
    assert torch.equal(stream_sizes.gather(1, places[0]), expected_sizes)
    assert torch.equal(parent.gather(1, places[1]), places[0].gather(1, dest.gather(1, pruned_idx)))
    untouched = torch.ones(batch, 2 * n + 1, dtype=torch.bool, device=x.device).scatter(1, places[0], False)
    assert same_bits(stream[untouched], before[untouched])
    own = torch.arange(2 * n + 1, device=x.device).expand(batch, -1)
    kept_parent = torch.ones_like(untouched).scatter(1, places[1], False)
    assert torch.equal(parent[kept_parent], own[kept_parent])


def test_same_bits_every_time(kernels):
    x, kept_idx, pruned_idx, sizes = problem((4, 197, 64, 100, 1), torch.float32, kernels.device)
    first = kernels.merge(x, kept_idx, pruned_idx, sizes, None, 1)
    for _ in range(2 if kernels.interpreted else 20):
        for got, expected in zip(kernels.merge(x, kept_idx, pruned_idx, sizes, None, 1), first):
            assert torch.equal(got, expected)
