"""Classification: its targets and losses against slow and obvious definitions."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import reference_vit

import cropr_kernels as cropr
from cropr_kernels.tasks import Classifier


def test_soft_targets_and_smoothing_reach_every_head():
    model = cropr.apply(reference_vit(), rate=8)
    task = Classifier(model, smoothing=0.1).train()
    images, labels = torch.randn(3, 3, 64, 64), torch.tensor([0, 3, 4])
    losses = task(images, labels)
    output, aux = model(images)
    target = F.one_hot(labels, 5) * 0.9 + 0.1 / 5
    expected = [-(target * logits.log_softmax(1)).sum(1).mean() for logits in (output, *aux)]
    torch.testing.assert_close(losses["main"], expected[0])
    torch.testing.assert_close(losses["aux"], sum(expected[1:]))
    mixed = torch.rand(3, 5).softmax(1)
    torch.testing.assert_close(
        Classifier(model)(images, mixed)["main"], -(mixed * output.log_softmax(1)).sum(1).mean()
    )
    task.eval()
    assert torch.equal(task(images), model(images)) and len(task.predictions(images)) == 4
    assert torch.equal(task.predictions(images)[-1], model(images))
    several = cropr.apply(reference_vit(), rate=8, num_queries=4)
    aux = several.train()(images)[1]
    expected = sum(F.cross_entropy(prediction.mean(1), labels) for prediction in aux)
    torch.testing.assert_close(Classifier(several)(images, labels)["aux"], expected)
    assert Classifier(several).predictions(images)[0].shape == (3, 5)
    unpruned = Classifier(reference_vit()).train()
    assert unpruned(images, labels)["aux"] == 0 and len(unpruned.predictions(images)) == 1
    with pytest.raises(ValueError, match=r"smoothing must be in \[0, 1\), got 1"):
        Classifier(model, smoothing=1)
