"""A pruned model in other libraries: parallel training, torch.func, torch.fx, transformers."""

import inspect
import json
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from helpers.models import (
    HF,
    output_and_aux,
    outputs_of,
    randomize,
    reference_vit,
    timm_eva,
    timm_vit,
    torchvision_vit,
    transformers,
)
from torch import nn
from torch.nn.functional import cross_entropy

import cropr_kernels as cropr

HF_MODELS = pytest.mark.filterwarnings("ignore")  # transformers' own


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


def vit(**options):
    return randomize(
        transformers().ViTForImageClassification(
            transformers().ViTConfig(**HF, num_labels=5, **options)
        )
    )


def loss_of(output):
    output, aux = output_and_aux(output)
    return outputs_of(output).square().sum() + sum(prediction.square().sum() for prediction in aux)


# More than one process or device


def work(model, images, answers):
    torch.set_num_threads(1)
    with torch.no_grad():
        answers.put(outputs_of(model(images)).numpy())


@torch.no_grad()
def test_a_spawned_process_gets_the_model(images):
    model = cropr.deploy(cropr.apply(randomize(timm_vit()).eval(), rate=8, merge=True))
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=work, args=(model, images, answers))
    process.start()
    torch.testing.assert_close(
        torch.from_numpy(answers.get(timeout=600)), model(images), rtol=1e-4, atol=1e-5
    )
    process.join()


