"""cropr::parent_offsets, parent_offsets_ and add_parents: pruned tokens change as their parents
do."""

import pytest
import torch
from helpers.cases import (
    INTERPRETED,
    MATRIX_DTYPES,
    SHAPES,
    odd_layouts,
    same_bits,
    slow_interpreted,
    tokens,
)

from cropr_kernels.ops import reference

pytestmark = pytest.mark.kernels

# (B, N, D, K, P); K = P has no parent
CASES = [shape for shape in SHAPES if shape[3] > shape[4] or shape[3] == shape[1]] + [
    (2, 150, 24, 70, 1)
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def problem(shape, dtype, device):
    """Return x, kept_idx, pruned_idx, num_prefix."""
    batch, n, dim, keep, prefix = shape
    x = tokens(batch, n, dim, dtype, device)
    return x, *reference.select(torch.randn(batch, n, device=device), keep, prefix), prefix


def chains(batch, n, device, length=9):
    """Return random parents (B, N) whose chains have at most `length` tokens; the last is its own
    parent."""
    parent, rank = torch.arange(n).repeat(batch, 1), torch.randint(0, length, (batch, n))
    for b in range(batch):
        for position in range(n):
            later = torch.nonzero(rank[b] > rank[b, position]).flatten()
            if len(later):
                parent[b, position] = later[torch.randint(len(later), ())]
    return parent.to(device)


@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize("shape", CASES)
def test_a_parent_is_the_most_similar_kept_token(backend, shape, dtype):
    x, kept_idx, pruned_idx, prefix = problem(shape, dtype, backend.device)
    offset, parent_idx = backend.parent_offsets(x, kept_idx, pruned_idx, prefix)
    assert (
        offset.dtype == dtype
        and offset.shape == (*pruned_idx.shape, x.shape[2])
        and offset.is_contiguous()
    )
    assert parent_idx.shape == pruned_idx.shape
    if not offset.numel():
        return
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    for b in range(len(x)):
        similarity = unit[b, pruned_idx[b]] @ unit[b, kept_idx[b, prefix:]].T
        chosen = (unit[b, pruned_idx[b]] * unit[b, parent_idx[b]]).sum(1)
        torch.testing.assert_close(chosen, similarity.max(1).values, rtol=0, atol=1e-5)
        assert torch.isin(parent_idx[b], kept_idx[b, prefix:]).all()
    wide = x.to(reference.accumulation_dtype(dtype))
    expected = (reference.gather(wide, pruned_idx) - reference.gather(wide, parent_idx)).to(dtype)
    assert same_bits(offset, expected)


def test_ties_go_to_the_lowest_parent_and_nan_is_like_none(backend):
    x = torch.ones(1, 80, 16, device=backend.device)
    kept_idx, pruned_idx = (
        torch.arange(60, device=x.device)[None],
        torch.arange(60, 80, device=x.device)[None],
    )

    def parents():
        return backend.parent_offsets(x, kept_idx, pruned_idx, 2)[1][0].tolist()

    assert parents() == [2] * 20
    x[0, 2, 3] = float("nan")  # like none
    x[0, 3] = 0.0  # nor is this
    assert parents() == [4] * 20
    x[:] = float("nan")
    assert parents() == [2] * 20


# Interpreted, a program takes 32 x 32 pairs: fewer pruned tokens, as many blocks of parents.
LONG = [(2, 600, 16, 488, 1), (1, 1340 if INTERPRETED else 2300, 16, 1240, 3)]


@slow_interpreted
@pytest.mark.parametrize("shape", LONG)
def test_long_lists_match_the_definition(kernels, shape):
    x, kept_idx, pruned_idx, prefix = problem(shape, torch.float32, kernels.device)
    x = x.sign()  # products, lengths and cosines are exact, and many are equal
    for got, expected in zip(
        kernels.parent_offsets(x, kept_idx, pruned_idx, prefix),
        reference.parent_offsets(x, kept_idx, pruned_idx, prefix),
    ):
        assert torch.equal(got, expected)


def test_every_layout_gives_the_same_bits(backend):
    x, kept_idx, pruned_idx, prefix = problem((2, 50, 96, 30, 1), torch.float32, backend.device)
    parent = chains(2, 50, backend.device)
    flipped = [part.t().contiguous().t() for part in (kept_idx, pruned_idx, parent)]
    plain, added = (
        backend.parent_offsets(x, kept_idx, pruned_idx, prefix),
        backend.add_parents(x, parent),
    )
    for name, odd in odd_layouts(x).items():
        for got, expected in zip(backend.parent_offsets(odd, *flipped[:2], prefix), plain):
            assert torch.equal(got, expected), name
        assert torch.equal(backend.add_parents(odd, flipped[2]), added), name


@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize("shape", CASES)
def test_in_place_changes_the_pruned_rows_and_nothing_else(backend, shape, dtype):
    x, kept_idx, pruned_idx, prefix = problem(shape, dtype, backend.device)
    batch, n, dim = x.shape
    offset, parent_idx = backend.parent_offsets(x, kept_idx, pruned_idx, prefix)
    # The same tokens in a longer buffer, between tokens pruned before.
    at = torch.arange(n, device=x.device) * 2 + 1
    buffer = x.new_full((batch, 2 * n + 1, dim), 7.0)
    buffer[:, at] = x
    parent = torch.full(buffer.shape[:2], -5, device=x.device)
    expected, expected_parent = buffer.clone(), parent.clone()
    backend.parent_offsets_(buffer, at[kept_idx], at[pruned_idx], parent, prefix)
    expected.scatter_(1, at[pruned_idx].unsqueeze(-1).expand_as(offset), offset)
    assert same_bits(buffer, expected)
    assert torch.equal(parent, expected_parent.scatter(1, at[pruned_idx], at[parent_idx]))


@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 9, 33), (3, 70, 96), (1, 197, 192), (0, 4, 8), (2, 0, 8), (2, 4, 0)]
)
def test_add_parents_adds_up_every_chain(backend, shape, dtype):
    x = tokens(*shape, dtype, backend.device)
    parent = chains(*shape[:2], backend.device)
    got = backend.add_parents(x, parent)
    assert got.dtype == dtype and got.shape == x.shape and got.is_contiguous()
    expected = x.double().clone()
    for b in range(shape[0]):
        for position in range(shape[1]):
            at = position
            while parent[b, at] != at:
                at = parent[b, at].item()
                expected[b, position] += x[b, at]
    torch.testing.assert_close(
        got.double(), expected, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype]
    )
    alone = parent == torch.arange(shape[1], device=x.device)
    assert same_bits(got[alone], x[alone])


