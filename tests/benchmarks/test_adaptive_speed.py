"""Counts by image at equal images a second: the rate of equal time."""

import pytest
import torch
from helpers.models import randomize, reference_vit

import cropr_kernels as cropr
from benchmarks.accuracy import adaptive_speed
from benchmarks.accuracy.budgets import Network
from cropr_kernels.utils.timing import Timing

RATE = 6


@pytest.fixture(scope="module")
def network():
    base = randomize(reference_vit()).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        return Network(base, torch.randn(12, 3, 64, 64, generator=generator))


@pytest.mark.parametrize(
    ("slope", "expected"),
    [(4.0, 7.5), (5.0, 6.0), (20.0, RATE / 2), (1.0, 1.3 * RATE), (-1.0, 1.3 * RATE)],
)
def test_the_rate_of_equal_time_is_on_the_line_of_the_times_within_bounds(
    slope, expected, monkeypatch
):
    def planted(calls, device, rounds):
        known = {0.0: 100.0, "constant": 100.0, "own": 80.0}
        return {
            key: Timing(seconds, seconds, seconds)
            for key in calls
            for seconds in (known[key] if key in known else 130.0 - slope * key,)
        }

    monkeypatch.setattr(adaptive_speed, "time_interleaved", planted)
    monkeypatch.setattr(cropr, "set_rate", lambda model, rate: model)
    network = type("Planted", (), {"model": None})()
    actual = adaptive_speed.rate_of_equal_time(network, torch.zeros(2, 3, 64, 64), 8, RATE)
    assert actual == pytest.approx([expected, 1.25], rel=1e-4)


@torch.inference_mode()
def test_images_run_in_batches_by_either_method(network, monkeypatch):
    seen = []
    forward = network.model.forward_head

    def noted(tokens):
        seen.append(len(tokens))
        return forward(tokens)

    monkeypatch.setattr(network.model, "forward_head", noted)
    monkeypatch.setattr(adaptive_speed, "ROUNDS", 1)
    images = torch.randn(5, 3, 64, 64)
    rate, ratio = adaptive_speed.rate_of_equal_time(network, images, 4, RATE)
    assert RATE / 2 <= rate <= 1.3 * RATE and ratio > 0
    # A warm-up and a round of four calls, then of two
    assert seen == [4, 1] * 12
