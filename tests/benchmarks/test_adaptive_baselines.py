"""Baselines whose images keep their own numbers of tokens, against slow, obvious versions."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.baselines import COUNTS, DIM, KEEP, TOKENS, context_of
from helpers.models import randomize, reference_vit
from torch import nn

from benchmarks.accuracy.adaptive_rivals import METHODS, START, Rivals
from benchmarks.baselines.adaptive import (
    AdaMerge,
    AdaptiveATM,
    ImageByImage,
    ThresholdDrop,
    lowest,
)
from benchmarks.baselines.merging import ToMe
from benchmarks.baselines.network import Reduced
from benchmarks.baselines.selection import ATS, AttentionTopK, EViT
from benchmarks.baselines.transforming import TokenTransforming
from cropr_kernels.utils.flops import flop_counter


def case(prefix=1, depth=0.0, seed=0):
    """Return one image's tokens (1, N, D) of random sizes, and the context of a reducer."""
    torch.manual_seed(seed)
    x = torch.randn(1, TOKENS, DIM, dtype=torch.float64)
    return x, context_of(x, prefix, torch.randint(1, 5, (1, TOKENS)).float(), depth)


def means(x, groups, weights):
    """Return the weighted mean of each group of tokens of x (N, D), in order of channel 0."""
    rows = [
        sum(weights[i] * x[i] for i in group) / sum(weights[i] for i in group) for group in groups
    ]
    tokens = torch.stack(rows)
    return tokens[tokens[:, 0].argsort()]


