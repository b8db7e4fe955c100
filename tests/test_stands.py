"""What stands where a Cropr module stands, in the benches that train: other scores, and Cropr's reversed."""

import sys
from pathlib import Path

import pytest
import torch
from models import randomise, reference_vit

import cropr_kernels as cropr
from cropr_kernels.tasks import Classifier

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from rivals import SYSTEMS, Reduced
from rivals.stands import AttentionTopK


@pytest.mark.parametrize("llf", [False, True])
@torch.no_grad()
def test_attention_top_k_in_a_pruned_model_is_that_of_the_rivals(llf):
    model, images = randomise(reference_vit()).eval(), torch.randn(2, 3, 64, 64)
    counts = cropr.schedule.resolve(rate=9)(65, len(model.blocks), 1, llf)
    want = Reduced(model, SYSTEMS["attention top-k"], counts, llf=llf)(images)
    cropr.apply(model, rate=9, llf=llf)
    for layer, module in enumerate(model.cropr):
        model.cropr[layer] = AttentionTopK(module.query(), model.blocks[layer])
    torch.testing.assert_close(model(images), want)


def test_non_salient_keeps_what_cropr_would_drop_also_where_the_auxiliary_head_gives_the_scores():
    pytest.importorskip("timm", reason="needs the train extra")
    accuracy = pytest.importorskip("accuracy", reason="needs the train extra")
    model = cropr.apply(randomise(reference_vit()), rate=9)
    module, x = model.cropr[0], torch.randn(2, 65, model.embed_dim)
    dropped = module(x, 56, 1).pruned_idx
    module.__class__ = accuracy.NonSalient
    assert torch.equal(module(x, 10, 1).kept_idx[:, 1:].sort(1).values, dropped.sort(1).values)
    _, scores = module.train().predict(x)
    assert torch.equal(module(x, 10, 1, scores).kept_idx[:, 1:].sort(1).values, dropped.sort(1).values)
    losses = Classifier(model)(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))
    assert losses["aux"].isfinite()
