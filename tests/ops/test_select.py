"""cropr::select: exact, ascending and deterministic for any scores."""

import math

import pytest
import torch
from helpers.cases import DTYPES, INTERPRETED, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.kernels


def by_hand(scores, num_keep, num_prefix, priority=None):
    """Sort in Python: prefix, then priority, then NaN, then value, then position."""

    def rank(row, classes, position):
        first = (classes[position] > 0) - (classes[position] < 0)
        value = row[position] if first >= 0 else 0.0
        return (
            position >= num_prefix,
            -first,
            not math.isnan(value),
            0.0 if math.isnan(value) else -value,
            position,
        )

    classes = (torch.zeros(scores.shape) if priority is None else priority).tolist()
    kept = [
        sorted(sorted(range(len(row)), key=lambda i: rank(row, row_classes, i))[:num_keep])
        for row, row_classes in zip(scores.tolist(), classes)
    ]
    pruned = [sorted(set(range(scores.shape[1])) - set(row)) for row in kept]
    shape = scores.shape[0]
    return (
        torch.tensor(kept, dtype=torch.int64).view(shape, num_keep),
        torch.tensor(pruned, dtype=torch.int64).view(shape, scores.shape[1] - num_keep),
    )


def check(backend, scores, num_keep, num_prefix=0, priority=None):
    on_device = None if priority is None else priority.to(backend.device)
    kept, pruned = backend.select(scores.to(backend.device), num_keep, num_prefix, on_device)
    expected_kept, expected_pruned = by_hand(scores, num_keep, num_prefix, priority)
    assert kept.dtype == pruned.dtype == torch.int64
    assert torch.equal(kept.cpu(), expected_kept)
    assert torch.equal(pruned.cpu(), expected_pruned)


INF, NAN = float("inf"), float("nan")
HARD = {
    "all equal": [1.0] * 9,
    "all zero, mixed signs of zero": [0.0, -0.0, 0.0, -0.0, -0.0],
    "zeros among values": [-0.0, 1.0, 0.0, -1.0, -0.0, 0.0],
    "mixed signs": [-3.0, 2.0, -1.0, 0.0, 5.0, -8.0, 2.0],
    "infinities": [INF, -INF, 0.0, INF, -INF, 1.0],
    "only infinities": [-INF, INF, -INF, INF],
    "NaN": [NAN, 1.0, NAN, INF, -1.0, NAN],
    "only NaN": [NAN] * 5,
    "NaN of either sign": [math.copysign(NAN, -1.0), 1.0, NAN, INF],
    "one ulp apart": [1.0, math.nextafter(1.0, 2.0), 1.0, math.nextafter(1.0, 0.0)],
    "smallest float32 steps": [1e-45, 0.0, -1e-45, 1e-45],
    "largest": [3.4e38, -3.4e38, 3.39e38, INF],
    "ascending": [float(i) for i in range(12)],
    "descending": [float(-i) for i in range(12)],
    "ties in pairs": [1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 0.0, 0.0],
}


# The interpreter takes minutes for every count: there make test takes a few, make test-all all.
EVERY_COUNT = [False, pytest.param(True, marks=pytest.mark.slow)] if INTERPRETED else [True]


