"""cropr::merge and merge_: pruned tokens are merged into the most similar kept ones."""

import pytest
import torch
from helpers.cases import MATRIX_DTYPES, odd_layouts, same_bits, slow_interpreted, tokens

from cropr_kernels.ops import reference

pytestmark = pytest.mark.kernels

# (B, N, D, T, K, P): T tokens are targets, K are kept
MERGES = [
    (1, 2, 3, 1, 1, 0),
    (2, 5, 8, 2, 3, 1),
    (3, 17, 33, 9, 9, 2),
    (2, 50, 96, 6, 12, 5),  # one target takes all
    (2, 90, 48, 40, 52, 1),  # more candidates than one tile holds
    (1, 197, 192, 179, 188, 1),
    (2, 40, 64, 20, 40, 1),  # none is pruned
    (2, 40, 64, 40, 40, 1),  # none can be
    (2, 6, 8, 6, 6, 6),
    (0, 10, 16, 3, 5, 1),
]
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}


def problem(shape, dtype, device):
    """Return x, target_idx, candidate_idx, sizes as after some layers, num_keep, num_prefix."""
    batch, n, dim, num_targets, keep, prefix = shape
    x = tokens(batch, n, dim, dtype, device)
    target_idx, candidate_idx = reference.select(
        torch.randn(batch, n, device=device), num_targets, prefix
    )
    return (
        x,
        target_idx,
        candidate_idx,
        torch.randint(1, 6, (batch, n), device=device).float(),
        keep,
        prefix,
    )


def slow_merge(x, kept_idx, pruned_idx, sizes, rows):
    """Merge one token after the other into the given rows (B, R)."""
    out, total = (
        x.double().gather(1, kept_idx.unsqueeze(-1).expand(-1, -1, x.shape[2])),
        sizes.gather(1, kept_idx),
    )
    norms, out = out.norm(dim=2), out * total.double().unsqueeze(-1)
    for b in range(x.shape[0]):
        for r, row in enumerate(rows[b].tolist()):
            position = pruned_idx[b, r]
            out[b, row] += x[b, position].double() * sizes[b, position].double()
            total[b, row] += sizes[b, position]
    return out * (norms / out.norm(dim=2)).unsqueeze(-1), total


def cosines(features, target_idx, candidate_idx):
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    return reference.gather(unit, candidate_idx) @ reference.gather(unit, target_idx).transpose(
        1, 2
    )


@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize("shape", MERGES)
def test_tokens_and_sizes_match_a_slow_merge(backend, shape, dtype):
    x, target_idx, candidate_idx, sizes, keep, prefix = problem(shape, dtype, backend.device)
    kept, kept_idx, pruned_idx, kept_sizes, dest = backend.merge(
        x, target_idx, candidate_idx, sizes, keep, prefix
    )
    assert kept.dtype == dtype and kept.is_contiguous() and kept_sizes.dtype == torch.float32
    everyone = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    assert torch.equal(torch.cat([kept_idx, pruned_idx], 1).sort(1).values, everyone)
    assert torch.equal(kept_idx, kept_idx.sort(1).values) and torch.equal(
        pruned_idx, pruned_idx.sort(1).values
    )
    rows = dest.gather(1, pruned_idx)
    expected, total = slow_merge(x, kept_idx, pruned_idx, sizes, rows)
    torch.testing.assert_close(kept, expected.to(dtype), **TOLERANCE[dtype])
    assert torch.equal(kept_sizes, total)
    assert torch.equal(
        dest.gather(1, kept_idx), torch.arange(keep, device=x.device).expand_as(kept_idx)
    )


@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize("shape", MERGES)
def test_the_candidates_most_like_a_target_are_merged_into_it(backend, shape, dtype):
    x, target_idx, candidate_idx, sizes, keep, prefix = problem(shape, dtype, backend.device)
    _, kept_idx, pruned_idx, _, dest = backend.merge(
        x, target_idx, candidate_idx, sizes, keep, prefix
    )
    target = kept_idx.gather(1, dest.gather(1, pruned_idx))
    assert torch.isin(target_idx, kept_idx).all() and torch.isin(pruned_idx, candidate_idx).all()
    for b in range(x.shape[0]):
        similarity = cosines(
            x[b : b + 1], target_idx[b : b + 1, prefix:], candidate_idx[b : b + 1]
        )[0]
        if not similarity.numel() or not pruned_idx.shape[1]:
            continue
        chosen = cosines(x[b : b + 1], target[b : b + 1], pruned_idx[b : b + 1])[0].diagonal()
        best = similarity.max(1).values
        is_pruned = torch.isin(candidate_idx[b], pruned_idx[b])
        torch.testing.assert_close(chosen, best[is_pruned], rtol=0, atol=1e-5)
        assert torch.isin(target[b], target_idx[b, prefix:]).all()
        if not is_pruned.all():
            assert best[is_pruned].min() + 1e-5 >= best[~is_pruned].max()


