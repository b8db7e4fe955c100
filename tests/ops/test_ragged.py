"""cropr::ragged_add_select_, ragged_nearest, ragged_merge_: each image has its number of tokens."""

import itertools

import pytest
import torch
from helpers.cases import DTYPES, MATRIX_DTYPES, odd_layouts, same_bits, slow_interpreted, tokens

from cropr_kernels.ops import reference
from cropr_kernels.ops.definitions import DEFINITIONS

pytestmark = pytest.mark.kernels

# N, D, active tokens of each image, candidates at most, P
SHAPES = [
    (5, 8, [5], 2, 1),
    (9, 33, [6, 9, 1, 4], 3, 1),  # one image has only its prefix
    (17, 48, [2, 2], 4, 2),  # all of them
    (40, 96, [40, 11, 25], 30, 5),  # candidates are at most half of the patches
    (74, 32, [74, 45], 36, 1),  # more candidates than one tile holds
    (40, 16, [40, 20], 0, 1),  # no candidates
    (12, 16, [12, 3, 0], 4, 0),  # no tokens
    (20, 192, [18, 18, 18], 6, 1),  # equal counts
    (7, 8, [], 3, 1),
]
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}


def active(n, counts, prefix, device):
    """Return random rows (T,) of len(counts) images, and starts (B + 1,)."""
    rows = [torch.empty(0, dtype=torch.int64)]
    for b, count in enumerate(counts):
        patches = (prefix + torch.randperm(n - prefix)[: count - prefix]).sort().values
        rows.append(b * n + torch.cat([torch.arange(prefix), patches]))
    starts = torch.tensor([0, *itertools.accumulate(counts)])
    return torch.cat(rows).to(device), starts.to(device)


