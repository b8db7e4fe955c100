"""Baselines that select tokens, each against a slow, obvious version of its paper."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.baselines import DIM, HEADS, KEEP, TOKENS, context_of, make
from helpers.models import randomize, reference_vit

from benchmarks.baselines.network import Context, Reduced
from benchmarks.baselines.registry import SYSTEMS
from benchmarks.baselines.selection import ATS, POMT, SAINT, EViT, KMedoids
from cropr_kernels.models.blocks import project_heads


def test_attention_top_k_keeps_the_tokens_that_the_class_token_attends_to():
    model = randomize(reference_vit(depth=2)).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        x, _ = model.embed(images)
        q, k, _ = project_heads(model.blocks[0].attn, model.blocks[0].norm1(x))
        row = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0].mean(1)
        row[:, 0] = 2.0
        kept = row.topk(20).indices.sort(1).values
        after = model.blocks[0](x).gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        expected = model.forward_head(model.norm(model.blocks[1](after)))
        torch.testing.assert_close(
            Reduced(model, SYSTEMS["attention top-k"], [20])(images), expected
        )


def test_pixel_variance_follows_the_patches_through_all_layers():
    images = torch.randn(2, 3, 64, 64) * torch.linspace(0.1, 2, 64)
    network, seen = make("pixel variance"), []
    network.reducers["2"].register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[1], output))
    )
    with torch.no_grad():
        network(images)
    context, reduction = seen[0]
    active = context.positions.gather(1, reduction.idx)
    variance = torch.stack(
        [
            torch.stack(
                [
                    image[:, r : r + 8, c : c + 8].var()
                    for r in range(0, 64, 8)
                    for c in range(0, 64, 8)
                ]
            )
            for image in images
        ]
    )
    expected = variance.topk(30).indices.sort(1).values + 1
    assert torch.equal(active[:, 1:], expected) and (active[:, 0] == 0).all()


def test_representation_shift_keeps_the_tokens_that_the_mlp_changes_most():
    model = randomize(reference_vit(depth=2, init_values=0.1)).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        first, (x, _) = model.blocks[0], model.embed(images)
        after = first(x)
        shift = (after - x - first.ls1(first.attn(first.norm1(x)))).norm(dim=2)
        shift[:, 0] = torch.inf
        kept = shift.topk(20).indices.sort(1).values
        x = model.blocks[1](after.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[2])))
        network = Reduced(model, SYSTEMS["representation shift"], [20])
        torch.testing.assert_close(network(images), model.forward_head(model.norm(x)))


def slow_saint(cosine, evens, odds, threshold):
    """Return the even patches, those first that are similar to most odd ones."""
    scores = {}
    for i in evens:
        all_odd = [cosine(i, j) for j in odds]
        near = [value for value in all_odd if value >= threshold]
        alone = sum(all_odd) / len(all_odd)
        scores[i] = (
            len(near) * math.exp(10 * (sum(near) / len(near) - threshold)) if near else alone
        )
    return sorted(evens, key=lambda i: -scores[i])


@pytest.mark.parametrize("threshold", [0.1, 0.75, 2.0])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_saint_drops_even_patches_that_are_like_odd_ones(prefix, threshold):
    x = torch.randn(3, TOKENS, DIM)
    context = context_of(x, prefix)
    reduction = SAINT(threshold)(x, context, KEEP, prefix)
    for b in range(3):
        keys = context.keys[b].double().mean(0)
        goes = slow_saint(
            lambda i, j, keys=keys: F.cosine_similarity(keys[i], keys[j], dim=0).item(),
            range(prefix, TOKENS, 2),
            range(prefix + 1, TOKENS, 2),
            threshold,
        )[: TOKENS - KEEP]
        assert reduction.idx[b].tolist() == [i for i in range(TOKENS) if i not in goes]
        assert torch.equal(reduction.tokens[b], x[b, reduction.idx[b]])


def test_saint_restores_dropped_tokens_and_drops_at_most_half():
    network = Reduced(randomize(reference_vit()), SYSTEMS["SAINT"], [50, 40, 40], llf=True).eval()
    seen = []
    network.backbone.blocks[-1].norm1.register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape)
    )
    with torch.no_grad():
        network(torch.randn(2, 3, 64, 64))
    assert seen[0][1] == 65
    with pytest.raises(ValueError, match="SAINT: of 65 tokens at most 32 can go, not 35"):
        Reduced(reference_vit(), SYSTEMS["SAINT"], [30])(torch.randn(1, 3, 64, 64))


def test_evit_fuses_pruned_tokens_by_attention():
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    context = context_of(x)
    tokens = EViT()(x, context, KEEP, 1).tokens
    for b in range(2):
        row = context.class_row[b].mean(0)
        order = sorted(range(1, TOKENS), key=lambda i: -row[i].item())
        kept, pruned = sorted(order[: KEEP - 2]), order[KEEP - 2 :]
        fused = sum(row[i] * x[b, i] for i in pruned)
        torch.testing.assert_close(
            tokens[b], torch.stack([x[b, 0], *(x[b, i] for i in kept), fused])
        )


def test_evit_merges_between_attention_and_mlp():
    model = randomize(reference_vit(depth=2)).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        x, _ = model.embed(images)
        first, second = model.blocks
        q, k, _ = project_heads(first.attn, first.norm1(x))
        x = x + first.attn(first.norm1(x))
        row = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0]
        x = EViT()(x, Context(class_row=row), 20, 1).tokens
        x = second(x + first.mlp(first.norm2(x)))
        torch.testing.assert_close(
            Reduced(model, SYSTEMS["EViT"], [20])(images), model.forward_head(model.norm(x))
        )


@pytest.mark.parametrize("prefix", [1, 3])
def test_pomt_keeps_tokens_with_much_attention_or_large_values(prefix):
    x = torch.randn(3, TOKENS, DIM, dtype=torch.float64)
    context = context_of(x, prefix)
    tokens = POMT()(x, context, KEEP, prefix).tokens
    patches = range(prefix, TOKENS)
    for b in range(3):
        attention, values = context.attention[b], context.values[b]
        received = {
            j: sum(max(attention[h, i, j].item() for h in range(HEADS)) for i in patches)
            for j in patches
        }
        sums = [
            sum(max(values[h, j, c].item() for h in range(HEADS)) for c in range(4))
            for j in range(TOKENS)
        ]
        total = sum(math.exp(value) for value in sums)
        score = {
            j: received[j] / max(received.values()) + math.exp(sums[j]) / total for j in patches
        }
        order = sorted(patches, key=lambda j, score=score: -score[j])
        kept, pruned = sorted(order[: KEEP - 1 - prefix]), order[KEEP - 1 - prefix :]
        expected = [*x[b, :prefix], *(x[b, j] for j in kept), x[b, pruned].mean(0)]
        torch.testing.assert_close(tokens[b], torch.stack(expected))


def test_ats_samples_the_cumulated_significance():
    x = torch.randn(3, TOKENS, DIM, dtype=torch.float64)
    context = context_of(x)
    reduction = ATS()(x, context, KEEP, 1)
    for b in range(3):
        significance = torch.zeros(TOKENS - 1, dtype=torch.float64)
        for head in range(HEADS):
            of_head = torch.tensor(
                [
                    context.class_row[b, head, i] * context.values[b, head, i].norm()
                    for i in range(1, TOKENS)
                ]
            )
            significance += of_head / of_head.sum()
        chosen, total = [], significance.sum().item()
        for point in range(KEEP - 1):
            threshold, running = (point + 0.5) / (KEEP - 1) * total, 0.0
            for i in range(TOKENS - 1):
                running += significance[i].item()
                if running >= threshold:
                    chosen.append(i + 1)
                    break
        real = reduction.sizes[b] > 0
        assert reduction.idx[b][real].tolist() == [0, *sorted(set(chosen))]
        torch.testing.assert_close(reduction.tokens[b], x[b, reduction.idx[b]])


def test_ats_padding_changes_neither_output_nor_gradient():
    images, grads, outputs = torch.randn(2, 3, 64, 64, dtype=torch.float64), [], []
    for name in ("ATS", "ATS, trimmed"):
        torch.manual_seed(1)
        network = make(name).double()
        output = network(images)
        output.square().sum().backward()
        outputs.append(output.detach())
        grads.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def central_member(members, points, weight):
    """Return the member of least weighted distance to all others."""
    return min(
        members,
        key=lambda i: sum(weight[j] * (points[i] - points[j]).norm() for j in members).item(),
    )


def slow_medoids(points, weight, count, rounds):
    medoids = weight.topk(count).indices.tolist()
    for _ in range(rounds):
        clusters = {m: [m] for m in medoids}
        for i in range(len(points)):
            if i not in medoids:
                nearest = min(medoids, key=lambda m, i=i: (points[i] - points[m]).norm().item())
                clusters[nearest].append(i)
        medoids = [central_member(members, points, weight) for members in clusters.values()]
    return sorted(medoids)


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_k_medoids_keeps_the_middle_of_every_cluster(rounds):
    x = torch.randn(3, TOKENS, DIM)
    context = context_of(x)
    idx = KMedoids(rounds)(x, context, KEEP, 1).idx
    for b in range(3):
        weight = context.attention[b].mean(0).sum(0)[1:]
        expected = slow_medoids(x[b, 1:], weight, KEEP - 1, rounds)
        assert idx[b].tolist() == [0, *(i + 1 for i in expected)]


def test_k_medoids_of_equal_tokens_are_distinct():
    x = torch.ones(1, TOKENS, DIM)
    idx = KMedoids()(x, context_of(x), KEEP, 1).idx[0].tolist()
    assert len(set(idx)) == KEEP and set(idx) <= set(range(TOKENS))
