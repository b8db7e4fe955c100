"""Auxiliary heads exist if and only if queries learn, from `apply` on, and have the width of the
classifier."""

import copy
import json

import pytest
import torch
from helpers.models import (
    HF,
    output_and_aux,
    outputs_of,
    randomize,
    reference_vit,
    timm_vit,
    torchvision_vit,
    transformers,
)
from torch import nn
from torch.nn.functional import cross_entropy

import cropr_kernels as cropr

IMAGES = torch.randn(2, 3, 64, 64)
TARGET = torch.tensor([0, 1])


def heads(model):
    return [name for name in model.state_dict() if ".aggregator." in name]


def pruned(make=reference_vit, **options):
    return cropr.apply(randomize(make()).eval(), rate=8, **options)


def hf_vit():
    return transformers().ViTForImageClassification(transformers().ViTConfig(**HF, num_labels=5))


@pytest.mark.parametrize("make", [reference_vit, timm_vit, torchvision_vit, hf_vit])
def test_without_outputs_there_are_no_heads_and_queries_are_fixed(make):
    model = pruned(make, num_outputs=0)
    plain = sum(parameter.numel() for parameter in make().parameters())
    cropr.calibrate(model, IMAGES)
    (
        model(IMAGES),
        cropr.agreement(model, IMAGES, [4]),
        cropr.deploy(model)(IMAGES),
        model.train()(IMAGES),
    )
    assert heads(model) == [] and heads(pruned(lambda: reference_vit(num_classes=0))) == []
    assert sum(parameter.numel() for parameter in model.parameters()) == plain + 3 * 64
    assert not any(module.queries.requires_grad for module in model.cropr)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_train_the_queries(dtype):
    model = pruned().to(dtype)
    output, aux = model.train()(IMAGES.to(dtype))
    assert len(aux) == 3 and {prediction.shape for prediction in aux} == {output.shape}
    assert model.cropr[0].aggregator.mlp[0].out_features == 256
    sum(prediction.float().sum() for prediction in aux).backward()
    assert all(module.queries.grad.abs().sum() > 0 for module in model.cropr)


@pytest.mark.parametrize("make", [reference_vit, timm_vit, torchvision_vit, hf_vit])
def test_no_later_call_makes_or_replaces_parameters(make, tmp_path):
    model = pruned(make, llf="track_parent")
    expected = list(model.named_parameters())
    cropr.calibrate(model, IMAGES)
    cropr.save_queries(model, tmp_path / "queries")
    calls = [
        model.train, lambda: model(IMAGES), model.eval, lambda: model(IMAGES),
        lambda: cropr.set_rate(model, 4),
        lambda: cropr.set_llf(model, cropr.Fusion(blocks=2)),
        lambda: cropr.set_progress(model, 0.5),
        lambda: cropr.load_queries(model, tmp_path / "queries"), lambda: cropr.deploy(model),
        lambda: cropr.pruning_map(model, IMAGES), lambda: model.load_state_dict(model.state_dict()),
        lambda: model.load_state_dict(cropr.deploy(model).state_dict()),
        lambda: model.requires_grad_(True).train(),
    ]  # fmt: skip
    for call in calls:
        call()
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in expected]
        assert all(
            parameter is before for parameter, (_, before) in zip(model.parameters(), expected)
        )


def moving_averages(model):
    """The averages of timm and torch, each with the call after a step, and the module that holds
    the weights."""
    averages = [
        (
            average := torch.optim.swa_utils.AveragedModel(model),
            average.update_parameters,
            average.module,
        )
    ]
    timm = pytest.importorskip("timm", reason="timm is not installed")
    for name in ("ModelEmaV2", "ModelEmaV3"):
        average = getattr(timm.utils, name)(model, decay=0.5)
        averages.append((average, average.update, average.module))
    return averages


