"""Baselines that merge tokens, each against a slow, obvious version of its paper."""

import sys

import pytest
import torch
import torch.nn.functional as F
from helpers.baselines import DIM, KEEP, TOKENS, context_of

from benchmarks.baselines.merging import ATC, DPCKNN, merge_pairs


def slow_density_peaks(points, count, neighbours):
    n = len(points)
    distances = [
        [(points[i] - points[j]).norm().item() / points.shape[1] ** 0.5 for j in range(n)]
        for i in range(n)
    ]
    density = [
        -sum(d * d for d in sorted(distances[i])[1 : neighbours + 1]) / neighbours for i in range(n)
    ]
    delta = []
    for i in range(n):
        above = [distances[i][j] for j in range(n) if density[j] > density[i]]
        delta.append(min(above) if above else max(distances[i]))
    score = [torch.tensor(density[i]).exp().item() * delta[i] for i in range(n)]
    centres = sorted(sorted(range(n), key=lambda i: -score[i])[:count])
    return [centres.index(min(centres, key=lambda c, i=i: distances[i][c])) for i in range(n)]


@pytest.mark.parametrize("learned", [False, True])
def test_dpc_knn_merges_clusters_around_density_peaks(learned):
    x = torch.randn(3, TOKENS, DIM, dtype=torch.float64)
    reducer = DPCKNN(DIM if learned else None).double()
    tokens = reducer(x, context_of(x), KEEP, 1).tokens
    for b in range(3):
        points = x[b, 1:]
        weight = (
            reducer.score(points).exp()
            if learned
            else torch.ones(TOKENS - 1, 1, dtype=torch.float64)
        )
        cluster = torch.tensor(slow_density_peaks(points, KEEP - 1, 5))
        for c in range(KEEP - 1):
            members = cluster == c
            torch.testing.assert_close(
                tokens[b, c + 1], (points * weight)[members].sum(0) / weight[members].sum()
            )


def test_dpc_knn_conserves_mass():
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    reducer = DPCKNN()
    cluster = reducer.clusters(torch.cdist(x[:, 1:], x[:, 1:]).float() / DIM**0.5, KEEP - 1)
    counts = F.one_hot(cluster, KEEP - 1).sum(1)
    assert (counts > 0).all()
    tokens = reducer(x, context_of(x), KEEP, 1).tokens[:, 1:]
    torch.testing.assert_close((tokens * counts.unsqueeze(-1)).sum(1), x[:, 1:].sum(1))


def slow_pairs(x, metric, sizes, count, prefix):
    """Merge the `count` most similar (even, odd) pairs of an image; return prefix, unmerged even
    and odd tokens."""
    n = x.shape[0]
    best = {}
    for i in range(0, n, 2):
        if i < prefix:
            continue
        odd = [j for j in range(1, n, 2) if j >= prefix]
        best[i] = max((F.cosine_similarity(metric[i], metric[j], dim=0).item(), j) for j in odd)
    moving = sorted(best, key=lambda i: -best[i][0])[:count]
    mass, total = x * sizes.unsqueeze(-1), sizes.clone()
    for i in moving:
        j = best[i][1]
        mass[j] += mass[i]
        total[j] += total[i]
    even = [i for i in range(0, n, 2) if i >= prefix and i not in moving]
    order = [*range(prefix), *even, *(j for j in range(1, n, 2) if j >= prefix)]
    return mass[order] / total[order].unsqueeze(-1), total[order]


@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_tome_merges_the_most_similar_pairs(prefix):
    x, metric = (
        torch.randn(3, 31, 8, dtype=torch.float64),
        torch.randn(3, 31, 5, dtype=torch.float64),
    )
    sizes = torch.randint(1, 4, (3, 31)).float()
    reduction = merge_pairs(x, metric, sizes, 6, prefix)
    merged, total = reduction.tokens, reduction.sizes
    for b in range(3):
        expected, expected_total = slow_pairs(x[b], metric[b], sizes[b].double(), 6, prefix)
        torch.testing.assert_close(merged[b], expected)
        torch.testing.assert_close(total[b].double(), expected_total)
    torch.testing.assert_close(
        (merged * total.double().unsqueeze(-1)).sum(1), (x * sizes.double().unsqueeze(-1)).sum(1)
    )


def slow_agglomerative(keys, count, linkage):
    """Return groups of points: the two closest groups become one, again and again."""
    groups = [[i] for i in range(len(keys))]
    reduce = {"average": lambda all: sum(all) / len(all), "complete": max, "single": min}[linkage]

    def apart(pair):
        return reduce(
            [
                1 - F.cosine_similarity(keys[i], keys[j], dim=0).item()
                for i in pair[0]
                for j in pair[1]
            ]
        )

    while len(groups) > count:
        pairs = [(groups[i], groups[j]) for i in range(len(groups)) for j in range(i)]
        first, second = min(pairs, key=apart)
        groups = [group for group in groups if group not in (first, second)] + [first + second]
    return groups


@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_atc_merges_the_closest_clusters(prefix, linkage):
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    context = context_of(x, prefix, torch.randint(1, 5, (2, TOKENS)).float())
    reduction = ATC(linkage)(x, context, KEEP, prefix)
    for b in range(2):
        sizes, expected, totals = context.sizes[b].double(), [], []
        groups = slow_agglomerative(context.keys[b].mean(0)[prefix:], KEEP - prefix, linkage)
        for group in [[i] for i in range(prefix)] + [
            [i + prefix for i in group] for group in groups
        ]:
            totals.append(sizes[group].sum())
            expected.append((x[b, group] * sizes[group].unsqueeze(1)).sum(0) / totals[-1])
        expected, totals = torch.stack(expected), torch.stack(totals)
        order, back = reduction.tokens[b, :, 0].argsort(), expected[:, 0].argsort()
        torch.testing.assert_close(reduction.tokens[b, order], expected[back])
        torch.testing.assert_close(reduction.sizes[b, order].double(), totals[back])


@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
def test_atc_of_equal_tokens_leaves_as_many_clusters(linkage):
    x = torch.ones(1, TOKENS, DIM)
    reduction = ATC(linkage)(x, context_of(x)._replace(keys=torch.ones(1, 2, TOKENS, 4)), KEEP, 1)
    assert torch.equal(reduction.tokens, x[:, :KEEP]) and reduction.sizes.sum() == TOKENS


def test_atc_without_scipy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.cluster.hierarchy", None)
    x = torch.randn(1, TOKENS, DIM)
    with pytest.raises(
        ImportError, match=r"ATC needs scipy: pip install scipy \(or the extra \[demo\]"
    ):
        ATC()(x, context_of(x), KEEP, 1)
