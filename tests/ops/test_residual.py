"""The residual buffer of the engine: cropr::gather_norm, add_, add_norm_, add_select_, rotate_."""

import pytest
import torch
from helpers.cases import DTYPES, odd_layouts, same_bits, tokens
from torch.nn.functional import rms_norm

from cropr_kernels.ops import reference

pytestmark = pytest.mark.kernels

# (B, N, D, K); K = None: no idx
SHAPES = [
    (1, 1, 1, None),
    (2, 5, 8, 3),
    (3, 17, 33, 9),
    (2, 50, 96, None),
    (2, 40, 100, 40),
    (1, 197, 192, 120),
    (2, 9, 6, 0),
    (0, 10, 16, 4),
]
MANY = (2, 1300, 16, 1100)  # more than the last program of an image selects from
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}


def active(batch, n, count, device):
    """Return random ascending positions (B, K), or None."""
    if count is None:
        return None
    order = (
        torch.stack([torch.randperm(n)[:count] for _ in range(batch)])
        if batch
        else torch.empty(0, count).long()
    )
    return order.sort(1).values.to(device)


def problem(shape, dtype, device):
    """Return x, idx, update, gamma, weight, bias."""
    batch, n, dim, count = shape
    gamma, weight, bias = (torch.randn(dim, device=device).to(dtype) for _ in range(3))
    x, update = (
        tokens(batch, n, dim, dtype, device),
        tokens(batch, n if count is None else count, dim, dtype, device),
    )
    return x, active(batch, n, count, device), update, gamma, weight, bias


