"""A pruned model behaves like the original in other programs, over all five families."""

import copy
import io
import pickle
import threading

import pytest
import torch
from helpers.models import (
    BLOCK_RUNNERS,
    MODELS,
    output_and_aux,
    outputs_of,
    randomize,
    reference_vit,
    timm_vit,
)
from torch import nn

import cropr_kernels as cropr
from cropr_kernels.models.adapters import find_spec

FAMILIES = {
    "reference": MODELS["reference, rotary"],
    "timm ViT": MODELS["timm ViT, registers"],
    "timm EVA-02": MODELS["timm EVA-02"],
    "transformers ViT": BLOCK_RUNNERS["ViT"],
    "transformers DINOv3": BLOCK_RUNNERS["DINOv3"],
    "torchvision": BLOCK_RUNNERS["torchvision"],
}
MERGED = {"merge": True}
WAYS = {
    "dropping": {},
    "LLF": {"llf": "track_parent"},
    "merging": MERGED,
    "merging, LLF": MERGED | {"llf": True},
}


@pytest.fixture(params=FAMILIES)
def model(request):
    return randomize(FAMILIES[request.param]()).eval()


@pytest.mark.each_choice
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_many_threads_get_the_serial_results(model, way):
    cropr.apply(model, rate=8, num_outputs=0, **WAYS[way])
    fast = cropr.deploy(model)
    batches = [torch.randn(1 + i % 3, 3, 64, 64) for i in range(6)]
    protect = [torch.rand(len(batch), 8, 8) > 0.8 for batch in batches]
    expected = [outputs_of(fast(batch, protect=mask)) for batch, mask in zip(batches, protect)]
    maps = [cropr.pruning_map(fast, batch, protect=mask) for batch, mask in zip(batches, protect)]
    wrong: list[str] = []

    @torch.no_grad()
    def work(seed):
        try:
            for turn in range(12):
                i = (seed + turn) % len(batches)
                if turn % 4 == 3:
                    same = torch.equal(
                        cropr.pruning_map(fast, batches[i], protect=protect[i]), maps[i]
                    )
                else:
                    same = torch.equal(
                        outputs_of(fast(batches[i], protect=protect[i])), expected[i]
                    )
                wrong.extend([] if same else [f"batch {i} differs"])
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.each_choice
@pytest.mark.parametrize("deployed", [False, True])
@torch.no_grad()
def test_models_survive_save_pickle_and_deepcopy(model, deployed):
    images = torch.randn(2, 3, 64, 64)
    cropr.apply(model, rate=8, merge=True, num_outputs=0)
    model = cropr.deploy(model) if deployed else model
    expected, file = outputs_of(model(images)), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
    ):
        assert torch.equal(outputs_of(other(images)), expected)
        cropr.set_rate(other, 0)
        assert torch.equal(outputs_of(model(images)), expected)  # nothing is shared
        for module in cropr.remove(other).modules():
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            assert not [hook for hook in hooks if "cropr" in str(hook)]


def test_classes_and_signatures_stay(model):
    before = [(type(module).__name__, type(module).__module__) for module in model.modules()]
    model_class, forward = type(model), type(model).forward
    cropr.apply(model, rate=8)
    after = [
        (type(module).__name__, type(module).__module__)
        for name, module in model.named_modules()
        if name.split(".")[0] != "cropr"
    ]
    assert after == before and type(model) is model_class and model.forward.__func__ is forward


@torch.no_grad()
def test_hooks_on_blocks_fire_and_the_engine_steps_aside(model):
    images = torch.randn(2, 3, 64, 64)
    fast = cropr.deploy(cropr.apply(model, rate=8, merge=True, num_outputs=0))
    expected, fired = outputs_of(fast(images)), []
    handles = [
        block.register_forward_hook(lambda module, args, output, i=i: fired.append(i))
        for i, block in enumerate(fast.cropr.spec.blocks)
    ]
    torch.testing.assert_close(outputs_of(fast(images)), expected, rtol=1e-3, atol=1e-4)
    assert fired == [0, 1, 2, 3]
    for handle in handles:
        handle.remove()
    assert torch.equal(outputs_of(fast(images)), expected)


