"""The systems that the benchmarks compare with are what their papers say."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import randomise, reference_vit

import cropr_kernels as cropr

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from rivals import AttentionTopK, ToMe, merge_pairs

COUNTS = [50, 40, 31]


def slow_pairs(x, metric, sizes, count, prefix):
    """One image: the `count` most similar (even, odd) pairs, an even token at most once; unmerged even, then odd."""
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
    order = [i for i in range(0, n, 2) if i not in moving] + list(range(1, n, 2))
    return mass[order] / total[order].unsqueeze(-1), total[order]


@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_tome_merges_the_most_similar_pairs(prefix):
    x, metric = torch.randn(3, 31, 8, dtype=torch.float64), torch.randn(3, 31, 5, dtype=torch.float64)
    sizes = torch.randint(1, 4, (3, 31)).float()
    merged, total = merge_pairs(x, metric, sizes, 6, prefix)
    for b in range(3):
        expected, expected_total = slow_pairs(x[b], metric[b], sizes[b].double(), 6, prefix)
        torch.testing.assert_close(merged[b], expected)
        torch.testing.assert_close(total[b].double(), expected_total)
    torch.testing.assert_close(
        (merged * total.double().unsqueeze(-1)).sum(1), (x * sizes.double().unsqueeze(-1)).sum(1)
    )


@pytest.mark.parametrize("make", [AttentionTopK, ToMe, lambda model, counts: ToMe(model, counts, proportional=False)])
def test_without_reduction_they_are_the_plain_model(make):
    model, images = randomise(reference_vit(init_values=0.1)).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(make(model, [65, 65, 65])(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [AttentionTopK, ToMe])
def test_they_leave_as_many_tokens_as_the_schedule_says(make):
    model = randomise(reference_vit()).eval()
    seen = []
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    with torch.no_grad():
        make(model, COUNTS)(torch.randn(2, 3, 64, 64))
    assert seen == [65, *COUNTS]


def test_attention_top_k_keeps_what_the_class_token_looks_at():
    model = randomise(reference_vit(depth=2)).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        x, _ = model.embed(images)
        q, k, _ = model.blocks[0].attn.project(model.blocks[0].norm1(x))
        row = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0].mean(1)
        row[:, 0] = 2.0
        kept = row.topk(20).indices.sort(1).values
        after = model.blocks[0](x).gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        expected = model.forward_head(model.norm(model.blocks[1](after)))
        torch.testing.assert_close(AttentionTopK(model, [20])(images), expected)


def test_non_salient_keeps_what_cropr_drops():
    pytest.importorskip("torchmetrics", reason="needs the train extra")
    from accuracy import NonSalient

    x = torch.randn(2, 10, 8)
    module = cropr.Cropr(8, 3)
    plain = module(x, 5).kept_idx
    expected, _ = module.predict(x)
    module.__class__ = NonSalient
    prediction, scores = module.predict(x)
    for split in (module(x, 5), module(x, 5, 0, scores)):
        assert torch.equal(split.pruned_idx, plain)
    assert torch.equal(prediction, expected)