def test_nan_reaches_only_its_descendants(backend):
    x = torch.zeros(1, 6, 40, device=backend.device)
    x[0, 2] = float("nan")
    parent = torch.tensor([[0, 2, 5, 4, 4, 5]], device=x.device)
    assert backend.add_parents(x, parent).isnan().all(-1).tolist() == [
        [False, True, True, False, False, False]
    ]


@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
def test_a_parent_that_was_pruned_later_is_restored_first(backend, dtype):
    """One token after the other, from the last pruning to the first: the token + (its parent now -
    its parent then)."""
    batch, n, dim, prefix = 2, 40, 32, 1
    buffer = tokens(batch, n, dim, dtype, backend.device)
    parent = torch.arange(n, device=buffer.device).repeat(batch, 1)
    idx, departures = parent.clone(), []
    for keep in (31, 22, 13, 6):
        # A block's update of the active tokens
        step = tokens(batch, idx.shape[1], dim, dtype, backend.device)
        buffer.scatter_(1, idx.unsqueeze(-1).expand_as(step), reference.gather(buffer, idx) + step)
        kept, pruned = reference.select(
            torch.randn(batch, idx.shape[1], device=buffer.device), keep, prefix
        )
        kept, pruned = idx.gather(1, kept), idx.gather(1, pruned)
        before = buffer.clone()
        backend.parent_offsets_(buffer, kept, pruned, parent, prefix)
        departures.append((pruned, before))
        idx = kept
    got, expected = backend.add_parents(buffer, parent), buffer.double().clone()
    for b in range(batch):
        for pruned, before in reversed(departures):
            for position in pruned[b].tolist():
                parent_position = parent[b, position].item()
                change = expected[b, parent_position] - before[b, parent_position].double()
                expected[b, position] = before[b, position].double() + change
    tolerance = 20 * TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@slow_interpreted