def rounded_once(backend, dtype):
    """Return whether sums must be equal bit for bit: the interpreter rounds 16-bit sums
    differently."""
    return not (backend.interpreted and dtype in (torch.bfloat16, torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gather_norm_is_layer_norm_of_the_rows(backend, shape, dtype):
    x, idx, _, _, weight, bias = problem(shape, dtype, backend.device)
    for parts in ((weight, bias), (weight, None), (None, bias), (None, None)):
        got = backend.gather_norm(x, idx, *parts, 1e-6)
        assert got.dtype == dtype and got.is_contiguous()
        torch.testing.assert_close(
            got, reference.gather_norm(x, idx, *parts, 1e-6), **TOLERANCE[dtype]
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_with_rms_are_rms_norm_of_the_rows(backend, shape, scaled, dtype):
    x, idx, update, gamma, weight, bias = problem(shape, dtype, backend.device)
    gamma = gamma if scaled else None
    added = x.clone()
    backend.add_(added, idx, update, gamma)
    rows = (added if idx is None else reference.gather(added, idx)).double()
    for scale, shift in ((weight, None), (None, None), (weight, bias), (None, bias)):
        expected = rms_norm(rows, rows.shape[-1:], None if scale is None else scale.double(), 1e-6)
        expected = (expected if shift is None else expected + shift.double()).to(dtype)
        changed = x.clone()
        got = backend.add_norm_(changed, idx, update, gamma, scale, shift, 1e-6, True)
        assert same_bits(changed, added)
        for normed in (got, backend.gather_norm(added, idx, scale, shift, 1e-6, True)):
            assert normed.dtype == dtype and normed.is_contiguous()
            torch.testing.assert_close(normed, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize(
    "layout", ["transposed", "batch inside", "every other column", "odd storage offset"]
)
def test_gather_norm_takes_any_layout(backend, layout):
    x, idx, *_ = problem((2, 50, 96, 20), torch.float32, backend.device)
    odd = odd_layouts(x)[layout]
    flipped = idx.t().contiguous().t()
    for rms in (False, True):
        args = None, None, 1e-6, rms
        assert same_bits(
            backend.gather_norm(odd, flipped, *args), backend.gather_norm(x, idx, *args)
        )


def test_the_norm_of_large_and_constant_rows_is_accurate(backend):
    x = torch.full((1, 3, 64), 7.0, device=backend.device)
    x[0, 1] = 100 + torch.randn(64, device=backend.device)
    x[0, 2, 5] = float("nan")
    got = backend.gather_norm(x, None, None, None, 1e-6)
    assert (got[0, 0] == 0).all() and got[0, 2].isnan().all()
    torch.testing.assert_close(
        got[0, 1], reference.gather_norm(x.double(), None, None, None, 1e-6)[0, 1].float()
    )
    x[0, 1] = 0
    got = backend.gather_norm(x, None, None, None, 1e-6, True)
    torch.testing.assert_close(got[0, 0], torch.ones_like(got[0, 0]))
    assert (got[0, 1] == 0).all() and got[0, 2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_add_changes_the_rows_at_idx_and_no_other(backend, shape, scaled, dtype):
    x, idx, update, gamma, weight, bias = problem(shape, dtype, backend.device)
    gamma = gamma if scaled else None
    expected, got, normed = x.clone(), x.clone(), x.clone()
    reference.add_(expected, idx, update, gamma)
    assert backend.add_(got, idx, update, gamma) is None
    if idx is not None:
        untouched = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device).scatter(
            1, idx, False
        )
        assert same_bits(got[untouched], x[untouched])
    if rounded_once(backend, dtype) and not scaled:
        assert same_bits(got, expected)
    torch.testing.assert_close(got, expected, **TOLERANCE[dtype])
    out = backend.add_norm_(normed, idx, update, gamma, weight, bias, 1e-6)
    assert same_bits(normed, got)
    torch.testing.assert_close(
        out, reference.gather_norm(got, idx, weight, bias, 1e-6), **TOLERANCE[dtype]
    )


def test_updates_of_another_width_are_added_in_full(backend):
    x, idx, update, gamma, *_ = problem((2, 17, 40, 9), torch.float32, backend.device)
    got, expected = x.clone(), x.clone()
    half = update.bfloat16()
    backend.add_(got, idx, half, gamma.double())
    reference.add_(expected, idx, half.float(), gamma)
    torch.testing.assert_close(got, expected)
    flipped = update.transpose(1, 2).contiguous().transpose(1, 2)
    plain = x.clone()
    backend.add_(plain, idx, update, None)
    backend.add_(x, idx, flipped, None)
    assert same_bits(x, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(
    "shape", [(2, 5, 8, 5), (3, 17, 33, 9), (2, 50, 96, None), (1, 197, 192, 150), (0, 10, 16, 7)]
)
def test_add_select_composes_positions(backend, shape, prefix, dtype):
    x, idx, update, gamma, *_ = problem(shape, dtype, backend.device)
    query = torch.randn(shape[2], device=backend.device)
    count = update.shape[1]
    for keep in {count, (count + prefix) // 2, prefix}:
        added, got = x.clone(), x.clone()
        backend.add_(added, idx, update, gamma)
        kept, pruned = backend.add_select_(got, idx, update, gamma, query, keep, prefix)
        assert same_bits(got, added)
        rows = got if idx is None else reference.gather(got, idx)
        expected = backend.select(backend.scores(rows, query), keep, prefix)
        for positions, local in zip((kept, pruned), expected):
            assert torch.equal(positions, local if idx is None else idx.gather(1, local))


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(
    "shape", [(3, 17, 33, 9), (2, 50, 96, None), (1, 197, 192, 150), (2, 7, 8, 7), MANY]
)
def test_add_select_favors_tokens_that_stand_for_many(backend, shape, prefix):
    x, idx, update, gamma, *_ = problem(shape, torch.float32, backend.device)
    query = torch.randn(shape[2], device=backend.device)
    count = update.shape[1]
    sizes = torch.randint(1, 9, x.shape[:2], device=backend.device).float()
    added = x.clone()
    backend.add_(added, idx, update, gamma)
    rows = added if idx is None else reference.gather(added, idx)
    active_sizes = sizes if idx is None else sizes.gather(1, idx)
    scores = backend.scores(rows, query).double()
    spread = scores[:, prefix:].std(1, correction=0, keepdim=True) if prefix < count else 0.0
    adjusted = scores + 1.5 * spread * active_sizes.double().log()
    keep = (count + prefix) // 2
    kept, pruned = backend.add_select_(x, idx, update, gamma, query, keep, prefix, sizes, 1.5)
    positions = (
        torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if idx is None else idx
    )
    is_kept = (positions.unsqueeze(2) == kept.unsqueeze(1)).any(2)
    assert is_kept[:, :prefix].all() and (is_kept.sum(1) == keep).all()
    assert torch.equal(torch.cat([kept, pruned], 1).sort(1).values, positions)
    lowest = adjusted.masked_fill(~is_kept, float("inf"))[:, prefix:].amin(1)
    assert (lowest + 1e-4 >= adjusted.masked_fill(is_kept, -float("inf")).amax(1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size_weight", [None, 0.0, 1.5])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(
    "shape",
    [(3, 17, 33, 9), (2, 50, 96, None), (1, 197, 192, 150), (2, 7, 8, 5), (0, 10, 16, 7), MANY],
)
def test_add_select_writes_the_cost_scale_of_patches(backend, shape, prefix, size_weight, dtype):
    x, idx, update, gamma, *_ = problem(shape, dtype, backend.device)
    query = torch.randn(shape[2], device=backend.device)
    count = update.shape[1]
    cost_scale = torch.full(x.shape[:2], 7.0, device=backend.device)
    sizes = torch.randint(1, 9, x.shape[:2], device=backend.device).float()
    parts = (None, 0.0) if size_weight is None else (sizes, size_weight)
    keep = (count + prefix) // 2
    plain, expected = (
        backend.add_select_(x.clone(), idx, update, gamma, query, keep, prefix, *parts),
        cost_scale.clone(),
    )
    got = backend.add_select_(
        x, idx, update, gamma, query, keep, prefix, *parts, None, cost_scale, 0.5
    )
    assert all(torch.equal(a, b) for a, b in zip(got, plain))
    at = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if idx is None else idx
    if prefix < count and len(x):
        scores = backend.scores(reference.gather(x, at), query).double()
        patches = scores[:, prefix:]
        spread = patches.std(1, correction=0, keepdim=True)
        if size_weight:
            scores = scores + size_weight * spread * sizes.gather(1, at).double().log()
        scale = (0.5 * (scores[:, prefix:] - patches.mean(1, keepdim=True)) / spread).exp()
        scale = torch.where(spread > 0, scale, torch.ones_like(scale))
        expected.scatter_(1, at[:, prefix:], scale.float())
    torch.testing.assert_close(cost_scale, expected, rtol=2e-4, atol=1e-6)
    again = torch.full_like(cost_scale, 7.0)
    reference.add_select_(
        x, idx, torch.zeros_like(update), None, query, keep, prefix, *parts, None, again, 0.5
    )  # fmt: skip
    torch.testing.assert_close(cost_scale, again, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [None, 3.0])
def test_cost_scales_are_one_without_a_spread_and_always_finite_and_positive(backend, sizes):
    x = torch.full((4, 20, 8), 0.1, device=backend.device)
    x[1, 7, 0] = float("nan")
    x[2, 8, 0] = float("inf")
    x[3] = torch.arange(20, device=backend.device)[:, None]
    query, update = torch.ones(8, device=backend.device), torch.zeros_like(x)
    parts = (
        (None, 0.0) if sizes is None else (torch.full((4, 20), sizes, device=backend.device), 2.0)
    )

    def cost_scale_of(weight, prefix=1):
        cost_scale = torch.full((4, 20), 7.0, device=backend.device)
        backend.add_select_(
            x.clone(), None, update, None, query, prefix, prefix, *parts, None, cost_scale, weight
        )
        return cost_scale

    cost_scale = cost_scale_of(0.25)
    assert (cost_scale[:, 0] == 7).all() and (cost_scale[:3, 1:] == 1).all()
    assert cost_scale[3, 1:].diff().min() > 0
    for weight in (1e4, -1e4):
        cost_scale = cost_scale_of(weight)[3, 1:]
        assert (
            cost_scale.isfinite().all()
            and (cost_scale > 0).all()
            and cost_scale.log().abs().max() > 50
        )
    assert (cost_scale_of(0.0)[:, 1:] == 1).all()
    assert (cost_scale_of(0.25, 20) == 7).all()  # nothing but prefix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(3, 17, 33, 9), (2, 50, 96, None), (1, 197, 192, 150), (0, 10, 16, 7), MANY]
)
def test_add_select_looks_priority_up_by_position(backend, shape, dtype):
    x, idx, update, gamma, *_ = problem(shape, dtype, backend.device)
    query = torch.randn(shape[2], device=backend.device)
    priority = torch.randint(-1, 2, x.shape[:2], dtype=torch.int8, device=backend.device)
    count = update.shape[1]
    for keep in (count, (count + 1) // 2, 2):
        got = x.clone()
        kept, pruned = backend.add_select_(
            got, idx, update, gamma, query, keep, 1, priority=priority
        )  # fmt: skip
        rows = got if idx is None else reference.gather(got, idx)
        active_priority = priority if idx is None else priority.gather(1, idx)
        expected = backend.select(backend.scores(rows, query), keep, 1, active_priority)
        for positions, local in zip((kept, pruned), expected):
            assert torch.equal(positions, local if idx is None else idx.gather(1, local))


def test_scores_without_a_spread_are_not_adjusted(backend):
    x = torch.randn(1, 20, 8, device=backend.device)
    query, update = (
        torch.randn(8, device=backend.device),
        torch.zeros(1, 20, 8, device=backend.device),
    )
    sizes = torch.randint(1, 9, (1, 20), device=backend.device).float()
    x[0, 7] = float("inf") * query.sign()
    plain = backend.add_select_(x, None, update, None, query, 9, 1)
    adjusted = backend.add_select_(x, None, update, None, query, 9, 1, sizes, 2.0)
    assert torch.equal(plain[0], adjusted[0])


def test_add_select_keeps_the_first_of_ties_and_ranks_nan_highest(backend):
    x = torch.zeros(2, 70, 16, device=backend.device)
    x[1, 40, 3] = float("nan")
    idx = active(2, 70, 60, backend.device)
    update, query = (
        torch.zeros(2, 60, 16, device=backend.device),
        torch.randn(3, 16, device=backend.device),
    )
    kept, _ = backend.add_select_(x, idx, update, None, query, 20, 1)
    assert torch.equal(kept[0], idx[0, :20])  # all tied: the lower positions stay
    assert (40 in idx[1]) == (40 in kept[1])  # NaN ranks highest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(2, 9, 3, 16, 1), (1, 20, 2, 64, 0), (3, 5, 1, 2, 5), (0, 4, 2, 8, 1), (2, 7, 3, 24, 2)],
)
def test_rotate_turns_the_patches_by_their_position(backend, shape, half, dtype):
    batch, count, heads, width, prefix = shape
    table = torch.randn(30, 2 * width, device=backend.device)
    prefixes = torch.arange(prefix, device=backend.device).expand(batch, -1)
    idx = torch.cat([prefixes, prefix + active(batch, 30, count - prefix, backend.device)], 1)
    for positions in (None, idx):
        qkv = tokens(batch * count, 3 * heads, width, dtype, backend.device).view(
            batch, count, 3 * heads, width
        )
        before, expected = qkv.clone(), qkv.clone()
        backend.rotate_(qkv[:, :, : 2 * heads], table, positions, prefix, half)
        reference.rotate_(expected[:, :, : 2 * heads], table, positions, prefix, half)
        assert same_bits(qkv[:, :, 2 * heads :], before[:, :, 2 * heads :])
        assert same_bits(qkv[:, :prefix], before[:, :prefix])
        torch.testing.assert_close(qkv, expected, **TOLERANCE[dtype])


def test_rotation_by_zero_changes_nothing_and_by_a_quarter_swaps_channels(backend):
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]], device=backend.device).view(1, 1, 1, 4)
    none, quarter = torch.tensor(
        [[0.0] * 4 + [1.0] * 4, [1.0] * 4 + [0.0] * 4], device=backend.device
    )[:, None]
    for half, expected in ((False, [-2.0, 1.0, -4.0, 3.0]), (True, [-3.0, -4.0, 1.0, 2.0])):
        turned = x.clone()
        backend.rotate_(turned, none, None, 0, half)
        assert torch.equal(turned, x)
        backend.rotate_(turned, quarter, None, 0, half)
        assert turned.flatten().tolist() == expected
