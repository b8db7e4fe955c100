"""The paper's switches: each has its effect, and illegal combinations raise."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import reference_vit

import cropr_kernels as cropr
from cropr_kernels.pruning.module import Cropr

X = dict(size=(2, 17, 24))


def test_no_mlp_leaves_norm_and_head():
    module = Cropr(24, 5, mlp_ratio=0)
    assert {
        name.split(".")[1] for name in module.state_dict() if name.startswith("aggregator")
    } == {"norm2", "head"}
    x = torch.randn(**X)
    out = F.softmax(module.queries @ x.mT / 24**0.5, -1) @ x
    expected = module.aggregator.head(module.aggregator.norm2(out)).squeeze(1)
    torch.testing.assert_close(module.predict(x)[0], expected)


def test_progress_prunes_a_share_of_the_rate_in_integers():
    model = cropr.apply(reference_vit(), rate=10)

    def counts():
        return model.cropr.config.counts(65, 4, 1)

    assert counts() == [54, 44, 34]
    assert cropr.set_progress(model, 0.0) is model and counts() == [65, 65, 65]
    cropr.set_progress(model, 0.5)
    assert counts() == cropr.Schedule(rate=5).counts(65, 4)
    assert cropr.set_progress(model, 1.0) and counts() == [54, 44, 34]
    half = cropr.Schedule(const=(2, 25), share=0.5)
    assert half.counts(65, 4) == [65, 45, 45]
    assert "const=(2, 25), 50% of it" in str(half)


def test_a_single_reduction_prunes_once():
    assert cropr.Schedule(const=(4, 99)).counts(197, 12) == [197] * 3 + [99] * 8
    model = cropr.apply(reference_vit(), const=(1, 33))
    assert cropr.pruning_map(model, torch.randn(1, 3, 64, 64)).flatten().bincount().tolist() == [
        0,
        32,
        0,
        0,
        32,
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Cropr(24, 5, mlp_ratio=-1), "mlp_ratio >= 0"),
        (
            lambda: cropr.Schedule(const=(12, 99)).counts(197, 12),
            r"after in \[1, 11\] for 12 blocks",
        ),
        (lambda: cropr.Schedule(const=(4,)).counts(197, 12), r"const must be \(after, count\)"),
        (lambda: cropr.Schedule(rate=8, share=1.5), r"share must be a number in \[0, 1\], got 1.5"),
        (
            lambda: cropr.set_progress(reference_vit(), 0.5),
            "cropr.set_progress: the model is not pruned",
        ),
    ],
)
def test_illegal_options_raise(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