@pytest.mark.parametrize("make", [timm_vit, reference_vit, hf_vit])
def test_averages_and_optimizers_made_in_eval_mode_follow_every_parameter(make):
    model = pruned(make)
    averages = moving_averages(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = [copy.deepcopy(model.state_dict())]
    for _ in range(3):
        output, aux = output_and_aux(model.train()(IMAGES))
        cropr.loss(cross_entropy, outputs_of(output), aux, TARGET).backward()
        optimizer.step()
        history.append(copy.deepcopy(model.state_dict()))
        for _, update, _ in averages:
            update(model)
    for name, start in history[0].items():
        assert not name.startswith("cropr.") or not torch.equal(history[-1][name], start), name
        expected = start
        for state in history[1:]:
            expected = (expected + state[name]) / 2
        mean = sum(state[name] for state in history[1:]) / 3
        for (_, _, average), value in zip(averages, (mean, expected, expected)):
            torch.testing.assert_close(average.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def replace_head(model, classes):
    """Give a model another classifier, as its users do."""
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(classes)
    elif hasattr(model, "heads"):
        model.heads.head = nn.Linear(64, classes)
    elif hasattr(model, "classifier"):
        model.classifier, model.config.num_labels = nn.Linear(64, classes), classes
    else:
        model.head = nn.Linear(64, classes)
    return model


def arguments_of(make):
    """Arguments of a forward in training, for each way to call it."""
    ways = [
        {},
        {"labels": TARGET},
        {"labels": TARGET, "return_dict": False},
        {"return_dict": False},
    ]
    return ways if make is hf_vit else ways[:1]


@pytest.mark.parametrize("classes", [3, 9])
@pytest.mark.parametrize("make", [reference_vit, timm_vit, torchvision_vit, hf_vit])
def test_a_classifier_of_another_width_than_the_heads_raises_in_training(make, classes):
    model = replace_head(pruned(make), classes)
    assert outputs_of(model(IMAGES)).shape == (2, classes)
    for arguments in arguments_of(make):
        with pytest.raises(
            ValueError,
            match=rf"heads were made for 5 classes, and the model gives {classes}; .* or with "
            rf"num_outputs={classes}",
        ):
            model.train()(IMAGES, **arguments)
    replaced = cropr.apply(replace_head(make(), classes), rate=8)
    foreseen = replace_head(pruned(make, num_outputs=classes), classes)
    for model in (replaced, foreseen):
        for arguments in arguments_of(make):
            output = model.train()(IMAGES, **arguments)
            aux = output[-1] if isinstance(output, tuple) else output.aux
            assert [prediction.shape for prediction in aux] == [(2, classes)] * 3
    chosen = cropr.apply(make(), rate=8, num_outputs=classes).train()  # beside a classifier of 5
    assert output_and_aux(chosen(IMAGES))[1][0].shape == (2, classes)


def test_frozen_models_stay_frozen():
    model = pruned().requires_grad_(False)
    model.head.requires_grad_(True)
    model.train()(IMAGES)[0].sum().backward()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == ["head.weight", "head.bias"]


@pytest.mark.parametrize("options", [{}, {"num_outputs": 0}], ids=str)
def test_weights_load_with_heads_and_without(options):
    model, other = pruned(**options), pruned()
    kept, state = copy.deepcopy(other.state_dict()), model.state_dict()
    other.load_state_dict(state)
    for name, value in other.state_dict().items():
        assert torch.equal(value, state.get(name, kept[name]))
    without = pruned(num_outputs=0)
    without.load_state_dict(state)
    assert heads(without) == [] and torch.equal(without.cropr[0].queries, model.cropr[0].queries)
    incomplete = {
        name: value
        for name, value in pruned().state_dict().items()
        if not name.endswith("0.aggregator.head.bias")
    }
    with pytest.raises(RuntimeError, match=r"Missing key.* \"cropr.0.aggregator.head.bias\""):
        other.load_state_dict(incomplete)


@pytest.mark.parametrize("options", [{}, {"num_outputs": 0}], ids=str)
def test_saved_models_keep_heads_if_there_are_any(options, tmp_path):
    for make in (reference_vit, hf_vit):
        model = cropr.calibrate(pruned(make, **options), IMAGES)
        folders = [tmp_path / f"{make.__name__}_{i}" for i in range(2)]
        cropr.save(model, folders[0])
        others = [cropr.load(folders[0])]
        if make is hf_vit:
            model.save_pretrained(folders[1])
            others.append(cropr.from_pretrained(folders[1]))
        else:
            others.append(cropr.load(folders[0], make()))
        for other in others:
            assert heads(other) == heads(model) and bool(heads(other)) == (not options)
            assert all(
                torch.equal(value, other.state_dict()[name])
                for name, value in model.state_dict().items()
            )


@pytest.mark.parametrize("make", [reference_vit, hf_vit])
def test_files_of_models_whose_heads_were_still_to_be_made_load(make, tmp_path):
    model = cropr.calibrate(pruned(make, num_outputs=0), IMAGES)
    cropr.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["cropr"]["num_outputs"] = None  # as it was written before
    del config["cropr"]["sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = cropr.load(tmp_path)
    assert torch.equal(outputs_of(other(IMAGES)), outputs_of(model(IMAGES)))
    output, aux = output_and_aux(other.train()(IMAGES))
    assert len(aux) == 3 and aux[0].shape == outputs_of(output).shape
