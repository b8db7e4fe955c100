"""The comparison without training: every method is built, and its outputs are those of its
forward."""

import pytest
import torch
from helpers.models import randomize, reference_vit

import cropr_kernels as cropr
from benchmarks.accuracy.agreement import calibrated, outputs, relative_error
from benchmarks.accuracy.off_the_shelf import EXPERIMENTS, MERGES, METHODS, build
from benchmarks.baselines.registry import BASELINES

MERGING = {baseline.name for baseline in BASELINES if baseline.category == "merging"} | {
    *MERGES,
    *EXPERIMENTS,
}


@pytest.mark.parametrize("name", METHODS)
def test_outputs_are_those_of_the_forward_and_full_if_tokens_merge(name):
    base, images = (
        randomize(reference_vit()).eval().requires_grad_(False),
        torch.randn(4, 3, 64, 64),
    )
    with torch.inference_mode():
        method = build(base, calibrated(base, images), name, 9)
        torch.manual_seed(0)
        expected = method(images).log_softmax(1)
        torch.manual_seed(0)
        got, tokens = outputs(method, images)
    torch.testing.assert_close(got, expected)
    assert (tokens is not None) == (name in MERGING)
    if tokens is not None:
        assert tokens.shape == (4, 65, base.embed_dim)
        assert len(torch.unique(tokens[0], dim=0)) == cropr.Schedule(rate=9).counts(65, 4, 1)[-1]


def test_the_mean_token_has_a_relative_error_of_1():
    tokens = torch.randn(5, 7, 3) * 4 + 2
    assert relative_error(tokens, tokens) == 0
    assert relative_error(tokens.mean((0, 1)).expand_as(tokens), tokens) == pytest.approx(
        1, rel=1e-5
    )