@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
def test_merging_leaves_offsets_from_the_means_on_request(backend, dtype):
    x = tokens(2, 90, 48, dtype, backend.device)
    target_idx, candidate_idx = reference.select(torch.randn(2, 90, device=x.device), 40, 1)
    sizes = torch.randint(1, 6, (2, 90), device=x.device).float()
    identity = torch.arange(90, device=x.device).repeat(2, 1)
    results = []
    for offsets in (False, True):
        buffer, parent = x.clone(), identity.clone()
        lists = backend.merge_(
            buffer, target_idx, candidate_idx, sizes.clone(), parent, 52, 1, offsets
        )
        results.append((buffer, parent, *lists))
    (plain, parent, kept_idx, pruned_idx, _), (buffer, *_) = results
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:]))
    assert same_bits(reference.gather(buffer, kept_idx), reference.gather(plain, kept_idx))
    wide = plain.to(reference.accumulation_dtype(dtype))
    expected = reference.gather(wide, pruned_idx) - reference.gather(
        wide, parent.gather(1, pruned_idx)
    )
    assert same_bits(reference.gather(buffer, pruned_idx), expected.to(dtype))


@slow_interpreted
def test_every_run_gives_the_same_bits(kernels):
    x, *lists = problem((2, 90, 32, 40, 1), torch.float32, kernels.device)
    parent = chains(2, 90, kernels.device)
    first = *kernels.parent_offsets(x, *lists), kernels.add_parents(x, parent)
    for _ in range(2 if kernels.interpreted else 20):
        for got, expected in zip(
            (*kernels.parent_offsets(x, *lists), kernels.add_parents(x, parent)), first
        ):
            assert torch.equal(got, expected)


def test_gradients_are_those_of_the_definition():
    x, kept_idx, pruned_idx, prefix = problem((2, 9, 5, 4, 1), torch.float64, "cpu")
    x.requires_grad_()
    parent = chains(2, 9, "cpu", length=4)
    ops = torch.ops.cropr
    assert torch.autograd.gradcheck(
        lambda x: ops.parent_offsets(x, kept_idx, pruned_idx, prefix)[0], x
    )
    assert torch.autograd.gradcheck(lambda x: ops.add_parents(x, parent), x)


@pytest.mark.parametrize("name", ["parent_offsets", "parent_offsets_"])
def test_without_a_kept_token_there_is_no_parent(name):
    x, kept_idx, pruned_idx, _ = problem((2, 9, 5, 3, 3), torch.float32, "cpu")
    parent = [torch.arange(9).repeat(2, 1)] if name.endswith("_") else []
    for device in ("cpu", "meta"):
        args = [arg.to(device) for arg in (x, kept_idx, pruned_idx, *parent)]
        with pytest.raises(
            RuntimeError,
            match=f"{name}: kept_idx must hold a token after the prefix, got K = num_pr",
        ):
            getattr(torch.ops.cropr, name)(*args, 3)


def test_parents_must_exist_and_form_no_cycle():
    x = torch.randn(1, 4, 3)
    for parent, error in (
        (
            [0, 2, 1, 3],
            "parent must lead to a token that is its own parent, got a cycle at 1 in image 0",
        ),
        ([0, 4, 1, 3], r"parent must hold positions in \[0, 4\), got 4"),
    ):
        with pytest.raises(RuntimeError, match=f"add_parents: {error}"):
            torch.ops.cropr.add_parents(x, torch.tensor([parent]))
