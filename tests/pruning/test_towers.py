"""Full maps of the last blocks: dense features, and vision towers whose hidden states are read."""

import copy
import io
import pickle

import pytest
import torch
from helpers.models import HF, TEXT, randomize, timm_eva, timm_model, timm_vit, transformers
from torch import nn
from torch.utils._pytree import tree_leaves

import cropr_kernels as cropr
from cropr_kernels.models.adapters import find_spec

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
DEPTH = 6
DEEP = {**HF, "num_hidden_layers": DEPTH}
TWO = cropr.Fusion("track_parent", blocks=2)


def hf(model, **options):
    t = transformers()
    return getattr(t, model)(getattr(t, model.replace("Model", "Config"))(**DEEP, **options))


FAMILIES = {
    "timm ViT": lambda: timm_vit(depth=DEPTH, reg_tokens=4, init_values=0.1),
    "timm ViT, no class token": lambda: timm_vit(depth=DEPTH, class_token=False, global_pool="avg"),
    "timm EVA-02": lambda: timm_eva(depth=DEPTH),
    "ViT": lambda: hf("ViTModel"),
    "DINOv2": lambda: hf("Dinov2Model"),
    "SigLIP": lambda: hf("SiglipVisionModel"),
    "CLIP": lambda: hf("CLIPVisionModel"),
}
TIMM = [name for name in FAMILIES if name.startswith("timm")]


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


def full_maps(model, images, count, norm=False):
    """Return the last maps, (B, prefix + patches, D) each."""
    if not hasattr(model, "forward_intermediates"):
        return model(images, output_hidden_states=True).hidden_states[-count:]
    options = {
        "intermediates_only": True,
        "return_prefix_tokens": model.num_prefix_tokens > 0,
        "norm": norm,
    }
    maps = model.forward_intermediates(images, count, output_fmt="NLC", **options)
    return [torch.cat(part[::-1], 1) if isinstance(part, tuple) else part for part in maps]


def last_block(model, images, x):
    """Return the output of the last block for tokens x, with its other arguments as for these
    images."""
    called, block = [], find_spec(model).blocks[-1]
    handle = block.register_forward_pre_hook(
        lambda block, args, kwargs: called.append((args, kwargs)), with_kwargs=True
    )
    model(images)
    handle.remove()
    (args, kwargs) = called[0]
    output = block(x, *args[1:], **kwargs)
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.each_choice
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_last_maps_are_full(name, deployed, merge, images):
    plain = randomize(FAMILIES[name]()).eval()
    expected = full_maps(plain, images, 2)
    model = cropr.apply(copy.deepcopy(plain), rate=0, llf=TWO, merge=merge, num_outputs=0)
    model = cropr.deploy(model) if deployed else model
    for got, expected_map in zip(full_maps(model, images, 2), expected):
        assert torch.equal(got, expected_map)
    cropr.set_rate(model, 8)
    before, last = full_maps(model, images, 2)
    assert before.shape == last.shape == expected[0].shape
    assert not torch.allclose(before, expected[0])
    if name in ("ViT", "DINOv2"):  # their last hidden state is after the norm
        before, last = (
            find_spec(plain).norm(before),
            find_spec(plain).norm(last_block(plain, images, before)),
        )
        torch.testing.assert_close(model(images).last_hidden_state, last, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(last, last_block(plain, images, before), rtol=1e-4, atol=1e-4)


@pytest.mark.each_choice
@pytest.mark.parametrize(
    "options", [{}, {"merge": True}, {"llf": "as_pruned"}, {"llf": TWO}], ids=str
)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_map_of_any_block_is_that_of_fusion_after_it(name, options, images):
    model = randomize(FAMILIES[name]()).eval()
    plain = full_maps(model, images, DEPTH)
    cropr.apply(model, rate=8, num_outputs=0, **options)
    pooled = model(images)
    maps = full_maps(model, images, DEPTH)
    assert len(maps) == DEPTH
    assert {block_map.shape for block_map in maps[:-1]} == {plain[0].shape}
    assert torch.equal(maps[-DEPTH], plain[-DEPTH])  # nothing is pruned before it
    assert_equal_outputs(model(images), pooled)  # maps are for one call
    for layer in range(1, DEPTH - 1):
        if "llf" in options and layer > DEPTH - 1 - model.cropr.config.full_blocks:
            break
        fusion = cropr.Fusion("track_parent", blocks=DEPTH - 1 - layer)
        fused = full_maps(cropr.set_llf(model, fusion), images, DEPTH)
        torch.testing.assert_close(maps[layer - DEPTH], fused[layer - DEPTH], rtol=1e-4, atol=1e-4)


def assert_equal_outputs(output, expected):
    for got, value in zip(tree_leaves(output), tree_leaves(expected), strict=True):
        assert torch.equal(got, value)


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_timm_asks_for_maps_in_every_way(name, images):
    model = cropr.apply(randomize(FAMILIES[name]()).eval(), rate=8, num_outputs=0)
    logits = model(images)
    for runner in (model, cropr.deploy(model)):
        last, maps = runner.forward_intermediates(images)
        assert [tuple(block_map.shape) for block_map in maps] == [(2, 64, 8, 8)] * DEPTH
        assert last.shape == (2, 64 + model.num_prefix_tokens, 64)
        for indices in (2, [1, 4], (-1, -5)):
            expected = (
                maps[-2:]
                if indices == 2
                else [maps[i] for i in sorted(index % DEPTH for index in indices)]
            )
            got = runner.forward_intermediates(images, indices, intermediates_only=True)
            assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
        early = runner.forward_intermediates(images, [2], stop_early=True, intermediates_only=True)
        assert torch.equal(early[0], maps[2])
        with pytest.raises(AssertionError, match="out of range"):
            runner.forward_intermediates(images, [9])
        if hasattr(runner, "get_intermediate_layers"):
            got = runner.get_intermediate_layers(images, 3, reshape=True)
            assert all(torch.equal(*pair) for pair in zip(got, maps[-3:], strict=True))
        torch.testing.assert_close(runner(images), logits, rtol=1e-4, atol=1e-4)
        assert runner.cropr.context.state is None and runner.cropr.context.options is None
    assert len(cropr.remove(model).forward_intermediates(images)[1]) == DEPTH


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_copies_give_their_own_maps(name, deployed, images):
    model = cropr.apply(randomize(FAMILIES[name]()).eval(), rate=8, llf=TWO, num_outputs=0)
    model = cropr.deploy(model) if deployed else model
    expected, file = full_maps(model, images, 3), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
    ):
        assert all(torch.equal(*pair) for pair in zip(full_maps(other, images, 3), expected))
        for parameter in other.cropr.spec.blocks[0].parameters():
            parameter.data.zero_()
        assert not torch.allclose(full_maps(other, images, 3)[0], expected[0])
        # Nothing is shared
        assert all(torch.equal(*pair) for pair in zip(full_maps(model, images, 3), expected))


