"""Counts by image against constant ones: equal FLOPs, and figures of known outputs."""

import pytest
import torch
from helpers.models import randomize, reference_vit

from benchmarks.accuracy.agreement import outputs
from benchmarks.accuracy.budgets import (
    METHODS,
    TOGETHER,
    Network,
)
from benchmarks.accuracy.equal_flops import TOLERANCE, Forward, at_equal_flops, figures

RATE = 6


@pytest.fixture(scope="module")
def network():
    base = randomize(reference_vit()).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        return base, Network(base, torch.randn(12, 3, 64, 64, generator=generator))


@pytest.mark.parametrize("method", METHODS)
def test_outputs_cover_all_positions_and_flops_are_near_the_constant_rates(network, method):
    base, reduced = network
    images = torch.randn(10, 3, 64, 64)
    with torch.inference_mode():
        result = reduced(images, method, RATE)
        goal = reduced.constant_flops(RATE)
    assert result.tokens.shape == (10, 65, base.embed_dim)
    assert (result.flops.std() > 0) == (method not in ("constant", "same quotas"))
    assert result.flops.mean().item() == pytest.approx(goal, rel=0.15)


def test_padding_counts_missing_rows_and_batches_above_the_capacity(network):
    _, reduced = network
    weights = reduced.flops.weights
    counts = torch.full((TOGETHER + 2, len(weights)), 50, dtype=torch.float64)
    counts[TOGETHER:, -1] = 61  # the second batch
    flops = torch.zeros(len(counts), dtype=torch.float64)
    result = Forward(torch.zeros(1), None, flops)
    capacity = torch.full((len(weights),), 60.0, dtype=torch.float64)
    counts[:, 0] = 65  # all tokens
    capacity[0] = 70.0
    padded = reduced.padded(result, counts, capacity)
    assert padded.overflows == 0.5
    assert (padded.flops[:TOGETHER] == 2 * 10 * sum(weights[1:])).all()
    assert (padded.flops[TOGETHER:] == 0).all()


def test_the_rate_of_equal_flops_is_found_from_both_sides():
    def forward(rate):
        flops = torch.tensor([100.0 - rate**1.7], dtype=torch.float64)
        return Forward(torch.zeros(1), None, flops)

    for start in (0.5, 12.0):
        rate, result = at_equal_flops(forward, start, 70.0, 100.0)
        assert result.flops.item() == pytest.approx(70, rel=TOLERANCE)
        assert result.flops.item() == 100 - rate**1.7


def test_the_unpruned_outputs_have_no_divergence(network):
    base, _ = network
    with torch.inference_mode():
        log_probs, tokens = outputs(base, torch.randn(4, 3, 64, 64))
    row = figures(Forward(log_probs, tokens, torch.ones(4)), log_probs, tokens, 1)
    assert row["agreement"] == 100
    assert row["KL"] == row["KL 95th"] == row["features"] == 0
