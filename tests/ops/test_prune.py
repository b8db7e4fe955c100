"""cropr::scores, prune, gather and restore: values, bits, layouts."""

import pytest
import torch
from helpers.cases import DTYPES, SHAPES, odd_layouts, same_bits, slow_interpreted, tokens

from cropr_kernels.ops import reference

pytestmark = pytest.mark.kernels


def pytorch_error(x, query, exact):
    """Return the largest error of PyTorch's product in the dtype of x."""
    plain = (x @ query.to(x.dtype)).double()
    return (plain - exact).abs().max().item() if plain.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_at_most_twice_as_wrong_as_pytorch(backend, shape, dtype):
    batch, n, dim, *_ = shape
    x, query = (
        tokens(batch, n, dim, dtype, backend.device),
        torch.randn(dim, device=backend.device).to(dtype),
    )
    got = backend.scores(x, query)
    assert got.dtype == torch.float32 and got.shape == (batch, n)
    exact = x.double() @ query.double()
    # The result itself is float32
    rounding = exact.abs().max().item() * 2**-24 if exact.numel() else 0.0
    error = (got.double() - exact).abs().max().item() if exact.numel() else 0.0
    assert error <= 2 * pytorch_error(x, query, exact) + rounding


def test_infinite_and_nan_tokens_score_infinity_and_nan(backend):
    x = torch.ones(1, 3, 70, device=backend.device)
    x[0, 0, 69], x[0, 1, 3] = float("inf"), float("nan")
    for dtype in DTYPES:
        got = backend.scores(x.to(dtype), torch.ones(70, device=backend.device))[0]
        assert got[0] == float("inf") and got[1].isnan() and got[2] == 70


@pytest.mark.parametrize("query_dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_many_queries_score_like_their_sum(backend, count, query_dtype):
    x = tokens(2, 30, 40, torch.float32, backend.device)
    queries = torch.randn(count, 40, device=backend.device).to(query_dtype)
    exact = x.double() @ queries.double().sum(0)
    torch.testing.assert_close(backend.scores(x, queries).double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        backend.scores(x, queries.t().contiguous().t()).double(), exact, rtol=1e-5, atol=1e-4
    )


def test_half_precision_conversion_is_exact(backend):
    every_half = torch.arange(
        -(2**15), 2**15, 97 if backend.interpreted else 1, dtype=torch.int32
    ).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = every_half.view(dtype).to(backend.device)
        if backend.interpreted:  # it flushes bfloat16 subnormals
            values = torch.where(values.float().abs() < torch.finfo(dtype).tiny, 0, values)
        x = torch.zeros(1, values.numel(), 16, dtype=dtype, device=backend.device)
        for column in (0, 1):  # even and odd elements take different roads
            x.zero_()[0, :, column] = values
            query = torch.zeros(16, device=backend.device)
            query[column] = 1.0
            torch.testing.assert_close(
                backend.scores(x, query)[0], values.float(), rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prune_copies_bits_and_restore_undoes_it(backend, shape, dtype):
    batch, n, dim, num_keep, num_prefix = shape
    x, query = tokens(batch, n, dim, dtype, backend.device), torch.randn(dim, device=backend.device)
    kept, kept_idx, pruned, pruned_idx = backend.prune(x, query, num_keep, num_prefix)
    assert kept.shape == (batch, num_keep, dim) and pruned.shape == (batch, n - num_keep, dim)
    selected = backend.select(backend.scores(x, query), num_keep, num_prefix)
    assert torch.equal(kept_idx, selected[0]) and torch.equal(pruned_idx, selected[1])
    assert same_bits(kept, reference.gather(x, kept_idx)) and same_bits(
        pruned, reference.gather(x, pruned_idx)
    )
    assert same_bits(backend.gather(x, kept_idx), kept)
    assert same_bits(backend.restore(kept, kept_idx, pruned, pruned_idx), x)
    assert same_bits(backend.restore(pruned, pruned_idx, kept, kept_idx), x)


def test_nan_payloads_and_signed_zeros_survive(kernels):
    x = (
        torch.randint(-(2**31), 2**31, (2, 20, 32), dtype=torch.int64)
        .to(torch.int32)
        .view(torch.float32)
    )
    x = x.to(kernels.device)
    kept, kept_idx, pruned, pruned_idx = kernels.prune(
        x, torch.zeros(32, device=kernels.device), 7, 1
    )
    assert same_bits(kernels.restore(kept, kept_idx, pruned, pruned_idx), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout_gives_the_same_bits(kernels, dtype):
    x, query = tokens(3, 21, 34, dtype, kernels.device), torch.randn(34, device=kernels.device)
    expected = kernels.prune(x, query, 11, 1)
    for name, view in odd_layouts(x).items():
        got = kernels.prune(view, query, 11, 1)
        assert all(torch.equal(a, b) for a, b in zip(got, expected)), name
        assert torch.equal(kernels.scores(view, query), kernels.scores(x, query)), name
        assert torch.equal(kernels.gather(view, expected[1]), expected[0]), name
    image = x[:1]
    for a, b in zip(
        kernels.prune(image.expand(3, -1, -1), query, 11, 1), kernels.prune(image, query, 11, 1)
    ):
        assert torch.equal(a, b.expand_as(a))
    kept, kept_idx, pruned, pruned_idx = expected
    for name, view in odd_layouts(kept).items():
        assert torch.equal(kernels.restore(view, kept_idx, pruned, pruned_idx), x), name
    strided_idx = kept_idx.t().contiguous().t()
    assert torch.equal(kernels.restore(kept, strided_idx, pruned, pruned_idx), x)


def test_restore_takes_positions_in_any_order(backend):
    x, order = (
        tokens(2, 30, 16, torch.float32, backend.device),
        torch.stack([torch.randperm(30) for _ in range(2)]),
    )
    order = order.to(backend.device)
    parts = reference.gather(x, order)
    got = backend.restore(
        parts[:, :13], order[:, :13].contiguous(), parts[:, 13:], order[:, 13:].contiguous()
    )
    assert same_bits(got, x)


def test_gather_takes_repeated_positions(backend):
    x, idx = (
        tokens(2, 9, 8, torch.float32, backend.device),
        torch.tensor([[3, 3, 0], [8, 1, 8]], device=backend.device),
    )
    assert same_bits(backend.gather(x, idx), reference.gather(x, idx))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 257, 96), (1, 1031, 101)])