@pytest.mark.parametrize("name", ["timm ViT", pytest.param("timm EVA-02", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiled_models_give_the_same_maps(name, images):
    model = cropr.deploy(
        cropr.apply(randomize(FAMILIES[name]()).eval(), rate=8, llf=TWO, num_outputs=0)
    )
    torch._dynamo.reset()
    for call in (model, lambda images: full_maps(model, images, 3)):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), call(images), rtol=1e-4, atol=1e-4)


class OfMaps(nn.Module):
    """Mixin of a model whose forward reads the maps of two blocks."""

    def forward(self, images):
        return torch.cat(
            [part.mean((2, 3)) for part in self.forward_intermediates(images, 2)[1]], 1
        )


@torch.no_grad()
def test_feature_wrappers_and_models_that_read_their_maps_agree(images):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    vit_class = timm.models.vision_transformer.VisionTransformer
    options = dict(img_size=64, patch_size=8, embed_dim=64, depth=DEPTH, num_heads=2, num_classes=5)
    plain = randomize(vit_class(**options)).eval()
    subclassed = type("Own", (OfMaps, vit_class), {})(**options).eval()
    subclassed.load_state_dict(plain.state_dict())
    expected = subclassed(images)
    cropr.apply(subclassed, rate=0, llf=TWO, num_outputs=0)
    assert torch.equal(subclassed(images), expected)
    cropr.set_rate(subclassed, 8)
    expected = subclassed(images)
    torch.testing.assert_close(cropr.deploy(subclassed)(images), expected)
    assert subclassed.cropr.context.options is None
    wrapper = timm.create_model(
        "vit_tiny_patch16_224", features_only=True, out_indices=(4, 5), **options
    ).eval()
    wrapper.model.load_state_dict(plain.state_dict(), strict=False)
    with pytest.raises(
        TypeError, match=r"FeatureGetterNet is a module around a model; .* at \.model, VisionTransf"
    ):
        cropr.apply(wrapper, rate=8)
    cropr.apply(wrapper.model, rate=8, llf=TWO, num_outputs=0)
    for mine, other in zip(wrapper.model.cropr, subclassed.cropr):
        mine.queries.copy_(other.queries)
    torch.testing.assert_close(
        torch.cat([part.mean((2, 3)) for part in wrapper(images)], 1), expected
    )


@torch.no_grad()
def test_the_timm_wrapper_of_transformers_gives_hidden_states():
    t, photo = transformers(), torch.randn(1, 3, 224, 224)
    settings = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "initializer_range": 0.02}
    model = t.TimmWrapperForImageClassification(t.TimmWrapperConfig.from_dict(settings)).eval()
    cropr.apply(model.timm_model, rate=8, llf=TWO, num_outputs=0)
    output = model(photo, output_hidden_states=[9, -1])
    assert [tuple(state.shape) for state in output.hidden_states] == [(1, 192, 14, 14)] * 2
    torch.testing.assert_close(output.logits, model(photo).logits)
    assert len(model(photo, output_hidden_states=True).hidden_states) == 12