@slow_interpreted
@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize("shape", MERGES)
def test_cost_scale_weighs_the_distance_to_the_nearest_target(backend, shape, dtype):
    x, target_idx, candidate_idx, sizes, keep, prefix = problem(shape, dtype, backend.device)
    cost_scale = torch.randn(x.shape[:2], device=x.device).exp()
    plain = backend.merge(x, target_idx, candidate_idx, sizes, keep, prefix)
    _, kept_idx, pruned_idx, _, dest = backend.merge(
        x, target_idx, candidate_idx, sizes, keep, prefix, cost_scale
    )
    ones = backend.merge(
        x, target_idx, candidate_idx, sizes, keep, prefix, torch.ones_like(cost_scale)
    )
    assert all(torch.equal(got, expected) for got, expected in zip(ones, plain))
    assert torch.isin(target_idx, kept_idx).all() and torch.isin(pruned_idx, candidate_idx).all()
    for b in range(x.shape[0]):
        similarity = cosines(
            x[b : b + 1], target_idx[b : b + 1, prefix:], candidate_idx[b : b + 1]
        )[0]
        if not similarity.numel() or not pruned_idx.shape[1]:
            continue
        cost = (1 - similarity.max(1).values).clamp_min(0) * cost_scale[
            b, candidate_idx[b]
        ].double()
        is_pruned = torch.isin(candidate_idx[b], pruned_idx[b])
        targets = kept_idx[b, dest[b, pruned_idx[b]]]
        chosen = cosines(x[b : b + 1], targets[None], pruned_idx[b : b + 1])[0].diagonal()
        torch.testing.assert_close(chosen, similarity.max(1).values[is_pruned], rtol=0, atol=1e-5)
        if not is_pruned.all():
            assert cost[is_pruned].max() <= cost[~is_pruned].min() + 1e-4


@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize("shape", MERGES)
def test_rows_without_merged_tokens_are_exact_copies(backend, shape, dtype):
    x, target_idx, candidate_idx, sizes, keep, prefix = problem(shape, dtype, backend.device)
    kept, kept_idx, _, kept_sizes, _ = backend.merge(
        x, target_idx, candidate_idx, sizes, keep, prefix
    )
    alone = kept_sizes == sizes.gather(1, kept_idx)
    assert same_bits(kept[alone], reference.gather(x, kept_idx)[alone])


@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize("dim", [48, 1200])  # 1200 columns are more than a program takes at a time
def test_norms_are_those_of_the_targets_and_all_tokens_are_counted(backend, dim, dtype):
    x, target_idx, candidate_idx, sizes, keep, _ = problem(
        (2, 40, dim, 20, 25, 1), dtype, backend.device
    )
    kept, kept_idx, _, kept_sizes, _ = backend.merge(x, target_idx, candidate_idx, sizes, keep, 1)
    assert (kept_sizes > sizes.gather(1, kept_idx)).any()
    before = reference.gather(x, kept_idx).double().norm(dim=2)
    torch.testing.assert_close(kept.double().norm(dim=2), before, **TOLERANCE[dtype])
    assert torch.equal(kept_sizes.sum(1), sizes.sum(1))


def pair(backend, target, other):
    """Return `target` (D,) after `other` (D,) is merged into it, its only candidate."""
    x = torch.stack([torch.ones_like(target), target, other])[None].to(backend.device)
    sizes = torch.tensor([[2.0, 1.0, 1.0]], device=x.device)
    target_idx, candidate_idx = (torch.tensor([at], device=x.device) for at in ([0, 1], [2]))
    kept, _, _, kept_sizes, dest = backend.merge(x, target_idx, candidate_idx, sizes, 2, 1)
    assert dest.tolist() == [[0, 1, 1]] and kept_sizes.tolist() == [[2.0, 2.0]]
    parent = torch.arange(3, device=x.device)[None].clone()
    backend.merge_(x, target_idx, candidate_idx, sizes, parent, 2, 1)
    assert same_bits(x[:, :2], kept)
    return kept[0, 1].cpu()