@pytest.mark.parametrize("every_count", EVERY_COUNT)
@pytest.mark.parametrize("name", HARD)
def test_hard_scores_keep_exactly_the_top(backend, name, every_count):
    scores = torch.tensor([HARD[name], HARD[name][::-1]])
    n = scores.shape[1]
    for num_keep in range(n + 1) if every_count else {n // 2}:
        prefixes = range(min(num_keep, 2) + 1)
        # Interpreted, make test-all takes them in turn, make test all of them in one count
        if backend.interpreted and every_count:
            prefixes = {min(num_keep, num_keep % 3)}
        for num_prefix in prefixes:
            check(backend, scores, num_keep, num_prefix)


@pytest.mark.parametrize("n", [1, 2, 3, 31, 32, 33, 197, 1024, 1025, 4097, 9216, 16385, 20000])
def test_selection_is_exact_for_any_number_of_tokens(backend, n):
    scores = torch.randint(-n // 3 - 1, n // 3 + 1, (2, n)).float()  # with ties
    for num_keep in {n // 3, n - 1} if backend.interpreted else {0, 1, n // 3, n - 1, n}:
        check(backend, scores, num_keep, min(num_keep, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_compared_at_the_precision_of_their_dtype(backend, dtype):
    scores = torch.randn(3, 130, dtype=torch.float64).to(dtype)
    if dtype == torch.float64:
        scores[:, 1] = scores[:, 0] + 1e-15  # a difference float32 does not have
    check(backend, scores, 51, 1)


def test_strided_expanded_and_empty_scores_are_selected_exactly(backend):
    scores = torch.randn(6, 80)
    check(backend, scores[::2, ::2], 11, 1)
    check(backend, scores.t(), 3)
    check(backend, scores[:1].expand(3, -1), 11)
    check(backend, scores[:0], 11)
    check(backend, scores[:, :0], 0)


@pytest.mark.parametrize("every_count", EVERY_COUNT)
@pytest.mark.parametrize("name", HARD)
def test_priority_comes_before_any_score(backend, name, every_count):
    scores = torch.tensor([HARD[name], HARD[name][::-1], HARD[name]])
    n = scores.shape[1]
    some = torch.randint(-1, 2, scores.shape, dtype=torch.int8)
    crowd = torch.where(torch.arange(n) % 3 == 0, -1, 5).to(torch.int8).expand(3, -1)
    for num_keep in {0, 1, 2, n // 2, n - 2, n - 1, n} if every_count else {n // 2}:
        for num_prefix in {0, min(num_keep, 2)}:
            priorities = [some, crowd] if num_prefix else [some, crowd, some > 0]
            if backend.interpreted and every_count:  # in turn
                priorities = [priorities[num_keep % len(priorities)]]
            for priority in priorities:
                check(backend, scores, num_keep, num_prefix, priority)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [33, 197, 4097, 9216])
def test_priority_decides_first_for_any_number_of_tokens(backend, n, dtype):
    scores = torch.randint(-20, 20, (2, n)).to(dtype)  # with ties
    priority = torch.randint(-1, 2, (n, 2), dtype=torch.int8).t()  # not contiguous
    ahead = int((priority[0] > 0).sum())
    around = {ahead - 2, ahead + 2}
    for num_keep in around if backend.interpreted else {1, *around, n - 1, n}:
        check(backend, scores, num_keep, 1, priority)


def test_no_priority_is_priority_zero(kernels):
    scores = torch.randn(3, 130, device=kernels.device)
    for zero in (torch.zeros(3, 130, dtype=torch.int8), torch.zeros(3, 130, dtype=torch.bool)):
        got = kernels.select(scores, 51, 1, zero.to(kernels.device))
        assert all(torch.equal(a, b) for a, b in zip(got, kernels.select(scores, 51, 1)))


def test_select_does_not_change_the_scores(kernels):
    scores = torch.tensor([[-0.0, NAN, 1.0]], device=kernels.device)
    before = scores.clone()
    kernels.select(scores, 2, 1)
    assert same_bits(scores, before)


def test_every_run_gives_the_same_bits(kernels):
    scores = torch.randint(0, 4, (5, 300)).float().to(kernels.device)
    first = kernels.select(scores, 100, 1)
    for _ in range(2 if kernels.interpreted else 50):
        assert all(torch.equal(a, b) for a, b in zip(first, kernels.select(scores, 100, 1)))


@settings(max_examples=40)
@given(st.data())
def test_selection_is_exact_for_random_shapes_and_values(backend, data):
    n = data.draw(st.integers(1, 70))
    num_keep = data.draw(st.integers(0, n))
    num_prefix = data.draw(st.integers(0, num_keep))
    values = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, INF, -INF, NAN])
    scores = torch.tensor([data.draw(st.lists(values, min_size=n, max_size=n))])
    priority = torch.tensor(
        [data.draw(st.lists(st.integers(-128, 127), min_size=n, max_size=n))], dtype=torch.int8
    )
    check(backend, scores, num_keep, num_prefix)
    check(backend, scores, num_keep, num_prefix, priority)


def test_on_cuda_the_number_of_tokens_has_a_limit():
    pytest.importorskip("triton", reason="Triton is not installed")
    from cropr_kernels.ops.triton.select import key_blocks

    with pytest.raises(
        RuntimeError, match="select: N must be at most 2097151 on CUDA, got 2097152"
    ):
        key_blocks(2**21)
