"""apply, remove, set_rate, deploy, pruning_map and loss on the reference ViT and on timm models."""

import copy

import pytest
import torch
from helpers.models import MODELS, randomize, reference_vit, timm_vit
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import cropr_kernels as cropr
from cropr_kernels.models.vit import ViT


@pytest.fixture(params=MODELS)
def model(request):
    return randomize(MODELS[request.param]()).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("llf", [False, True])
def test_rate_zero_equals_the_plain_model_bit_for_bit(model, images, llf):
    plain = model(images)
    cropr.apply(model, rate=0, llf=llf)
    assert torch.equal(model(images), plain)


@pytest.mark.parametrize("llf", [False, True])
def test_apply_then_remove_leaves_nothing_behind(model, images, llf):
    plain, keys, model_class = model(images), list(model.state_dict()), type(model)
    drops = [module.drop_prob for module in model.modules() if hasattr(module, "drop_prob")]
    attributes = set(vars(model))
    assert cropr.apply(model, rate=8, llf=llf) is model
    assert [key for key in model.state_dict() if not key.startswith("cropr.")] == keys
    assert isinstance(model, model_class)
    assert not torch.equal(model(images), plain)
    assert cropr.remove(model) is model
    assert (
        list(model.state_dict()) == keys
        and type(model) is model_class
        and set(vars(model)) == attributes
    )
    assert [module.drop_prob for module in model.modules() if hasattr(module, "drop_prob")] == drops
    assert torch.equal(model(images), plain)


def test_llf_switches_stochastic_depth_off_in_the_last_block_only():
    model = cropr.apply(timm_vit(drop_path_rate=0.2), rate=8, llf=True)
    rates = [block.drop_path1.drop_prob for block in model.blocks[1:]]
    assert rates[-1] == 0.0 and all(rates[:-1])


@pytest.mark.parametrize("llf", [False, True])
def test_training_returns_output_and_one_prediction_per_module(model, images, llf):
    cropr.apply(model, rate=8, llf=llf)
    output, aux = model.train()(images)
    assert output.shape == (2, 5)
    assert len(aux) == len(model.cropr) == (2 if llf else 3)
    assert all(prediction.shape == (2, 5) for prediction in aux)
    assert model.eval()(images).shape == (2, 5)


def test_auxiliary_loss_never_reaches_the_backbone(model, images):
    cropr.apply(model, rate=8, llf=True)
    _, aux = model.train()(images)
    sum(cross_entropy(prediction, torch.tensor([0, 1])) for prediction in aux).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("cropr."):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_main_loss_never_reaches_the_queries(model, images):
    cropr.apply(model, rate=8, llf=True)
    output, _ = model.train()(images)
    output.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("cropr."), name


def test_loss_is_the_plain_sum():
    output, aux, target = (
        torch.randn(4, 5),
        [torch.randn(4, 5) for _ in range(3)],
        torch.randint(0, 5, (4,)),
    )
    expected = cross_entropy(output, target) + sum(cross_entropy(a, target) for a in aux)
    torch.testing.assert_close(cropr.loss(cross_entropy, output, aux, target), expected)
    soft = torch.rand(4, 5).softmax(-1)
    assert cropr.loss(cross_entropy, output, aux, soft).ndim == 0


@pytest.mark.each_choice
@pytest.mark.parametrize("num_queries", [1, 6])
@pytest.mark.parametrize("llf", [False, True])
def test_deploy_gives_the_same_bits_and_leaves_its_argument_alone(model, images, llf, num_queries):
    cropr.apply(model, rate=8, llf=llf, num_queries=num_queries)
    model.train()
    before = copy.deepcopy(model.state_dict())
    deployed = cropr.deploy(model, engine=False)
    assert model.training and not deployed.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert torch.equal(deployed(images), model.eval()(images))
    assert not any(parameter.requires_grad for parameter in deployed.parameters())
    assert all(module.query().shape == (64,) for module in deployed.cropr)
    assert not [key for key in deployed.state_dict() if "aggregator" in key or "queries" in key]
    assert torch.equal(cropr.deploy(deployed, engine=False)(images), deployed(images))
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    assert torch.equal(
        before["patch_embed.proj.weight"], deployed.state_dict()["patch_embed.proj.weight"]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_prune(model, images, dtype):
    cropr.apply(model, rate=8, llf=True).to(dtype)
    assert model(images.to(dtype)).isfinite().all()


def test_training_under_autocast_gives_finite_gradients(model, images):
    cropr.apply(model, rate=8, llf=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, aux = model.train()(images)
        loss = cropr.loss(cross_entropy, output, aux, torch.tensor([0, 1]))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.cropr.parameters())


def test_any_image_size_is_pruned_if_its_tokens_suffice():
    model = cropr.apply(reference_vit(rope=True), rate=8, llf=True).eval()
    assert model(torch.randn(1, 3, 96, 48)).shape == (1, 5)
    assert cropr.pruning_map(model, torch.randn(1, 3, 96, 48)).shape == (1, 12, 6)
    with pytest.raises(
        ValueError, match=r"rate must be at most 7 for 17 tokens and 2 modules, .* got 8"
    ):
        model(torch.randn(1, 3, 32, 32))


def test_lists_and_ratios_keep_the_tokens_they_name(images):
    model = cropr.apply(reference_vit(), keep=[40, 40, 10]).eval()
    left = cropr.pruning_map(model, images)
    assert [(left == layer).sum().item() for layer in (1, 2, 3, 4)] == [2 * 25, 0, 2 * 30, 2 * 9]
    cropr.remove(model)
    cropr.apply(model, ratio=0.5)
    assert (cropr.pruning_map(model, images) == 4).sum().item() == 2 * 8


@pytest.mark.parametrize("llf", [False, True])
def test_pruning_map_counts_follow_the_schedule(model, images, llf):
    cropr.apply(model, rate=8, llf=llf)
    left = cropr.pruning_map(model, images)
    assert left.shape == (2, 8, 8) and left.dtype == torch.int64
    prefix, modules = model.num_prefix_tokens, len(model.cropr)
    for layer in range(1, modules + 1):
        assert (left == layer).sum().item() == 2 * (8 + (prefix % 4 if layer == 1 else 0))
    assert (left == 4).sum().item() == 2 * (64 - 8 * modules - prefix % 4)


def test_set_rate_changes_the_schedule(model, images):
    cropr.apply(model, rate=4)
    four = model(images)
    cropr.set_rate(model, 12)
    twelve = model(images)
    cropr.remove(cropr.set_rate(model, 4))
    cropr.apply(model, rate=12)
    assert not torch.equal(four, twelve)


def test_state_dict_round_trips(model, images, tmp_path):
    cropr.apply(model, rate=8, llf=True)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(images), model(images))