def test_thread_count_does_not_change_bits(shape, dtype):
    x, query = tokens(*shape, dtype, "cpu"), torch.randn(5, shape[2])
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results.append(
                (torch.ops.cropr.scores(x, query), *torch.ops.cropr.prune(x, query, 100, 1))
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_more_than_two_billion_elements_are_addressed(kernels):
    """Strides reach past 2^31 elements, in a view of few rows that are very far apart."""
    if kernels.interpreted:
        pytest.skip("the interpreter addresses with Python integers")
    n, dim = 9, 16
    spread = 2**28
    try:
        base = torch.empty(n * spread, dtype=torch.bfloat16, device=kernels.device)
    except RuntimeError:
        pytest.skip("not enough memory for a 4.8 GB buffer")
    x = base.as_strided((1, n, dim), (0, spread, 1))
    values = torch.randn(1, n, dim, device=kernels.device).bfloat16()
    x.copy_(values)
    query = torch.randn(dim, device=kernels.device)
    for a, b in zip(kernels.prune(x, query, 4, 1), kernels.prune(values, query, 4, 1)):
        assert torch.equal(a, b)


@slow_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_split_is_prune_with_known_scores(backend, shape, dtype):
    batch, n, dim, keep, prefix = shape
    x, query = tokens(batch, n, dim, dtype, backend.device), torch.randn(dim, device=backend.device)
    known = backend.scores(x, query)
    for scores in (known, known.t().contiguous().t()):
        got = backend.split(x, scores, keep, prefix)
        for a, b in zip(got, backend.prune(x, query, keep, prefix)):
            assert same_bits(a, b) if a.is_floating_point() else torch.equal(a, b)


@slow_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1030, 8, 700, 1)])
def test_prune_and_split_heed_priority(backend, shape, dtype):
    batch, n, dim, num_keep, num_prefix = shape
    x, query = tokens(batch, n, dim, dtype, backend.device), torch.randn(dim, device=backend.device)
    scores = backend.scores(x, query)
    for priority in (
        torch.randint(-1, 2, (batch, n), dtype=torch.int8),
        torch.rand(batch, n) > 0.7,
    ):
        on_device = priority.to(backend.device)
        chosen = backend.select(scores, num_keep, num_prefix, on_device)
        split = backend.split(x, scores, num_keep, num_prefix, on_device)
        for got in (backend.prune(x, query, num_keep, num_prefix, on_device), split):
            assert torch.equal(got[1], chosen[0]) and torch.equal(got[3], chosen[1])
            assert same_bits(got[0], reference.gather(x, got[1])) and same_bits(
                got[2], reference.gather(x, got[3])
            )


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 777, 1021), torch.float32),
        ((1, 2400, 2047), torch.bfloat16),
        ((40, 61, 512), torch.float64),
    ],
)
def test_rows_that_are_written_past_the_caches_keep_every_bit(backend, shape, dtype):
    if backend.interpreted:
        pytest.skip("millions of elements")
    x = torch.empty(shape[0] * shape[1] * shape[2] + 3, dtype=dtype, device=backend.device)[
        3:
    ].view(shape)
    x.copy_(torch.randn(shape))
    assert x.numel() * x.element_size() >= 8 << 20
    kept, kept_idx, pruned, pruned_idx = backend.prune(
        x, torch.randn(shape[2], device=backend.device), shape[1] // 2, 1
    )
    assert same_bits(kept, reference.gather(x, kept_idx)) and same_bits(
        pruned, reference.gather(x, pruned_idx)
    )
    assert same_bits(backend.restore(kept, kept_idx, pruned, pruned_idx), x)
    everything = torch.cat([pruned_idx, kept_idx], 1)
    assert same_bits(backend.gather(x, everything), torch.cat([pruned, kept], 1))