@pytest.mark.parametrize("dim", [40, 1200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_without_a_norm_that_fits_stays_the_mean(backend, dim, dtype):
    x, y = torch.randn(2, dim, dtype=dtype)
    zero = torch.zeros(dim, dtype=dtype)
    assert not pair(backend, x, -x).any(), "the mean is zero"
    assert not pair(backend, zero, y).any(), "the target is zero, and stays it"
    huge = 1e20 if dtype == torch.float32 else 1e160
    exact = {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(
        pair(backend, huge * x, huge * y), (huge * x + huge * y) / 2, **exact
    )
    torch.testing.assert_close(pair(backend, huge * x, y), huge * x / 2 + y / 2, **exact)
    torch.testing.assert_close(pair(backend, x, huge * y), x / 2 + huge * y / 2, **exact)
    for value in (float("inf"), float("nan")):
        y[3] = value
        torch.testing.assert_close(pair(backend, x, y), (x + y) / 2, equal_nan=True, **exact)


def test_gradients_are_those_of_the_definition():
    x, target_idx, candidate_idx, sizes, keep, prefix = problem(
        (2, 12, 7, 5, 7, 1), torch.float64, "cpu"
    )
    edges = x.clone()
    edges[0, target_idx[0, 1:]] = 0.0  # targets without a norm
    edges[1, target_idx[1, 1:]], edges[1, candidate_idx[1]] = 1.0, -1.0  # means without one
    for values in (x, edges):
        grads = []
        for module in (torch.ops.cropr, reference):
            leaf = values.clone().requires_grad_()
            kept = module.merge(leaf, target_idx, candidate_idx, sizes.fill_(1.0), keep, prefix)[0]
            weight = torch.linspace(-1, 1, kept.numel(), dtype=kept.dtype).view_as(kept)
            grads += torch.autograd.grad((kept * weight).sum(), leaf)
        assert grads[0].isfinite().all()
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_every_type_are_near_those_of_float64(dtype):
    x, *rest = problem((2, 20, 33, 9, 12, 1), dtype, "cpu")
    grads = []
    for leaf in (x.clone().requires_grad_(), x.double().requires_grad_()):
        kept = torch.ops.cropr.merge(leaf, *rest)[0]
        grads.append(torch.autograd.grad((kept * kept.detach().sin()).sum(), leaf)[0])
        assert grads[-1].dtype == leaf.dtype
    torch.testing.assert_close(grads[0], grads[1].to(dtype), rtol=5e-2, atol=5e-2)


def test_ties_go_to_the_lowest_target_and_nan_is_like_none(backend):
    x = torch.ones(1, 80, 16, device=backend.device)
    target_idx, candidate_idx = (
        torch.arange(60, device=x.device)[None],
        torch.arange(60, 80, device=x.device)[None],
    )
    sizes = torch.ones(1, 80, device=x.device)

    def run():
        _, _, pruned_idx, _, dest = backend.merge(x, target_idx, candidate_idx, sizes, 70, 2)
        return pruned_idx[0].tolist(), dest[0, pruned_idx[0]].tolist()

    # Of equal candidates the highest positions are pruned
    assert run() == (list(range(70, 80)), [2] * 10)
    x[0, 2, 3] = float("nan")  # like none
    x[0, 3] = 0.0  # nor is this
    x[0, 75] = 0.0  # and this is the last to be pruned
    assert run() == ([69, *range(70, 75), *range(76, 80)], [4] * 10)
    x[:] = float("nan")
    assert run() == (list(range(70, 80)), [2] * 10)


def test_no_cost_scale_keeps_equal_tokens_apart_and_nan_goes_last(backend):
    x = torch.eye(8, device=backend.device)[[0, 0, 0, 0, 1, 2, 3, 3, 4]][None]
    target_idx, candidate_idx = (
        torch.arange(2, device=x.device)[None],
        torch.arange(2, 9, device=x.device)[None],
    )
    sizes, cost_scale = torch.ones(1, 9, device=x.device), torch.ones(1, 9, device=x.device)

    def pruned(keep):
        return backend.merge(x, target_idx, candidate_idx, sizes, keep, 0, cost_scale)[2][
            0
        ].tolist()

    assert pruned(8) == [3] and pruned(7) == [2, 3]  # a token equal to a target costs nothing
    cost_scale[0, 3] = 1e30
    assert pruned(8) == [3] and pruned(7) == [2, 3]
    cost_scale[0, 5], cost_scale[0, 7] = 0.5, 1e-30
    assert pruned(6) == [2, 3, 7] and pruned(5) == [2, 3, 5, 7]
    assert pruned(4) == [2, 3, 5, 7, 8]  # of equal costs the higher position
    x[0, 7] = float("nan")
    # NaN is merged last, at any cost scale
    assert pruned(4) == [2, 3, 5, 6, 8] and pruned(3) == [2, 3, 4, 5, 6, 8]
    cost_scale[0, 4] = float("inf")
    assert pruned(3) == [2, 3, 5, 6, 7, 8]
    cost_scale[0, 4] = float("nan")  # illegal, but must do no harm
    assert pruned(3) == [2, 3, 5, 6, 7, 8] and pruned(2) == list(range(2, 9))


@slow_interpreted
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 600, 16, 488, 525, 1), torch.float32),
        ((1, 600, 16, 300, 450, 1), torch.float64),
        # More of everything than a program takes at a time
        ((1, 2300, 16, 1030, 1240, 3), torch.float32),
    ],
)
def test_long_lists_match_the_definition(kernels, shape, dtype):
    x, target_idx, candidate_idx, sizes, keep, prefix = problem(shape, dtype, kernels.device)
    x = x.sign()  # products, lengths and cosines are exact, and many are equal
    cost_scales = [None, torch.rand(x.shape[:2], device=x.device) + 0.5]
    if kernels.interpreted and shape[1] > 1000:  # half a minute a call, with or without them
        del cost_scales[0]
    for cost_scale in cost_scales:
        kept, *lists = kernels.merge(x, target_idx, candidate_idx, sizes, keep, prefix, cost_scale)
        expected, *expected_lists = reference.merge(
            x, target_idx, candidate_idx, sizes, keep, prefix, cost_scale
        )
        assert all(
            torch.equal(got, expected_list)
            for got, expected_list in zip(lists, expected_lists, strict=True)
        )
        torch.testing.assert_close(kept, expected, rtol=1e-6, atol=1e-6)


