"""Auxiliary heads exist if and only if queries learn."""

import copy

import pytest
import torch
from helpers.models import HF, randomize, reference_vit, timm_vit, torchvision_vit, transformers

import cropr_kernels as cropr

IMAGES = torch.randn(2, 3, 64, 64)


def heads(model):
    return [name for name in model.state_dict() if ".aggregator." in name]


def pruned(make=reference_vit, **options):
    return cropr.apply(randomize(make()).eval(), rate=8, **options)


@pytest.mark.parametrize("make", [reference_vit, timm_vit, torchvision_vit])
def test_a_model_that_is_only_calibrated_has_no_heads(make):
    model = pruned(make)
    plain = sum(parameter.numel() for parameter in make().parameters())
    cropr.calibrate(model, IMAGES)
    model(IMAGES), cropr.agreement(model, IMAGES, [4]), cropr.deploy(model)(IMAGES), model.eval()
    assert heads(model) == []
    assert sum(parameter.numel() for parameter in model.parameters()) == plain + 3 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_training_makes_heads_and_the_queries_learn(dtype):
    model = pruned().to(dtype)
    queries = [module.queries for module in model.cropr]
    output, aux = model.train()(IMAGES.to(dtype))
    assert len(aux) == 3 and {prediction.shape for prediction in aux} == {output.shape}
    assert all(module.queries is query for module, query in zip(model.cropr, queries))
    new_heads = [module.aggregator for module in model.cropr]
    assert {parameter.dtype for head in new_heads for parameter in head.parameters()} == {dtype}
    assert new_heads[0].mlp[0].out_features == 256 and all(head.training for head in new_heads)
    sum(prediction.float().sum() for prediction in aux).backward()
    assert all(query.grad.abs().sum() > 0 for query in queries)
    model.eval().train()
    assert [module.aggregator for module in model.cropr] == new_heads


def test_models_in_training_mode_or_with_num_outputs_have_heads_at_once():
    assert heads(cropr.apply(reference_vit(), rate=8)) and heads(pruned(num_outputs=7))
    for model in (pruned(num_outputs=0), cropr.deploy(pruned()), pruned(lambda: reference_vit(num_classes=0))):
        assert isinstance(model.train()(IMAGES), torch.Tensor) and heads(model) == []


def test_an_optimizer_made_before_the_heads_raises():
    model = pruned()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    cropr.loss(torch.nn.functional.cross_entropy, *model.train()(IMAGES), torch.tensor([0, 1])).backward()
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"made before model.train\(\) made the auxiliary heads.*make it after"):
            early.step()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    other = torch.nn.Linear(2, 2)
    torch.optim.SGD(other.parameters(), lr=0.1).step()  # of another model
    torch.optim.SGD(model.head.parameters(), lr=0.1).step()  # the queries are not its business
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model.cropr[0].queries, before["cropr.0.queries"])


def test_heads_are_frozen_if_the_queries_are():
    model = pruned().requires_grad_(False)
    model.head.requires_grad_(True)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    output, _ = model.train()(IMAGES)
    output.sum().backward()
    optimizer.step()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == ["head.weight", "head.bias"]


@pytest.mark.parametrize("trained", [False, True])
def test_weights_load_with_heads_and_without(trained):
    model = pruned().train(trained)
    state, other = model.state_dict(), pruned(lambda: reference_vit())
    other.load_state_dict(state)
    assert heads(other) == heads(model) and bool(heads(model)) == trained
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())
    copied = copy.deepcopy(pruned())
    assert heads(copied) == [] and heads(copied.train())


@pytest.mark.parametrize("trained", [False, True])
def test_save_pretrained_keeps_heads_if_there_are_any(trained, tmp_path):
    t = transformers()
    model = pruned(lambda: t.ViTForImageClassification(t.ViTConfig(**HF, num_labels=5)))
    model.train(trained).save_pretrained(tmp_path)
    other = cropr.from_pretrained(tmp_path)
    assert bool(heads(other)) == trained and heads(other) == heads(model)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    other.train()
    assert len(heads(other)) == len(heads(model.train()))
    assert other.cropr[0].aggregator.mlp[0].out_features == 256


@pytest.mark.parametrize("trained", [False, True])
def test_a_saved_folder_keeps_heads_if_there_are_any(trained, tmp_path):
    model = cropr.calibrate(pruned().train(trained), IMAGES)
    cropr.save(model, tmp_path)
    for into in (None, reference_vit()):
        other = cropr.load(tmp_path, into)
        assert heads(other) == heads(model) and bool(heads(other)) == trained
        assert other.train().cropr[0].aggregator.mlp[0].out_features == 256