def replicate(model):
    """Return a replica as nn.DataParallel makes it, with parameters of its own."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else copies[child])
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            setattr(replica, name, None if tensor is None else tensor.detach().clone())
    return copies[model]


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("make", [timm_vit, vit, torchvision_vit])
@torch.no_grad()
def test_replicas_compute_with_their_own_parameters(make, deployed, images):
    model = cropr.apply(randomize(make()).eval(), rate=8, llf=True, num_outputs=0)
    model = cropr.deploy(model, engine=False) if deployed else model
    replica, expected = replicate(model), outputs_of(model(images))
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.zero_()
    assert torch.equal(outputs_of(replica(images)), expected)


@pytest.fixture
def alone():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


WAYS = [{}, {"num_outputs": 0}, {"merge": True}, {"merge": True, "llf": True}]


@pytest.mark.each_choice
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("parallel", ["DDP", "FSDP2"])
@pytest.mark.parametrize("make", [timm_vit, timm_eva, vit, torchvision_vit])
def test_steps_in_parallel_are_those_of_one_process(make, parallel, options, images, alone):
    torch.manual_seed(0)
    plain = cropr.apply(make(), rate=8, **options).train()
    torch.manual_seed(0)
    model = cropr.apply(make(), rate=8, **options).train()
    if parallel == "DDP":
        shared = nn.parallel.DistributedDataParallel(model)
    else:
        for block in model.cropr.spec.blocks:
            dist.fsdp.fully_shard(block, mesh=alone)
        shared = dist.fsdp.fully_shard(model, mesh=alone)
    optimizers = [torch.optim.SGD(trained.parameters(), lr=1e-3) for trained in (plain, model)]
    for step in range(2):  # the second asks for every gradient of the first
        for trained, optimizer in zip((plain, shared), optimizers):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss_of(trained(images)).backward()
            optimizer.step()
    for (name, expected), got in zip(plain.named_parameters(), model.parameters()):
        got = got.full_tensor() if hasattr(got, "full_tensor") else got
        torch.testing.assert_close(
            got, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


# Transforms and tracers


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("make", [reference_vit, timm_vit, vit, torchvision_vit])
def test_torch_func_gives_the_gradients_of_autograd(make, options, images):
    model = cropr.apply(randomize(make()), rate=8, **options).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(replaced):
        return loss_of(torch.func.functional_call(model, replaced, (images,)))

    grads = torch.func.grad(loss)(parameters)
    loss_of(model(images)).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("options", [{}, {"merge": True}], ids=str)
@torch.no_grad()
def test_torch_func_takes_images_one_by_one(options, images):
    model = cropr.apply(randomize(timm_vit()).eval(), rate=8, **options)
    for runner in (model, cropr.deploy(model)):
        apart = torch.func.vmap(lambda image, runner=runner: runner(image[None])[0])(images)
        torch.testing.assert_close(apart, runner(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_features_of_a_block_are_extracted(images):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    from torchvision.models.feature_extraction import create_feature_extractor

    model = cropr.apply(randomize(torchvision_vit()).eval(), rate=8, num_outputs=0)
    name = "encoder.layers.encoder_layer_"
    seen = []
    model.encoder.layers[3].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    extractor = create_feature_extractor(model, [f"{name}1", f"{name}2", "heads.head"])
    features = extractor(images)
    assert [tuple(value.shape) for value in features.values()] == [(2, 48, 64), (2, 40, 64), (2, 5)]
    assert torch.equal(features["heads.head"], model(images)) and torch.equal(
        features[f"{name}2"], seen[-1]
    )


# transformers


@HF_MODELS
@torch.no_grad()
@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"rate": 8},
        {"rate": 0, "merge": cropr.Merge(2.0)},
        {"keep": [50, 40], "llf": True, "num_queries": 3},
    ],
    ids=str,
)
def test_a_saved_model_comes_back_pruned(options, deployed, images, tmp_path):
    model = cropr.apply(vit().eval(), **options)
    model = cropr.deploy(model, engine=False) if deployed else model
    model.save_pretrained(tmp_path)
    other = cropr.from_pretrained(tmp_path)
    assert type(other) is type(model) and other.cropr.config == model.cropr.config
    assert torch.equal(other(images).logits, model(images).logits)
    cropr.set_rate(other, 5).save_pretrained(tmp_path)
    assert cropr.from_pretrained(tmp_path).cropr.config.schedule == cropr.Schedule(rate=5)
    cropr.remove(other).save_pretrained(tmp_path)
    assert "cropr" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match=r"nothing in .* was pruned when it was saved"):
        cropr.from_pretrained(tmp_path)


@HF_MODELS
def test_a_model_of_the_hub_is_loaded_from_its_snapshot(tmp_path, monkeypatch):
    transformers()
    cropr.apply(vit(), rate=3).save_pretrained(tmp_path)
    snapshots = {"someone/pruned-vit": str(tmp_path)}
    monkeypatch.setattr("transformers.utils.hub.snapshot_download", snapshots.__getitem__)
    assert cropr.from_pretrained("someone/pruned-vit").cropr.config.schedule == cropr.Schedule(
        rate=3
    )


@HF_MODELS
def test_pipelines_and_output_attentions_take_a_pruned_model(images):
    t = transformers()
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    model = cropr.apply(vit(attn_implementation="eager").eval(), rate=8, num_outputs=0)
    signature, model = inspect.signature(model.forward), cropr.deploy(model, cuda_graphs=1)
    assert inspect.signature(model.forward) == signature
    shapes = [
        tuple(attention.shape) for attention in model(images, output_attentions=True).attentions
    ]
    assert shapes == [(2, 2, count, count) for count in (65, 56, 48, 40)]
    processor = t.ViTImageProcessor(size={"height": 64, "width": 64})
    classify = t.pipeline("image-classification", model=model, image_processor=processor)
    assert len(classify(image.new("RGB", (90, 70)))) == 5


@HF_MODELS
def test_heads_that_need_the_full_map_get_it(images):
    t = transformers()
    for class_name, config, mask in (
        (
            "ViTForMaskedImageModeling",
            t.ViTConfig(**HF, encoder_stride=8),
            {"bool_masked_pos": torch.rand(2, 64) > 0.5},
        ),
        ("ViTMAEForPreTraining", t.ViTMAEConfig(**HF), {}),
    ):
        model = getattr(t, class_name)(config).eval()
        shape = model(images, **mask)[0].shape
        for options in ({}, {"llf": True}, {"merge": True}):
            cropr.apply(model, rate=2, num_outputs=0, **options)
            for runner in (model, cropr.deploy(model)):
                output = runner(images, **mask)[0]
                assert output.shape == shape and output.isfinite().all()
            cropr.remove(model)


# Wrappers and subclasses


@HF_MODELS
def test_wrappers_name_the_model_inside_or_are_pruned(images):
    compiled = torch.compile(timm_vit(), backend="eager")
    with pytest.raises(
        TypeError,
        match=r"OptimizedModule is a module around a model; .* at \._orig_mod, VisionTransf",
    ):
        cropr.apply(compiled, rate=8)
    t = transformers()
    settings = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "initializer_range": 0.02}
    config = t.TimmWrapperConfig.from_dict(settings)
    wrapper = t.TimmWrapperForImageClassification(config).eval()
    photo = torch.randn(1, 3, 224, 224)
    plain = wrapper(photo).logits
    assert torch.equal(cropr.apply(wrapper, rate=0)(photo).logits, plain)
    assert cropr.deploy(cropr.set_rate(wrapper, 8)).cropr.engine is not None
    cropr.remove(wrapper)
    cropr.apply(wrapper.timm_model, rate=8, num_outputs=0)
    assert wrapper(photo).logits.shape == wrapper.train()(photo).logits.shape


LORA = {
    "reference": (reference_vit, ["qkv", "attn.proj", "fc1"]),
    "timm": (timm_vit, ["qkv", "proj"]),
    "timm, Eva": (timm_eva, ["attn.proj", "fc2"]),
    "transformers": (vit, "all-linear"),
    # nn.MultiheadAttention reads its weights itself
    "torchvision": (torchvision_vit, ["mlp.0", "mlp.3"]),
}


@HF_MODELS
@pytest.mark.parametrize("family", LORA)
def test_adapters_of_peft_learn(family, images):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    make, names = LORA[family]
    adapted = peft.get_peft_model(randomize(make()), peft.LoraConfig(target_modules=names))
    with pytest.raises(
        TypeError,
        match=r"PeftModel is a module around a model; .* the one at \.base_model\.model, ",
    ):
        cropr.apply(adapted, rate=8)
    cropr.apply(adapted.base_model.model, rate=8, merge=True, num_outputs=0)
    outputs_of(adapted.train()(images)).square().sum().backward()
    adapters = [parameter for name, parameter in adapted.named_parameters() if "lora_B" in name]
    assert len(adapters) >= 8 and all(adapter.grad.abs().sum() > 0 for adapter in adapters)
    with torch.no_grad():
        before = outputs_of(adapted.eval()(images))
        for adapter in adapters:
            adapter -= 1e-3 * adapter.grad.sign()
        assert not torch.equal(outputs_of(adapted(images)), before)


def test_overridden_forwards_are_kept(images):
    timm = pytest.importorskip("timm", reason="timm is not installed")

    class Mine(timm.models.vision_transformer.VisionTransformer):
        def forward_features(self, *args, **kwargs):
            return 2 * super().forward_features(*args, **kwargs)

        def forward(self, images):
            return {"scores": super().forward(images)}

    model = Mine(
        img_size=64, patch_size=8, embed_dim=64, depth=4, num_heads=2, num_classes=5
    ).eval()
    plain = model(images)["scores"]
    cropr.apply(model, rate=0)
    assert torch.equal(model(images)["scores"], plain)
    output, aux = model.train()(images)
    assert list(output) == ["scores"] and len(aux) == 3
    inner = timm_vit().eval()
    forward, plain = inner.forward, inner(images)
    inner.forward = lambda images: 3 * forward(images)  # as accelerate's hooks replace it
    cropr.apply(inner, rate=0, num_outputs=0)
    assert torch.equal(inner(images), 3 * plain)
    assert not torch.allclose(cropr.set_rate(inner, 8)(images), 3 * plain)


def test_a_new_input_size_and_a_distillation_head_are_followed(images):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = cropr.apply(timm_vit(), rate=8)
    model.set_input_size((96, 64))
    assert cropr.pruning_map(model, torch.randn(1, 3, 96, 64)).shape == (1, 12, 8)
    distilled = timm.create_model(
        "deit_tiny_distilled_patch16_224", num_classes=5, depth=3, img_size=64
    )
    distilled.set_distilled_training(True)
    cropr.apply(distilled, rate=2).train()
    (class_logits, distilled_logits), aux = distilled(images)
    target = torch.tensor([0, 3])
    expected = (cross_entropy(class_logits, target) + cross_entropy(distilled_logits, target)) / 2
    expected = expected + sum(cross_entropy(prediction, target) for prediction in aux)
    torch.testing.assert_close(
        cropr.loss(cross_entropy, (class_logits, distilled_logits), aux, target), expected
    )


@HF_MODELS
@torch.no_grad()
def test_an_offloaded_model_gives_the_same_logits(images):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = vit().eval()
    expected = cropr.apply(vit().eval(), rate=8, num_outputs=0)
    expected.load_state_dict(model.state_dict(), strict=False)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    cropr.apply(model, rate=8, num_outputs=0)
    assert {parameter.device.type for parameter in model.cropr.parameters()} == {"cpu"}
    for expected_module, module in zip(expected.cropr, model.cropr):
        expected_module.queries.copy_(module.queries)
    assert torch.equal(model(images).logits, expected(images).logits)
