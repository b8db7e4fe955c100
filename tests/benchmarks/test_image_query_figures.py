"""The benchmark of queries for image tokens: a network as tower and reader."""

import pytest
import torch

import cropr_kernels as cropr
from benchmarks.accuracy import image_queries
from benchmarks.accuracy.image_queries import CHOICES, EVEN, READER, TARGETS, fit, observe
from benchmarks.report import vlm as report


@torch.inference_mode()
def test_the_reader_of_all_patches_is_the_network_and_its_attention_the_target():
    torch.manual_seed(0)
    model = cropr.create_vit(
        "vit_tiny_patch16_224", img_size=64, embed_dim=32, num_heads=2, depth=7, num_classes=5
    ).eval()
    images = torch.randn(4, 3, 64, 64)
    observed = observe(model, images)
    torch.testing.assert_close(observed.log_probs, model(images).log_softmax(1))
    sums = torch.stack([observed.targets[name] for name in TARGETS]).sum(2)
    torch.testing.assert_close(sums, torch.ones(2, 4))

    x = observed.tokens
    attended = []
    for block in model.blocks[-3:]:
        qkv = block.attn.qkv(block.norm1(x)).unflatten(2, (3, 2, 16))
        q, k = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
        weights = (q[:, :, :1] @ k.mT / 4).softmax(-1).mean((1, 2))[:, 1:]
        attended.append(weights / weights.sum(1, keepdim=True))
        x = block(x)
    torch.testing.assert_close(observed.targets[READER], torch.stack(attended).mean(0))

    queries = fit(model, images)
    assert set(queries) == set(TARGETS)
    for choice in CHOICES:
        full = image_queries.measure(model, observed, queries[READER], 1.0, choice)
        assert full == {"agreement": 100.0, "KL": 0.0, "attention": pytest.approx(100, abs=0.1)}
        part = image_queries.measure(model, observed, queries[READER], 0.25, choice)
        even = image_queries.measure(model, observed, None, 0.25, choice)
        assert even["attention"] < part["attention"] < 100


def test_the_page_shows_the_divergence_of_targets_and_choices(monkeypatch):
    rows = [
        {
            "data": data,
            "keep": keep,
            "target": target,
            "choice": choice,
            "agreement": 90.0,
            "KL": 0.1 if target == READER else 0.3,
            "attention": 50.0,
        }
        for data in "ab"
        for keep in (0.5, 0.25)
        for target, choice in [(EVEN, "of runs"), *((t, c) for t in TARGETS for c in CHOICES)]
    ]
    env = {"device": "cpu", "torch": "2", "commit": "a", "date": "b"}
    monkeypatch.setattr(report, "load", lambda name: (env, rows))
    lines = report.queries_section().splitlines()
    assert lines[0] == "| KL, kept | 50 % | 25 % |"
    assert lines[2] == "| evenly spaced | 0.300 | 0.300 |"
    assert lines[5] == "| reader, of runs | 0.100 | 0.100 |"
    assert len(report.queries_table().rows) == 20