def test_every_layout_gives_the_same_bits(backend):
    x, target_idx, candidate_idx, sizes, keep, _ = problem(
        (2, 50, 96, 20, 30, 1), torch.float32, backend.device
    )
    cost_scale = torch.rand(x.shape[:2], device=x.device) + 0.5
    plain = backend.merge(x, target_idx, candidate_idx, sizes, keep, 1, cost_scale)
    *flipped, cost_scale = [
        part.t().contiguous().t() for part in (target_idx, candidate_idx, sizes, cost_scale)
    ]
    for name, odd in odd_layouts(x).items():
        for got, expected in zip(backend.merge(odd, *flipped, keep, 1, cost_scale), plain):
            assert torch.equal(got, expected), name


@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize("shape", MERGES)
def test_in_place_changes_the_targets_and_nothing_else(backend, shape, dtype):
    batch, n, dim = shape[:3]
    x, target_idx, candidate_idx, sizes, keep, prefix = problem(shape, dtype, backend.device)
    cost_scale = torch.randn(batch, n, device=x.device).exp()
    expected, kept_at, pruned_at, expected_sizes, dest = backend.merge(
        x, target_idx, candidate_idx, sizes, keep, prefix, cost_scale
    )
    # The same tokens in a longer buffer, between tokens pruned before.
    at = torch.arange(n, device=x.device) * 2 + 1
    buffer, buffer_sizes = (
        x.new_full((batch, 2 * n + 1, dim), 7.0),
        sizes.new_full((batch, 2 * n + 1), 3.0),
    )
    buffer_cost_scale = torch.full_like(buffer_sizes, float("nan"))
    buffer[:, at], buffer_sizes[:, at], buffer_cost_scale[:, at] = x, sizes, cost_scale
    identity = torch.arange(2 * n + 1, device=x.device).expand(batch, -1)
    parent, before, sizes_before = identity.clone(), buffer.clone(), buffer_sizes.clone()
    kept_idx, pruned_idx, got_sizes = backend.merge_(
        buffer,
        at[target_idx],
        at[candidate_idx],
        buffer_sizes,
        parent,
        keep,
        prefix,
        False,
        buffer_cost_scale,
    )
    assert torch.equal(kept_idx, at[kept_at]) and torch.equal(pruned_idx, at[pruned_at])
    assert torch.equal(got_sizes, expected_sizes)
    assert same_bits(reference.gather(buffer, kept_idx), expected)
    assert torch.equal(buffer_sizes.gather(1, kept_idx), expected_sizes)
    assert torch.equal(parent.gather(1, pruned_idx), kept_idx.gather(1, dest.gather(1, pruned_at)))
    untouched = torch.ones(batch, 2 * n + 1, dtype=torch.bool, device=x.device).scatter(
        1, kept_idx, False
    )
    assert same_bits(buffer[untouched], before[untouched])
    assert torch.equal(buffer_sizes[untouched], sizes_before[untouched])
    here = torch.ones_like(untouched).scatter(1, pruned_idx, False)
    assert torch.equal(parent[here], identity[here])


@slow_interpreted
def test_every_run_gives_the_same_bits(kernels):
    batch = 1 if kernels.interpreted else 4
    x, *rest, keep, prefix = problem((batch, 197, 64, 80, 100, 1), torch.float32, kernels.device)
    first = kernels.merge(x, *rest, keep, prefix)
    for _ in range(2 if kernels.interpreted else 20):
        for got, expected in zip(kernels.merge(x, *rest, keep, prefix), first):
            assert torch.equal(got, expected)