def backbone(prefix, **options):
    t = transformers()
    config = getattr(t, f"{prefix}Config")(**{**HF, **options}, out_indices=[2, 4])
    return getattr(t, f"{prefix.removesuffix('Backbone')}Backbone")(config)


READERS = {  # model, and the maps of two blocks
    "DINOv2": (lambda: backbone("Dinov2"), lambda model, images: model(images).feature_maps),
    "DINOv3": (lambda: backbone("DINOv3ViT"), lambda model, images: model(images).feature_maps),
    "BEiT": (
        lambda: backbone("Beit", use_relative_position_bias=True),
        lambda model, images: model(images).feature_maps,
    ),
    "ViTPose": (
        lambda: backbone("VitPoseBackbone", image_size=[64, 64], patch_size=[8, 8]),
        lambda model, images: model(images).feature_maps,
    ),
    "timm BEiT": (
        lambda: timm_model("beit_base_patch16_224"),
        lambda model, images: model.forward_intermediates(images, [1, 3])[1],
    ),
    "timm DeiT, distilled": (
        lambda: timm_model("deit_tiny_distilled_patch16_224"),
        lambda model, images: model.get_intermediate_layers(images, [1, 3], reshape=True),
    ),
}


@pytest.mark.parametrize("name", READERS)
@torch.no_grad()
def test_backbones_give_full_maps_of_the_blocks_that_are_read(name, images):
    make, read = READERS[name]
    model = randomize(make()).eval()
    plain = read(model, images)
    cropr.apply(model, rate=0, num_outputs=0)
    for got, expected in zip(read(model, images), plain, strict=True):
        assert torch.equal(got, expected)
    for merge in (False, True):
        cropr.apply(cropr.remove(model), rate=8, merge=merge, num_outputs=0)
        maps = read(model, images)
        for got, expected in zip(maps, plain, strict=True):
            assert got.shape == expected.shape and not torch.allclose(got, expected)
        for got, expected in zip(read(cropr.deploy(model), images), maps, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_window_attention_has_the_last_map_only():
    model = timm_vit(depth=DEPTH, dynamic_img_size=True).eval()
    cropr.apply(model, rate=1, llf=True, windows=cropr.Windows(4, (2, 5)), num_outputs=0)
    with pytest.raises(ValueError, match=r"no maps but the last: model.forward_features\(images\)"):
        model.forward_intermediates(torch.randn(1, 3, 64, 64), 1)


# Vision-language models


def llava(vision="CLIPVisionConfig", **options):
    t = transformers()
    text = t.LlamaConfig(**{**TEXT, "num_key_value_heads": 2, "pad_token_id": None})
    config = t.LlavaConfig(
        vision_config=getattr(t, vision)(**DEEP), text_config=text, image_token_index=5, **options
    )
    return t.LlavaForConditionalGeneration(config), 64


def llava_next():
    t = transformers()
    text = t.LlamaConfig(**{**TEXT, "num_key_value_heads": 2, "pad_token_id": None})
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**DEEP),
        text_config=text,
        image_token_index=5,
        image_grid_pinpoints=[[64, 64]],
    )
    # The full image, one tile, and ends of its rows
    return t.LlavaNextForConditionalGeneration(config), 64 + 64 + 8


def paligemma():
    t = transformers()
    text = t.GemmaConfig(**{**TEXT, "num_key_value_heads": 1, "head_dim": 32, "pad_token_id": 0})
    vision = t.SiglipVisionConfig(**DEEP, vision_use_head=False)
    config = t.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=5, projection_dim=64
    )
    return t.PaliGemmaForConditionalGeneration(config), 64