class Adapted(nn.Module):
    """A linear layer with a low-rank update, as LoRA puts one around it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.each_choice
@pytest.mark.parametrize("way", WAYS)
def test_adapted_projections_are_called_and_learn(model, way):
    """At rate 0 the output is that of the unpruned model with the same layers; pruned, every layer
    gets a gradient."""
    images = torch.randn(2, 3, 64, 64)
    for block in find_spec(model).blocks:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                # timm's EvaAttention and nn.MultiheadAttention read these weights themselves,
                # pruned or not.
                read = name == "out_proj" or (
                    name == "qkv" and getattr(module, "q_bias", None) is not None
                )
                if type(child) is nn.Linear and not read:
                    setattr(module, name, Adapted(child))
    plain = outputs_of(model(images)).detach()
    cropr.apply(model, rate=0, num_outputs=0, **WAYS[way])
    assert torch.equal(outputs_of(model(images)), plain)
    cropr.set_rate(model, 8)
    outputs_of(model(images)).square().sum().backward()
    ups = [module.up.weight for module in model.modules() if isinstance(module, Adapted)]
    assert len(ups) >= 8 and all(
        weight.grad is not None and weight.grad.abs().sum() > 0 for weight in ups
    )
    with torch.no_grad():
        expected = outputs_of(model(images))
        torch.testing.assert_close(
            outputs_of(cropr.deploy(model)(images)), expected, rtol=1e-3, atol=1e-3
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["timm ViT", "transformers ViT", "transformers DINOv3", "torchvision"]
)
@torch.no_grad()
def test_quantized_linears_are_called(name):
    images, model = torch.randn(2, 3, 64, 64), randomize(FAMILIES[name]()).eval()
    plain = outputs_of(model(images))
    cropr.apply(model, rate=0, merge=True, num_outputs=0)
    fast = cropr.deploy(model)
    fast(images)  # packs its linear layers
    fast = torch.ao.quantization.quantize_dynamic(fast, {nn.Linear}, dtype=torch.qint8)
    quantized = [module for module in fast.modules() if "quantized" in type(module).__module__]
    assert len(quantized) >= 2 * len(fast.cropr.spec.blocks)
    torch.testing.assert_close(outputs_of(fast(images)), plain, rtol=0.2, atol=0.2)
    assert outputs_of(cropr.set_rate(fast, 8)(images)).isfinite().all()


def test_the_modules_follow_the_precision_of_the_blocks(model):
    model.bfloat16()
    cropr.apply(model, rate=8, num_outputs=5).train()
    _, aux = output_and_aux(model(torch.randn(2, 3, 64, 64).bfloat16()))
    sum(prediction.float().square().sum() for prediction in aux).backward()
    assert {parameter.dtype for parameter in model.cropr.parameters()} == {torch.bfloat16}
    assert all(parameter.grad is not None for parameter in model.cropr.parameters())


def test_without_auxiliary_outputs_the_queries_are_fixed():
    model = cropr.apply(reference_vit(), rate=8, num_outputs=0).train()
    model(torch.randn(2, 3, 64, 64))[0].sum().backward()
    assert all(
        parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad
    )


@torch.no_grad()
def test_hidden_states_have_all_tokens():
    images = torch.randn(2, 3, 64, 64)
    for name in ("ViT, features", "SigLIP", "CLIP"):
        model = cropr.apply(
            randomize(BLOCK_RUNNERS[name]()).eval(), rate=8, llf=True, num_outputs=0
        )
        for runner in (model, cropr.deploy(model)):
            states = runner(images, output_hidden_states=True).hidden_states
            assert len(states) == 5 and len({state.shape for state in states}) == 1, name
        assert torch.equal(states[-1], model(images, output_hidden_states=True).hidden_states[-1])


def test_a_mask_does_not_outlive_a_call_that_fails():
    model = cropr.apply(timm_vit(), rate=8, num_outputs=0).eval()
    images, protect = torch.randn(2, 3, 64, 64), torch.rand(2, 8, 8) > 0.5
    expected = model(images)
    with pytest.raises(AssertionError):
        model(torch.randn(2, 3, 40, 40), protect=protect)
    pooling = cropr.apply(
        timm_vit(class_token=False, global_pool="map"), rate=8, num_outputs=0
    ).eval()
    with pytest.raises(ValueError, match="padding needs a head"):
        pooling(images, padding=protect)
    assert pooling.cropr.context.options is None
    assert torch.equal(model(images), expected)
    tokens = model.forward_features(images)
    assert torch.equal(model.forward_head(tokens), expected)


def test_maps_have_the_grid_of_the_embedding():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm_vit(dynamic_img_size=True, dynamic_img_pad=True).eval()
    cropr.apply(model, rate=8)
    assert cropr.pruning_map(model, torch.randn(1, 3, 70, 90)).shape == (1, 9, 12)
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", num_classes=5).eval()
    cropr.apply(hybrid, rate=4)
    assert cropr.pruning_map(hybrid, torch.randn(1, 3, 224, 224)).shape == (1, 7, 7)


def test_vision_towers_of_larger_models_are_run_alone():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from helpers.models import HF, TEXT

    images = torch.randn(2, 3, 64, 64)
    for family in ("CLIP", "Siglip"):
        config = getattr(transformers, f"{family}Config")(vision_config=HF, text_config=TEXT)
        model = cropr.apply(getattr(transformers, f"{family}Model")(config).eval(), rate=8)
        assert cropr.pruning_map(model, images).shape == (2, 8, 8)
        cropr.calibrate(model, images)
        [row] = cropr.agreement(model, images, [8])
        assert 0 < row.agreement <= 1


@torch.no_grad()
def test_a_backbone_returns_maps_of_all_patches():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from helpers.models import HF

    images = torch.randn(2, 3, 64, 64)
    config = transformers.Dinov2Config(**HF, out_features=["stage1", "stage2", "stage4"])
    model = randomize(transformers.Dinov2Backbone(config)).eval()
    plain = model(images).feature_maps
    cropr.apply(model, rate=0, num_outputs=0)
    assert all(torch.equal(*pair) for pair in zip(model(images).feature_maps, plain, strict=True))
    cropr.set_rate(model, 8)
    for runner in (model, cropr.deploy(model)):
        maps = runner(images).feature_maps
        assert [block_map.shape for block_map in maps] == [block_map.shape for block_map in plain]
        assert torch.equal(maps[0], plain[0])  # nothing is pruned before it
        assert not torch.equal(maps[1], plain[1])


@pytest.mark.parametrize("name", ["timm ViT", "transformers ViT", "torchvision"])
def test_wrapped_models_are_rejected_with_the_path_to_the_model(name):
    around = nn.Module()
    around.wrapped = nn.Module()
    around.wrapped.model = FAMILIES[name]()
    class_name = type(around.wrapped.model).__name__
    with pytest.raises(
        TypeError,
        match=rf"a module around a model; give cropr.apply the one at .wrapped.model, {class_name}",
    ):
        cropr.apply(around, rate=8)


def test_no_map_is_drawn_of_shuffled_patches():
    model = cropr.apply(BLOCK_RUNNERS["ViT-MAE"]().eval(), rate=8, merge=True)
    for draw in (cropr.pruning_map, cropr.merge_map):
        with pytest.raises(
            ValueError, match="maps of this model are not supported: its patches do not stand"
        ):
            draw(model, torch.randn(1, 3, 64, 64))
