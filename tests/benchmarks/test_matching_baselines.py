"""Baselines that merge in pairs, each against a slow, obvious version of its paper."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.baselines import COUNTS, TOKENS, context_of
from helpers.models import randomize, reference_vit

import cropr_kernels as cropr
from benchmarks.baselines.matching import ATM, CroprMerge, PiToMe, energy, unit_keys
from benchmarks.baselines.network import Reduced
from cropr_kernels.ops.score_weights import size_adjusted_scores
from cropr_kernels.pruning.merging import COST_WEIGHT

REMOVED = 6
DIM = 8


def case(prefix, depth, seed=0):
    """Return tokens (3, N, D) of random sizes, and the context of a reducer."""
    torch.manual_seed(seed)
    x = torch.randn(3, TOKENS, DIM, dtype=torch.float64)
    return x, context_of(x, prefix, torch.randint(1, 5, (3, TOKENS)).float(), depth)


def cosines(keys):
    """Return a function cosine(i, j) of the means over heads of the keys (H, N, C) of one image."""
    mean = keys.mean(0)
    return lambda i, j: F.cosine_similarity(mean[i], mean[j], dim=0).item()


def slow_merge(x, sizes, groups, keep_norms=False):
    """Return the weighted mean and the size of each group (its target first), in order of the first
    channel."""
    tokens, totals = [], []
    for group in groups:
        mean = sum(sizes[i] * x[i] for i in group) / sum(sizes[i] for i in group)
        if keep_norms:
            mean = mean / mean.norm() * x[group[0]].norm()
        tokens.append(mean)
        totals.append(sum(sizes[i] for i in group))
    return in_order(torch.stack(tokens), torch.stack(totals))


def in_order(tokens, sizes):
    order = tokens[:, 0].argsort()
    return tokens[order], sizes[order]


def slow_match(sources, targets, gain, count):
    """Return groups: the `count` best sources with the best target each, and all others by
    themselves."""
    best = {i: max((gain(i, j), j) for j in targets) for i in sources}
    chosen = sorted(sources, key=lambda i: -best[i][0])[:count]
    groups = {j: [j] for j in targets}
    for i in chosen:
        groups[best[i][1]].append(i)
    return [*groups.values(), *([i] for i in sources if i not in chosen)]


def expect(reduction, x, context, groups_of, prefix, **options):
    for b in range(len(x)):
        sizes = context.sizes[b].double()
        groups = [[i] for i in range(prefix)] + groups_of(b)
        assert sorted(i for group in groups for i in group) == list(range(TOKENS))
        expected = slow_merge(x[b], sizes, groups, **options)
        torch.testing.assert_close(
            in_order(reduction.tokens[b], reduction.sizes[b].double()), expected
        )
        assert torch.equal(reduction.tokens[b, :prefix], x[b, :prefix])
    assert torch.equal(reduction.sizes.sum(1), context.sizes.sum(1))


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75])
def test_pitome_merges_the_tokens_of_highest_energy(depth, prefix):
    x, context = case(prefix, depth)
    reduction = PiToMe()(x, context, TOKENS - REMOVED, prefix)

    def groups_of(b):
        cosine, patches = cosines(context.keys[b]), range(prefix, TOKENS)

        def elu(value):
            return value if value > 0 else math.exp(value) - 1

        energy = {
            i: sum(elu(cosine(i, j) - 0.9 * (1 - depth)) for j in patches) / len(patches)
            for i in patches
        }
        order = sorted(patches, key=lambda i: -energy[i])
        merging, protected = (
            (order, []) if depth < 0.5 else (order[: 2 * REMOVED], order[2 * REMOVED :])
        )
        return [[i] for i in protected] + slow_match(merging[::2], merging[1::2], cosine, REMOVED)

    expect(reduction, x, context, groups_of, prefix)


def test_energy_is_the_mean_of_elu():
    _, context = case(1, 0.0)
    keys = unit_keys(context, 1)
    torch.testing.assert_close(energy(keys, 0.3), F.elu(keys @ keys.transpose(1, 2) - 0.3).mean(2))


def test_pitome_does_not_depend_on_the_order_of_tokens():
    x, context = case(1, 0.25)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(TOKENS - 1)])
    moved = context._replace(keys=context.keys[:, :, order], sizes=context.sizes[:, order])
    first, second = (
        PiToMe()(*args, TOKENS - REMOVED, 1) for args in ((x, context), (x[:, order], moved))
    )
    for b in range(len(x)):
        torch.testing.assert_close(
            in_order(first.tokens[b], first.sizes[b]), in_order(second.tokens[b], second.sizes[b])
        )


def test_pitome_protects_isolated_tokens():
    x, context = case(1, 0.75)
    keys = torch.ones(3, 2, TOKENS, TOKENS, dtype=torch.float64)
    # Nearly orthogonal to the others, and one another
    keys[:, :, -4:] = torch.eye(TOKENS, dtype=torch.float64)[-4:]
    reduction = PiToMe()(x, context._replace(keys=keys), TOKENS - REMOVED, 1)
    for b in range(len(x)):
        assert all((reduction.tokens[b] == x[b, i]).all(1).any() for i in range(TOKENS - 4, TOKENS))


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("depth", [0.25, 0.75])
@pytest.mark.parametrize("distinctive", [True, False])
def test_atm_merges_the_pairs_that_lose_least(distinctive, depth, prefix):
    x, context = case(prefix, depth)
    reduction = ATM(distinctive=distinctive)(x, context, TOKENS - REMOVED, prefix)

    def groups_of(b):
        cosine, sizes, patches = (
            cosines(context.keys[b]),
            context.sizes[b].tolist(),
            list(range(prefix, TOKENS)),
        )

        def gain(i, j):
            return -sizes[i] * sizes[j] / (sizes[i] + sizes[j]) * (1 - cosine(i, j))

        sources, targets = patches[::2], patches[1::2]
        if distinctive and depth >= 0.5:
            order = sorted(patches, key=lambda i: -sizes[i])
            targets, sources = order[: len(order) // 2], order[len(order) // 2 :]
        return slow_match(sources, targets, gain, REMOVED)

    expect(reduction, x, context, groups_of, prefix)


@pytest.mark.parametrize(
    "ablation", [{}, {"keep_norms": False}, {"cost_weight": 0.0}, {"checkerboard": False}]
)
@pytest.mark.parametrize("ward", [False, True])
def test_ablations_of_cropr_merging_equal_a_slow_merge(ablation, ward):
    x, context = case(1, 0.5)
    query, merge, side = torch.randn(DIM), cropr.Merge(candidates=1.5), 5
    # Of 25 patches
    positions = torch.stack([1 + torch.randperm(side**2)[: TOKENS - 1].sort().values for _ in x])
    context = context._replace(positions=F.pad(positions, (1, 0)))
    reduction = CroprMerge(query, merge, 1, side, ward=ward, **ablation)(
        x, context, TOKENS - REMOVED, 1
    )

    def groups_of(b):
        sizes = context.sizes[b].tolist()
        before = (x @ query.double()).float()
        scores, patches = size_adjusted_scores(before, context.sizes, 2.0, 1)[b], before[b, 1:]
        weight = ablation.get("cost_weight", COST_WEIGHT)
        cost_scale = (weight * (scores - patches.mean()) / patches.std(correction=0)).exp().tolist()

        def stays(i):  # the color of the second merge
            row, column = divmod(int(context.positions[b, i]) - 1, side)
            return "checkerboard" not in ablation and (row + column) % 2 == 0

        order = sorted(range(1, TOKENS), key=lambda i: (not stays(i), -scores[i].item()))
        targets, candidates = order[: TOKENS - 1 - 9], order[TOKENS - 1 - 9 :]  # 1.5 * 6

        def gain(i, j):
            cosine = F.cosine_similarity(x[b, i], x[b, j], dim=0).item()
            weight = sizes[i] * sizes[j] / (sizes[i] + sizes[j]) if ward else 1
            return -weight * (1 - cosine) * cost_scale[i]

        return slow_match(candidates, targets, gain, REMOVED)

    expect(reduction, x, context, groups_of, 1, keep_norms="keep_norms" not in ablation)


def test_a_network_reduced_by_cropr_merging_is_cropr():
    model = randomize(reference_vit()).eval()
    pruned = cropr.apply(randomize(reference_vit()), rate=9, merge=True).eval()
    model.load_state_dict(
        {k: v for k, v in pruned.state_dict().items() if not k.startswith("cropr.")}
    )
    layers = enumerate([module.query() for module in pruned.cropr])
    counts, images = pruned.cropr.config.counts(65, 4, 1), torch.randn(2, 3, 64, 64)

    def make(dim, kept, patches):
        layer, query = next(layers)
        return CroprMerge(query, cropr.Merge(), layer, 8)

    network = Reduced(model, make, counts)
    with torch.no_grad():
        torch.testing.assert_close(network(images), pruned(images), rtol=1e-5, atol=1e-5)


def test_a_reducer_gets_its_relative_depth():
    network, seen = (
        Reduced(randomize(reference_vit()), lambda dim, kept, patches: PiToMe(), COUNTS).eval(),
        [],
    )
    for reducer in network.reducers.values():
        reducer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1].depth))
    with torch.no_grad():
        network(torch.randn(1, 3, 64, 64))
    assert seen == [0.0, 0.25, 0.5]


@pytest.mark.parametrize(("reducer", "most"), [(PiToMe(), 11), (ATM(), 11)])
def test_merging_more_than_half_raises(reducer, most):
    x, context = case(1, 0.0)
    assert reducer(x, context, TOKENS - most, 1).tokens.shape[1] == TOKENS - most
    with pytest.raises(
        ValueError, match=f"of 22 tokens at most {most} can merge into others, not {most + 1}"
    ):
        reducer(x, context, TOKENS - most - 1, 1)