AROUND = {
    "LLaVA": (llava, {"llf": TWO}),  # vision_feature_layer=-2
    "LLaVA, merging": (llava, {"llf": TWO, "merge": True}),
    "LLaVA, SigLIP": (
        lambda: llava("SiglipVisionConfig", vision_feature_select_strategy="full"),
        {"llf": TWO},
    ),
    "LLaVA, layers": (
        lambda: llava(vision_feature_layer=[-3, -1]),
        {"llf": cropr.Fusion("track_parent", blocks=3)},
    ),
    "LLaVA, last layer": (lambda: llava(vision_feature_layer=-1), {"llf": True}),
    "LLaVA-NeXT": (llava_next, {"llf": TWO, "merge": True}),
    "PaliGemma": (paligemma, {"llf": "track_parent"}),  # the last hidden state
    "PaliGemma, merging": (paligemma, {"llf": "track_parent", "merge": True}),
}


def asked_of(name, num_tokens):
    """Return a batch of two questions about an image each."""
    ids = torch.tensor([[1, *[5] * num_tokens, 2, 3]] * 2)
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "LLaVA-NeXT":
        return asked | {
            "pixel_values": torch.randn(2, 2, 3, 64, 64),
            "image_sizes": torch.tensor([[64, 64]] * 2),
        }
    return asked | {"pixel_values": torch.randn(2, 3, 64, 64)}


@pytest.mark.each_choice
@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("name", AROUND)
@torch.no_grad()
def test_a_vision_language_model_runs_on_a_pruned_tower(name, deployed, tmp_path):
    make, options = AROUND[name]
    model, num_tokens = make()
    asked = asked_of(name, num_tokens)
    randomize(model).eval()
    plain, words = model(**asked).logits, model.generate(**asked, max_new_tokens=4, do_sample=False)
    assert words.shape[1] == num_tokens + 7

    tower = cropr.apply(model.model.vision_tower, rate=0, num_outputs=0, **options)
    cropr.calibrate(tower, torch.randn(4, 3, 64, 64))
    if deployed:
        tower = model.model.vision_tower = cropr.deploy(tower)
        assert tower.cropr.engine is not None
    torch.testing.assert_close(model(**asked).logits, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(**asked, max_new_tokens=4, do_sample=False), words)

    distances = []
    for rate in (1, 8):
        cropr.set_rate(tower, rate)
        pruned = model(**asked).logits
        assert pruned.shape == plain.shape
        distances.append(float((pruned - plain).norm() / plain.norm()))
    assert 0 < distances[0] < 0.2 and distances[0] < distances[1]
    assert model.generate(**asked, max_new_tokens=4, do_sample=False).shape == words.shape

    model.config.vision_config = tower.config  # of a deployed tower a copy
    model.save_pretrained(tmp_path)
    other = cropr.from_pretrained(tmp_path)
    assert other.model.vision_tower.cropr.config == tower.cropr.config
    if deployed:
        other.model.vision_tower = cropr.deploy(other.model.vision_tower)
    torch.testing.assert_close(other(**asked).logits, pruned, rtol=1e-4, atol=1e-4)
    if not deployed:
        with torch.enable_grad():
            assert model.train()(**asked, labels=asked["input_ids"]).loss.requires_grad


@torch.no_grad()
def test_a_tower_with_missing_tokens_raises():
    model, num_tokens = paligemma()  # reads the last hidden state
    asked = asked_of("PaliGemma", num_tokens)
    cropr.apply(model.eval().model.vision_tower, rate=8, num_outputs=0)
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**asked)


@pytest.mark.parametrize("name", ["LLaVA", "LLaVA-NeXT", "PaliGemma, merging"])
@torch.no_grad()
def test_a_vision_language_model_may_be_given_whole(name):
    make, options = AROUND[name]
    model, num_tokens = make()
    asked = asked_of(name, num_tokens)
    plain = randomize(model).eval()(**asked).logits
    cropr.apply(model, rate=0, num_outputs=0, **options)
    assert torch.equal(model(**asked).logits, plain)
    torch.testing.assert_close(cropr.deploy(model)(**asked).logits, plain, rtol=1e-4, atol=1e-4)
    cropr.set_rate(model, 8)
    pruned = model(**asked).logits
    assert pruned.shape == plain.shape and not torch.allclose(pruned, plain)
    torch.testing.assert_close(cropr.deploy(model)(**asked).logits, pruned, rtol=1e-4, atol=1e-4)