def test_pruning_saves_the_flops_it_promises():
    model, image = reference_vit(depth=12).eval(), torch.randn(1, 3, 64, 64)
    flops = []
    for rate in (0, 4):
        deployed = cropr.deploy(cropr.apply(copy.deepcopy(model), rate=rate))
        with FlopCounterMode(display=False) as counter:
            deployed(image)
        flops.append(counter.get_total_flops())
    kept = sum([65, *cropr.Schedule(rate=4).counts(65, 12)]) / (65 * 12)
    assert kept - 0.06 < flops[1] / flops[0] < kept + 0.03


@pytest.mark.parametrize(
    ("name", "compiler"),
    [
        ("timm EVA-02", "aot_eager"),
        pytest.param("reference", "inductor", marks=pytest.mark.slow),  # others: test_engine.py
    ],
)
def test_deployed_models_compile_to_one_graph(name, compiler, images):
    torch._dynamo.reset()
    model = cropr.deploy(cropr.apply(MODELS[name](), rate=8, llf=True))
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


def test_an_exported_program_calls_the_ops_and_gives_the_same_bits(images):
    model = cropr.deploy(cropr.apply(reference_vit(rope=True), rate=8, llf=True))
    program = torch.export.export(model, (images,))
    assert torch.equal(program.module()(images), cropr.deploy(model, engine=False)(images))
    assert "torch.ops.cropr.prune" in program.graph_module.code


def test_gradient_checkpointing_gives_the_same_gradients(images):
    model = cropr.apply(timm_vit(), rate=8, llf=True).train()
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(recompute)
        output, aux = model(images)
        cropr.loss(cross_entropy, output, aux, torch.tensor([0, 1])).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
def test_cuda_gives_the_cpu_result(images):
    model = cropr.deploy(cropr.apply(reference_vit(rope=True), rate=8, llf=True))
    torch.testing.assert_close(
        model.cuda()(images.cuda()).cpu(), model.cpu()(images), rtol=1e-3, atol=1e-3
    )


def test_models_that_cannot_be_pruned_raise():
    with pytest.raises(
        TypeError, match=r"torch.nn.modules.linear.Linear cannot be pruned: a forward of "
    ):
        cropr.apply(nn.Linear(2, 2), rate=8)
    model = cropr.apply(reference_vit(), rate=8)
    with pytest.raises(
        ValueError, match=r"the model is pruned already; cropr.set_rate changes the rate"
    ):
        cropr.apply(model, rate=8)
    with pytest.raises(ValueError, match="rate must be at most 20 for 65 tokens"):
        cropr.apply(reference_vit(), rate=40)
    with pytest.raises(ValueError, match="exactly one of rate, keep, ratio and const"):
        cropr.apply(reference_vit())
    with pytest.raises(ValueError, match="rate must be at most 20 for 65 tokens"):
        cropr.set_rate(model, 40)
    with pytest.raises(ValueError, match="create it with patch_drop_rate=0"):
        cropr.apply(timm_vit(patch_drop_rate=0.5), rate=8)
    for function in (
        cropr.remove,
        cropr.deploy,
        lambda m: cropr.set_rate(m, 2),
        lambda m: cropr.pruning_map(m, None),
    ):
        with pytest.raises(TypeError, match=r"the model is not pruned; call cropr.apply"):
            function(reference_vit())
    with pytest.raises(ValueError, match="dim and num_queries must be >= 1"):
        cropr.Cropr(dim=0)


def test_a_failed_apply_leaves_the_model_unchanged():
    model = reference_vit()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="rate must be at most 31 for 65 tokens"):
        cropr.apply(model, rate=40, llf=True)
    assert type(model) is ViT and list(model.state_dict()) == keys