def bounds(counts, candidates, prefix):
    """Yield of each image its index, where it begins and ends in rows, and its candidates."""
    starts = [0, *itertools.accumulate(counts)]
    for b, (begin, end) in enumerate(itertools.pairwise(starts)):
        yield b, begin, end, min(candidates, (end - begin - prefix) // 2)


def buffer(shape, dtype, device):
    """Return x, sizes, parent, cost_scale, rows and starts."""
    n, dim, counts, _, prefix = shape
    batch = len(counts)
    sizes = torch.randint(1, 6, (batch, n), device=device).float()
    parent = torch.arange(n, device=device).repeat(batch, 1)
    cost_scale = torch.randn(batch, n, device=device).exp()
    x = tokens(batch, n, dim, dtype, device)
    return x, sizes, parent, cost_scale, *active(n, counts, prefix, device)


def random_order(shape, rows, starts):
    """Return rows with the targets of each image before its candidates."""
    _, _, counts, candidates, prefix = shape
    order = rows.clone()
    for _, begin, end, count in bounds(counts, candidates, prefix):
        mixed = begin + prefix + torch.randperm(end - begin - prefix, device=rows.device)
        chosen = rows[mixed[:count]].sort().values
        others = rows[mixed[count:]].sort().values
        order[begin:end] = torch.cat([rows[begin : begin + prefix], others, chosen])
    return order


def random_choice(shape, order, starts):
    """Return prune and nearest (B, candidates) at random."""
    _, _, counts, candidates, prefix = shape
    prune = torch.zeros(len(counts), candidates, dtype=torch.bool, device=order.device)
    nearest = order.new_full(prune.shape, -1)
    for b, begin, end, count in bounds(counts, candidates, prefix):
        if count:
            prune[b, :count] = torch.rand(count, device=order.device) < 0.6
            at = torch.randint(begin + prefix, end - count, (count,), device=order.device)
            nearest[b, :count] = order[at]
    return prune, nearest


OPTIONS = [
    {},
    {"sizes": True, "size_weight": 1.5},
    {"cost_scale": True, "cost_weight": 0.5},
    {"sizes": True, "size_weight": 1.0, "priority": True, "cost_scale": True, "cost_weight": -0.3},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_image_is_selected_from_as_if_alone(backend, shape, dtype, options):
    n, dim, counts, candidates, prefix = shape
    x, sizes, _, scales, rows, starts = buffer(shape, dtype, backend.device)
    update = torch.randn(len(rows), dim, device=x.device).to(dtype)
    gamma, query = torch.randn(dim, device=x.device).to(dtype), torch.randn(3, dim, device=x.device)
    priority = torch.randint(-1, 2, (len(counts), n), dtype=torch.int8, device=x.device)
    by_position = {"sizes": sizes, "priority": priority, "cost_scale": scales}
    options = {name: by_position.get(name, value) for name, value in options.items()}
    expected_x, expected_scales = x.clone(), scales.clone()
    order = backend.ragged_add_select_(
        x, rows, starts, update, gamma, query, candidates, prefix, **options
    )
    assert order.dtype == torch.int64 and order.shape == rows.shape
    for b, begin, end, count in bounds(counts, candidates, prefix):
        image = {
            name: value[b : b + 1].clone() if torch.is_tensor(value) else value
            for name, value in (options | {"cost_scale": expected_scales}).items()
            if name in options
        }
        kept, pruned = backend.add_select_(
            expected_x[b : b + 1],
            rows[None, begin:end] - b * n,
            update[None, begin:end],
            gamma,
            query,
            end - begin - count,
            prefix,
            **image,
        )
        if "cost_scale" in image:
            expected_scales[b : b + 1] = image["cost_scale"]
        assert torch.equal(order[begin:end], b * n + torch.cat([kept, pruned], 1)[0])
    assert same_bits(x, expected_x) and same_bits(scales, expected_scales)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_costs_and_nearest_targets_are_those_of_the_definition(backend, shape, dtype, scaled):
    n, _, counts, candidates, prefix = shape
    x, _, _, scales, rows, starts = buffer(shape, dtype, backend.device)
    order, before = random_order(shape, rows, starts), x.clone()
    cost_scale = scales if scaled else None
    costs, nearest = backend.ragged_nearest(x, order, starts, candidates, prefix, cost_scale)
    assert same_bits(x, before) and costs.dtype == reference.accumulation_dtype(dtype)
    for b, begin, end, count in bounds(counts, candidates, prefix):
        assert (costs[b, count:] == torch.inf).all() and (nearest[b, count:] == -1).all()
        if not count:
            continue
        unit = torch.nn.functional.normalize(x[b].double(), dim=1)
        targets, others = (order[begin:end] - b * n).split([end - begin - count, count])
        similarity = unit[others] @ unit[targets[prefix:]].T
        assert torch.isin(nearest[b, :count] - b * n, targets[prefix:]).all()
        chosen = (unit[others] * unit[nearest[b, :count] - b * n]).sum(1)
        torch.testing.assert_close(chosen, similarity.max(1).values, rtol=0, atol=1e-5)
        expected = (1 - chosen).clamp_min(0) * (scales[b, others] if scaled else 1.0)
        torch.testing.assert_close(costs[b, :count].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_cheapest_merges_of_an_image_are_those_of_the_dense_op(backend, shape, dtype, offsets):
    n, _, counts, candidates, prefix = shape
    x, sizes, parent, scales, rows, starts = buffer(shape, dtype, backend.device)
    order = random_order(shape, rows, starts)
    costs, nearest = backend.ragged_nearest(x, order, starts, candidates, prefix, scales)
    prune = torch.zeros(costs.shape, dtype=torch.bool, device=x.device)
    dense = x.clone(), sizes.clone(), parent.clone()
    kept = [rows[:0]]
    for b, begin, end, count in bounds(counts, candidates, prefix):
        removed = int(torch.randint(count + 1, ()))
        # Of equal costs the higher position
        cheapest = count - 1 - costs[b, :count].flip(0).sort(stable=True).indices[:removed]
        prune[b, cheapest] = True
        targets, others = (order[None, begin:end] - b * n).split([end - begin - count, count], 1)
        parts = [part[b : b + 1] for part in dense]
        merged = backend.merge_(
            parts[0], targets, others, *parts[1:], end - begin - removed, prefix, offsets,
            scales[b : b + 1],
        )  # fmt: skip
        kept.append(b * n + merged[0][0])
    left, new_starts, left_sizes = backend.ragged_merge_(
        x, order, starts, prune, nearest, sizes, parent, len(rows) - int(prune.sum()), prefix,
        offsets,
    )  # fmt: skip
    assert torch.equal(left, torch.cat(kept))
    assert new_starts.tolist() == [0, *itertools.accumulate(map(len, kept[1:]))]
    assert same_bits(x, dense[0]) and same_bits(sizes, dense[1]) and torch.equal(parent, dense[2])
    assert torch.equal(left_sizes, sizes.flatten()[left])


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_choice_is_merged_as_by_definition(backend, shape, dtype, offsets):
    x, sizes, parent, _, rows, starts = buffer(shape, dtype, backend.device)
    order = random_order(shape, rows, starts)
    prune, nearest = random_choice(shape, order, starts)
    num_kept = len(rows) - int(prune.sum())
    parts = [part.clone() for part in (x, sizes, parent)]
    expected = reference_merge(parts, order, starts, prune, nearest, num_kept, shape[4], offsets)
    got = backend.ragged_merge_(
        x, order, starts, prune, nearest, sizes, parent, num_kept, shape[4], offsets
    )
    assert all(map(torch.equal, got, expected))
    torch.testing.assert_close(x, parts[0], **TOLERANCE[dtype])
    assert torch.equal(sizes, parts[1]) and torch.equal(parent, parts[2])


def reference_merge(parts, order, starts, prune, nearest, *rest):
    """Return the result of the definition, on parts x, sizes and parent."""
    x, *others = parts
    return DEFINITIONS["ragged_merge_"](x, order, starts, prune, nearest, *others, *rest)


def test_equal_counts_are_the_dense_ops(kernels):
    batch, n, dim, count, candidates, prefix = 2, 20, 64, 18, 6, 1
    shape = (n, dim, [count] * batch, candidates, prefix)
    x, sizes, parent, scales, rows, starts = buffer(shape, torch.float32, kernels.device)
    idx = rows.view(batch, count) - n * torch.arange(batch, device=x.device)[:, None]
    update, query = torch.randn(len(rows), dim, device=x.device), torch.randn(dim, device=x.device)
    dense = [part.clone() for part in (x, sizes, parent, scales)]
    weights = (1.0, None, scales, 0.5)
    order = kernels.ragged_add_select_(
        x, rows, starts, update, None, query, candidates, prefix, sizes, *weights
    )
    kept, pruned = kernels.add_select_(
        dense[0], idx, update.view(batch, count, dim), None, query, count - candidates, prefix,
        dense[1], 1.0, None, dense[3], 0.5,
    )  # fmt: skip
    first = n * torch.arange(batch, device=x.device)[:, None]
    assert torch.equal(order.view(batch, count), first + torch.cat([kept, pruned], 1))
    costs, nearest = kernels.ragged_nearest(x, order, starts, candidates, prefix, scales)
    prune = torch.zeros(batch, candidates, dtype=torch.bool, device=x.device)
    prune.scatter_(1, costs.argsort(1)[:, :3], True)
    left, _, left_sizes = kernels.ragged_merge_(
        x, order, starts, prune, nearest, sizes, parent, batch * (count - 3), prefix
    )
    stay, _, stay_sizes = kernels.merge_(
        dense[0], kept, pruned, dense[1], dense[2], count - 3, prefix, False, dense[3]
    )
    assert torch.equal(left.view(batch, -1), first + stay)
    assert torch.equal(left_sizes.view(batch, -1), stay_sizes)
    for got, expected in zip((x, sizes, parent, scales), dense):
        assert torch.equal(got, expected)


def test_nan_costs_most_and_ties_go_to_the_lowest_target(backend):
    x = torch.ones(2, 12, 16, device=backend.device)
    x[1, 2, 3] = float("nan")  # like none
    x[1, 3] = 0.0  # nor is this
    x[1, 11] = float("nan")
    rows, starts = torch.arange(24, device=x.device), torch.tensor([0, 12, 24], device=x.device)
    costs, nearest = backend.ragged_nearest(x, rows, starts, 4, 2)
    assert nearest.tolist() == [[2] * 4, [16, 16, 16, 14]]
    assert (costs[0] < 1e-6).all() and (costs[1, :3] < 1e-6).all() and costs[1, 3] == torch.inf
    cost_scale = torch.full((2, 12), float("nan"), device=x.device)
    assert (backend.ragged_nearest(x, rows, starts, 4, 2, cost_scale)[0] == torch.inf).all()


@pytest.mark.parametrize("counts", [[1300, 40], [1025]])
def test_many_tokens_are_selected_exactly(backend, counts):
    shape = (1300, 16, counts, 500, 1)
    x, _, _, _, rows, starts = buffer(shape, torch.float32, backend.device)
    x[..., 0] = torch.randint(-3, 4, x.shape[:2], device=x.device).float()  # many ties
    query = torch.eye(16, device=x.device)[0]
    update = torch.zeros(len(rows), 16, device=x.device)
    order = backend.ragged_add_select_(x, rows, starts, update, None, query, 500, 1)
    scores = x.flatten(0, 1)[rows, 0]
    for _, begin, end, count in bounds(counts, 500, 1):
        lists = reference.select(scores[None, begin:end], end - begin - count, 1)
        assert torch.equal(order[begin:end], rows[begin + torch.cat(lists, 1)[0]])


def test_every_layout_gives_the_same_bits(backend):
    shape = (30, 96, [30, 21], 8, 1)
    x, _, _, scales, rows, starts = buffer(shape, torch.float32, backend.device)
    order = random_order(shape, rows, starts)
    plain = backend.ragged_nearest(x, order, starts, 8, 1, scales)
    every_other = torch.stack([order, order], 1)[:, 0]
    flipped = scales.t().contiguous().t()
    for name, odd in odd_layouts(x).items():
        got = backend.ragged_nearest(odd, every_other, starts, 8, 1, flipped)
        assert all(map(torch.equal, got, plain)), name


@pytest.mark.parametrize("difference", [-5, 4])
def test_another_number_of_kept_rows_is_cut_or_filled(kernels, difference):
    if kernels.name in ("cpp", "compiled"):
        pytest.skip("checked on a CPU")
    shape = (30, 16, [25, 30], 8, 1)
    x, sizes, parent, _, rows, starts = buffer(shape, torch.float32, kernels.device)
    order = random_order(shape, rows, starts)
    prune, nearest = random_choice(shape, order, starts)
    parts = [part.clone() for part in (x, sizes, parent)]
    num_kept = len(rows) - int(prune.sum())
    expected = reference_merge(parts, order, starts, prune, nearest, num_kept, 1)
    left, new_starts, left_sizes = kernels.ragged_merge_(
        x, order, starts, prune, nearest, sizes, parent, num_kept + difference, 1
    )
    both = min(num_kept, num_kept + difference)
    assert torch.equal(left[:both], expected[0][:both]) and torch.equal(new_starts, expected[1])
    assert torch.equal(left_sizes[:both], expected[2][:both])
    assert (left[both:] == -1).all() and (left_sizes[both:] == 1).all()
    if difference > 0:
        torch.testing.assert_close(x, parts[0])
        assert torch.equal(sizes, parts[1]) and torch.equal(parent, parts[2])


@slow_interpreted
def test_every_run_gives_the_same_bits(kernels):
    shape = (197, 64, [197, 120, 160, 3], 60, 1)
    x, sizes, parent, scales, rows, starts = buffer(shape, torch.float32, kernels.device)
    order = random_order(shape, rows, starts)
    prune, nearest = random_choice(shape, order, starts)
    num_kept = len(rows) - int(prune.sum())

    def run():
        parts = x.clone(), sizes.clone(), parent.clone()
        costs = kernels.ragged_nearest(x, order, starts, 60, 1, scales)
        lists = kernels.ragged_merge_(
            parts[0], order, starts, prune, nearest, *parts[1:], num_kept, 1, True
        )
        return *costs, *lists, *parts

    first = run()
    for _ in range(2 if kernels.interpreted else 20):
        assert all(map(torch.equal, run(), first))


LIST = {"ragged_add_select_": "rows", "ragged_nearest": "order", "ragged_merge_": "order"}


def call(name, **changes):
    """Return the arguments of a call with two images, changed."""
    args = {
        "x": torch.zeros(2, 9, 6),
        LIST[name]: torch.tensor([0, 2, 3, 5, 9, 10, 12, 13, 14]),
        "starts": torch.tensor([0, 4, 9]),
        "num_candidates": 2,
        "num_prefix": 1,
    }
    if name == "ragged_add_select_":
        args |= {"update": torch.zeros(9, 6), "gamma": None, "query": torch.ones(6)}
    if name == "ragged_merge_":
        del args["num_candidates"]
        args |= {
            "prune": torch.zeros(2, 2, dtype=torch.bool),
            "nearest": torch.tensor([[2, -1], [10, 12]]),
            "sizes": torch.ones(2, 9),
            "parent": torch.arange(9).repeat(2, 1),
            "num_kept": 9,
        }
    return args | changes


@pytest.mark.parametrize("name", LIST)
def test_rows_and_starts_that_do_not_fit_raise(name):
    op = getattr(torch.ops.cropr, name)
    rows = call(name)[LIST[name]]
    op(**call(name))
    for starts, message in [
        ([1, 4, 9], "starts must begin with 0, got 1"),
        ([0, 4, 8], "starts must end with T = 9, got 8"),
        ([0, 0, 9], "starts must leave each image at least num_prefix = 1 rows, got 0 for image 0"),
        ([0, 10, 9], "starts must leave .*, got -1 for image 1"),
    ]:
        with pytest.raises(RuntimeError, match=f"{name}: {message}"):
            op(**call(name, starts=torch.tensor(starts)))
    for at, row, message in [
        (1, 9, rf"{LIST[name]} must hold rows in \[0, 9\) for image 0, got 9"),
        (4, 8, rf"{LIST[name]} must hold rows in \[9, 18\) for image 1, got 8"),
        (1, 0, rf"{LIST[name]} must be ascending, got 0 before 0 in image 0"),
        (5, 13, rf"{LIST[name]} must be ascending, got 13 before 12 in image 1"),
    ]:
        wrong = rows.clone()
        wrong[at] = row
        with pytest.raises(RuntimeError, match=f"{name}: {message}"):
            op(**call(name, **{LIST[name]: wrong}))


@pytest.mark.parametrize("name", ["ragged_nearest", "ragged_merge_"])
def test_a_token_is_a_target_or_a_candidate(name):
    order = call(name)["order"].clone()
    order[8] = 10
    order[7] = 9
    with pytest.raises(RuntimeError, match=f"{name}: order must hold each row once, got 9 twice"):
        getattr(torch.ops.cropr, name)(**call(name, order=order))


def test_choices_that_do_not_fit_raise():
    op = torch.ops.cropr.ragged_merge_
    marks = torch.tensor([[True, False], [False, True]])
    left, starts, _ = op(**call("ragged_merge_", prune=marks, num_kept=7))
    assert left.tolist() == [0, 2, 3, 9, 10, 12, 13] and starts.tolist() == [0, 3, 7]
    for changes, message in [
        ({"prune": marks, "num_kept": 8}, r"num_kept must be T - prune.sum\(\) = 7, got 8"),
        (
            {"prune": torch.ones(2, 2, dtype=torch.bool), "num_kept": 5},
            "prune must be false past the 1 candidates of image 0, got true at 1",
        ),
        (
            {"prune": marks, "nearest": torch.tensor([[0, -1], [10, 12]]), "num_kept": 7},
            "nearest must be a target of image 0 after the prefix where prune is true, got 0 at 0",
        ),
        (
            {"prune": marks, "nearest": torch.tensor([[2, -1], [10, 14]]), "num_kept": 7},
            "nearest must be a target of image 1 after the prefix .*, got 14 at 1",
        ),
    ]:
        with pytest.raises(RuntimeError, match=f"ragged_merge_: {message}"):
            op(**call("ragged_merge_", **changes))
