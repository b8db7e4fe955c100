"""Features of all patches without training: errors, and the picture."""

import pytest
import torch
from helpers.models import randomize, timm_vit

from benchmarks.accuracy import dense_features
from benchmarks.accuracy.dense_features import METHODS, Colours, draw, errors, pruned_features

pytestmark = pytest.mark.slow


@torch.no_grad()
def test_at_rate_zero_every_method_gives_the_unpruned_features():
    model, images = randomize(timm_vit(depth=6)).eval(), torch.randn(2, 3, 64, 64)
    plain = dense_features.block_features(model, images, range(1, 7))
    queries, counts = [torch.randn(64) for _ in range(5)], {}
    for method in METHODS:
        same, full = pruned_features(model, queries, images, method, 0)
        assert [*same] == ([1, 2, 3, 4, 5, 6] if method in dense_features.MAPPED else [6])
        assert all(torch.equal(same[block], plain[block]) for block in same)
        features, count = pruned_features(model, queries, images, method, 8)
        assert all(features[block].shape == plain[block].shape for block in features)
        for block, block_map in features.items():
            assert (min(errors(block_map, plain[block])) > 0.01) == (block > 1)
        assert count < full
        counts[method] = count
    fewer = [counts.pop(method) for method in METHODS if "copies" in method or "after" in method]
    assert max(fewer) < min(counts.values())  # one block less sees all tokens
    assert not hasattr(model, "cropr")


def test_errors_are_relative_and_per_photo():
    plain = torch.ones(2, 4, 3)
    assert errors(plain * torch.tensor([1.5, 1.0])[:, None, None], plain) == pytest.approx(
        [0.5, 0.0]
    )


def test_colors_are_the_components_of_the_unpruned_features(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    features = torch.randn(2, 16, 5) * torch.tensor([9.0, 3.0, 1.0, 0.0, 0.0])
    colours = Colours(features[0])
    pixels = colours(features[0])
    assert pixels.shape == (4, 4, 3) and pixels.min() == 0 and pixels.max() == 1
    other = features[0] + torch.tensor([0.0, 0.0, 0.0, 5.0, 5.0])  # no component of theirs
    assert torch.allclose(colours(other), pixels, atol=1e-4)
    draw(
        tmp_path / "a.png",
        torch.rand(2, 3, 8, 8),
        features,
        dict.fromkeys(dense_features.PANELS, features),
        "",
    )
    assert (tmp_path / "a.png").stat().st_size > 1_000
