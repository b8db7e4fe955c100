"""Baselines that merge tokens are what their papers say: each against a slow, obvious version."""

import pytest
import torch
import torch.nn.functional as F
from helpers.baselines import DIM, KEEP, TOKENS, context_of

from benchmarks.baselines.merging import DPCKNN, ToMe, merge_fused, merge_pairs
from benchmarks.baselines.network import Reduced
from cropr_kernels.models.vit import ViT, ViTConfig


def slow_density_peaks(points, count, neighbours):
    n = len(points)
    distances = [[(points[i] - points[j]).norm().item() / points.shape[1] ** 0.5 for j in range(n)] for i in range(n)]
    density = [-sum(d * d for d in sorted(distances[i])[1 : neighbours + 1]) / neighbours for i in range(n)]
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
        weight = reducer.score(points).exp() if learned else torch.ones(TOKENS - 1, 1, dtype=torch.float64)
        cluster = torch.tensor(slow_density_peaks(points, KEEP - 1, 5))
        for c in range(KEEP - 1):
            own = cluster == c
            torch.testing.assert_close(tokens[b, c + 1], (points * weight)[own].sum(0) / weight[own].sum())


def test_dpc_knn_conserves_mass():
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    reducer = DPCKNN()
    cluster = reducer.clusters(torch.cdist(x[:, 1:], x[:, 1:]).float() / DIM**0.5, KEEP - 1)
    counts = F.one_hot(cluster, KEEP - 1).sum(1)
    assert (counts > 0).all()
    tokens = reducer(x, context_of(x), KEEP, 1).tokens[:, 1:]
    torch.testing.assert_close((tokens * counts.unsqueeze(-1)).sum(1), x[:, 1:].sum(1))


def slow_pairs(x, metric, sizes, count, prefix):
    """One image: the `count` most similar (even, odd) pairs, an even token at most once; prefix, unmerged even, odd."""
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
    return order, mass[order] / total[order].unsqueeze(-1), total[order]


@pytest.mark.parametrize("merge", [merge_pairs, merge_fused])
@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_tome_merges_the_most_similar_pairs(prefix, merge):
    x, metric = torch.randn(3, 31, 8, dtype=torch.float64), torch.randn(3, 31, 5, dtype=torch.float64)
    sizes = torch.randint(1, 4, (3, 31)).float()
    merged, total, untraced = merge(x, metric, sizes, 6, prefix)
    assert untraced is None
    _, _, dest = merge(x, metric, sizes, 6, prefix, True)
    went = F.one_hot(dest, 25).double() * sizes.double().unsqueeze(-1)
    torch.testing.assert_close(went.transpose(1, 2) @ x / total.double().unsqueeze(-1), merged)
    for b in range(3):
        order, expected, expected_total = slow_pairs(x[b], metric[b], sizes[b].double(), 6, prefix)
        if merge is merge_fused:  # in order of position
            back = sorted(range(len(order)), key=order.__getitem__)
            expected, expected_total = expected[back], expected_total[back]
        torch.testing.assert_close(merged[b], expected)
        torch.testing.assert_close(total[b].double(), expected_total)
    torch.testing.assert_close(
        (merged * total.double().unsqueeze(-1)).sum(1), (x * sizes.double().unsqueeze(-1)).sum(1)
    )


@pytest.mark.parametrize("fused", [False, True])
def test_tome_copies_what_it_merged_to_all_places(fused):
    config = ViTConfig(img_size=64, embed_dim=32, depth=4, num_heads=2, num_classes=0, reg_tokens=2)
    vit = ViT(config).eval().requires_grad_(False)
    vit.norm = torch.nn.Identity()
    for block in vit.blocks:  # blocks change nothing: all that is left of ToMe is means
        block.attn.proj.weight.zero_()
        block.mlp.fc2.weight.zero_()
    images = torch.randn(2, 3, 64, 64)
    reduced = Reduced(vit, lambda *_: ToMe(fused=fused, traced=True), [15, 11, 8]).eval()
    found = reduced.run(images)
    x, _ = vit.embed(images)
    together = F.one_hot(found.places, 8).float()
    means = (together.transpose(1, 2) @ x) / together.sum(1).unsqueeze(-1)
    torch.testing.assert_close(found.tokens, means)
    torch.testing.assert_close(found.whole(), together @ means)