def in_order(tokens):
    return tokens[tokens[:, 0].argsort()]


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("depth", [0.25, 0.75])
@pytest.mark.parametrize("quantile", [0.0, 0.3, 1.0])
def test_atm_merges_every_pair_that_loses_less_than_the_threshold(quantile, depth, prefix):
    x, context = case(prefix, depth)
    keys, sizes = context.keys[0].mean(0), context.sizes[0].tolist()
    patches = list(range(prefix, TOKENS))
    sources, targets = patches[::2], patches[1::2]
    if depth >= 0.5:
        order = sorted(patches, key=lambda i: -sizes[i])
        targets, sources = order[: len(order) // 2], order[len(order) // 2 :]

    def loss(i, j):
        cosine = F.cosine_similarity(keys[i], keys[j], dim=0).item()
        return sizes[i] * sizes[j] / (sizes[i] + sizes[j]) * (1 - cosine)

    best = {i: min((loss(i, j), j) for j in targets) for i in sources}
    reducer = AdaptiveATM()
    values = sorted(value for value, _ in best.values())
    torch.testing.assert_close(
        reducer.statistics(x, context, prefix).sort().values, torch.tensor(values).double()
    )
    reducer.fit([reducer.statistics(x, context, prefix)], quantile * len(values))
    merged = [i for i in sources if best[i][0] <= reducer.threshold + 1e-12]
    assert len(merged) == round(quantile * len(values))
    groups = {j: [j] for j in targets}
    for i in merged:
        groups[best[i][1]].append(i)
    alone = [[i] for i in [*range(prefix), *(i for i in sources if i not in merged)]]
    reduction = reducer(x, context, 0, prefix)
    torch.testing.assert_close(
        in_order(reduction.tokens[0]), means(x[0], [*groups.values(), *alone], sizes)
    )


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("rate", [0.0, 3.0, 100.0])
def test_adamerge_follows_its_equations(rate, prefix):
    x, context = case(prefix)
    norm = nn.LayerNorm(DIM).double()
    patches, count = norm(x)[0, prefix:].float(), TOKENS - prefix
    affinity = [[(patches[i] @ patches[j]).item() for j in range(count)] for i in range(count)]
    rows = [[math.exp(value - max(row)) for value in row] for row in affinity]
    columns = [sum(row[j] / sum(row) for row in rows) for j in range(count)]
    low, high = min(columns), max(columns)
    salience = [max((value - low) / (high - low), 1e-6) for value in columns]
    sources, targets = range(count // 2), range(count // 2, count)

    def similarity(i, j):
        return salience[i] * F.cosine_similarity(patches[i], patches[j], dim=0).item()

    best = {i: max((similarity(i, j), j) for j in targets) for i in sources}
    redundancy = sum(value for value, _ in best.values()) / len(best)
    reducer = AdaMerge(norm)
    assert reducer.statistics(x, context, prefix).item() == pytest.approx(redundancy, abs=1e-5)
    reducer.fit([torch.tensor([redundancy - 0.1]), torch.tensor([redundancy - 0.3])], rate)
    z = (redundancy - (redundancy - 0.2)) / (0.2 / math.sqrt(2))
    merges = min(math.floor(2 * rate / (1 + math.exp(-z))), len(sources))
    chosen = sorted(sources, key=lambda i: -best[i][0])[:merges]
    groups = {j: [j] for j in targets}
    for i in chosen:
        groups[best[i][1]].append(i)
    shifted = [[prefix + i for i in group] for group in groups.values()]
    alone = [[prefix + i] for i in sources if i not in chosen]
    weights = [1.0] * prefix + salience
    reduction = reducer(x, context, 0, prefix)
    expected = means(x[0], [[i] for i in range(prefix)] + alone + shifted, weights)
    torch.testing.assert_close(in_order(reduction.tokens[0]), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(reduction.sizes.sum(1), context.sizes.sum(1))


@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_token_transforming_multiplies_with_shares_of_every_patch(temperature, prefix):
    x, context = case(prefix)
    row, keys = context.class_row[0].mean(0), context.keys[0].mean(0).float()
    sizes = context.sizes[0].tolist()
    patches = range(prefix, TOKENS)
    kept = sorted(sorted(patches, key=lambda i: -row[i].item())[: KEEP - prefix])
    share = {
        i: torch.stack([F.cosine_similarity(keys[i], keys[k], dim=0) for k in kept])
        .div(temperature)
        .softmax(0)
        .tolist()
        for i in patches
    }
    reduction = TokenTransforming(temperature)(x, context, KEEP, prefix)
    for place in range(len(kept)):
        mass = {i: share[i][place] * sizes[i] for i in patches}
        mean = sum(mass[i] * x[0, i] for i in patches) / sum(mass.values())
        torch.testing.assert_close(reduction.tokens[0, prefix + place], mean, rtol=1e-4, atol=1e-4)
        assert reduction.sizes[0, prefix + place].item() == pytest.approx(
            sum(mass.values()), rel=1e-4
        )
    assert torch.equal(reduction.tokens[:, :prefix], x[:, :prefix])
    torch.testing.assert_close(reduction.weights.sum(2), torch.ones(1, len(kept)).double())


def test_thresholds_of_dropping_keep_the_scores_above_them_and_a_patch():
    x, context = case()
    x, query = x.float(), torch.randn(DIM)
    reducer = ThresholdDrop(query)
    scores = (x[0] @ query).tolist()
    reducer.fit([reducer.statistics(x, context, 1)], 5)
    kept = [0, *sorted(sorted(range(1, TOKENS), key=lambda i: -scores[i])[: TOKENS - 6])]
    assert reducer(x, context, 0, 1).idx[0].tolist() == kept
    reducer.threshold = math.inf
    assert reducer(x, context, 0, 1).tokens.shape[1] == 2


def test_a_threshold_lets_so_many_values_go_on_average():
    images = [torch.arange(4.0), 10 + torch.arange(4.0)]
    assert lowest(images, 2) == 3.0
    assert lowest(images, 2.5) == 10.0
    assert lowest(images, 0) == -math.inf
    assert lowest(images, 9) == 13.0


@pytest.mark.parametrize("make", [ToMe, EViT, AttentionTopK, lambda: ATS(trim=True)])
def test_images_alone_equal_the_batch_and_save_what_a_counter_counts(make):
    model = randomize(reference_vit()).eval()
    images = torch.randn(3, 3, 64, 64)
    network = ImageByImage(model, [make() for _ in COUNTS], COUNTS)
    with torch.no_grad():
        logits, _, saved = network(images)
        torch.testing.assert_close(
            logits, Reduced(model, lambda *_: make(), COUNTS)(images), rtol=1e-4, atol=1e-4
        )
        counted = []
        for run in (lambda: model(images[:1]), lambda: network(images[:1])):
            with flop_counter() as counter:
                run()
            counted.append(counter.get_total_flops())
    # The class row, similarities and sums are not counted
    assert counted[0] - counted[1] == pytest.approx(saved[0].item(), rel=0.06)


@pytest.fixture(scope="module")
def rivals():
    base = randomize(reference_vit()).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        return Rivals(base, torch.randn(12, 3, 64, 64, generator=generator))


@pytest.mark.parametrize("method", METHODS)
def test_every_rival_saves_more_at_a_higher_rate(rivals, method):
    images = torch.randn(6, 3, 64, 64)
    with torch.inference_mode():
        low, high = (rivals(images, method, rate * START[method]) for rate in (2.0, 8.0))
    assert low.log_probs.shape == (6, 5) and low.log_probs.exp().sum(1).allclose(torch.ones(6))
    assert high.flops.mean() < low.flops.mean() <= rivals.unpruned
    equal = method in ("dropping", "Token Transforming")
    assert (high.flops.std().item() == 0) == equal
