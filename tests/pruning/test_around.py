"""A pruned tower inside another model: whoever calls it, and whatever happens to it after apply."""

from dataclasses import fields

import pytest
import torch
from helpers.models import BLOCK_RUNNERS, HF, MODELS, TEXT, randomize, timm_vit, transformers
from torch import nn

import cropr_kernels as cropr
from cropr_kernels.models.adapters.structure import probe

IDS = torch.tensor([[1, 2, 3]])


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


def clip(**vision):
    t = transformers()
    return randomize(
        t.CLIPModel(t.CLIPConfig(vision_config={**HF, **vision}, text_config=TEXT))
    ).eval()


def siglip(**vision):
    t = transformers()
    return randomize(
        t.SiglipModel(t.SiglipConfig(vision_config={**HF, **vision}, text_config=TEXT))
    ).eval()


@pytest.mark.parametrize("make", [clip, siglip])
@torch.no_grad()
def test_hidden_states_that_a_part_is_configured_for_are_there(make, images):
    model = make(output_hidden_states=True)
    inputs = {"input_ids": IDS, "pixel_values": images}
    plain = model(**inputs).vision_model_output.hidden_states
    assert len(plain) == 5
    deployed = cropr.deploy(cropr.apply(model, rate=0, num_outputs=0))
    for states in (model(**inputs), deployed(**inputs)):
        got = states.vision_model_output.hidden_states
        assert len(got) == 5
        for state, expected in zip(got, plain):
            torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [clip, siglip])
@torch.no_grad()
def test_every_way_to_the_features_takes_the_engine(make, images, monkeypatch):
    model = cropr.apply(make(), rate=8, num_outputs=0)
    expected = model.get_image_features(images).pooler_output
    deployed = cropr.deploy(model)
    assert deployed.cropr.engine is not None
    runs = []
    run_engine = cropr.pruning.block_wrapper.run_engine
    monkeypatch.setattr(
        cropr.pruning.block_wrapper, "run_engine", lambda *args: runs.append(1) or run_engine(*args)
    )
    got = deployed.get_image_features(images).pooler_output
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert len(runs) == 1
    deployed(input_ids=IDS, pixel_values=images)
    assert len(runs) == 2
    assert deployed.cropr.context.options is None
    with pytest.raises((ValueError, RuntimeError), match="match"):
        deployed.get_image_features(images[:, :, :40])
    assert deployed.cropr.context.options is None  # closed by an error too


@torch.no_grad()
def test_a_head_that_averages_is_found_whatever_its_family(images):
    t = transformers()
    model = t.CLIPForImageClassification(
        t.CLIPConfig(vision_config=HF, text_config=TEXT, num_labels=5)
    )
    model = cropr.apply(randomize(model).eval(), rate=8, num_outputs=0)
    assert model.cropr.spec.pooling == "average" and not model.cropr.spec.class_token
    padding = torch.zeros(2, 8, 8, dtype=torch.bool)
    padding[:, 5:] = True
    other = torch.where(
        padding.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None], 9.0, images
    )
    for runner in (model, cropr.deploy(model)):
        outputs = [runner(batch, padding=padding).logits for batch in (images, other)]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("deployed", [False, True])
@torch.no_grad()
def test_a_head_that_changes_after_apply_is_followed(deployed, images):
    model = randomize(timm_vit(num_classes=7)).eval()
    cropr.apply(model, rate=8, merge=True, num_outputs=0)
    queries = [module.queries.clone() for module in model.cropr]
    model = cropr.deploy(model) if deployed else model
    model.reset_classifier(7, "avg")
    other = timm_vit(num_classes=7)
    other.load_state_dict(
        {name: value for name, value in model.state_dict().items() if not name.startswith("cropr")}
    )
    other.reset_classifier(7, "avg")
    other.head.load_state_dict(model.head.state_dict())
    cropr.apply(other.eval(), rate=8, merge=True, num_outputs=0)
    for module, query in zip(other.cropr, queries):
        module.queries.copy_(query)
    torch.testing.assert_close(model(images), other(images), rtol=1e-4, atol=1e-5)
    assert model.cropr.spec.pooling == "average"


def cut_by_timm(model):
    model.prune_intermediate_layers([2])


def cut_list(model):
    model.blocks = model.blocks[:3]


def replaced_block(model):
    model.blocks[1] = timm_vit(depth=1).blocks[0]


@pytest.mark.parametrize("change", [cut_by_timm, cut_list, replaced_block])
@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("options", [{"rate": 0}, {"rate": 4, "llf": True}], ids=str)
@torch.no_grad()
def test_blocks_that_change_after_apply_are_noticed_at_the_next_call(
    change, deployed, options, images
):
    model = cropr.apply(randomize(timm_vit(depth=6)).eval(), num_outputs=0, **options)
    model = cropr.deploy(model) if deployed else model
    assert model(images).isfinite().all()
    change(model)
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(
            RuntimeError, match=r"blocks of the model are not those of cropr.apply: .* cropr.remove"
        ):
            call(images)
    cropr.remove(model)
    assert cropr.apply(model, num_outputs=0, **options)(images).isfinite().all()


@torch.no_grad()
def test_a_list_of_layers_that_is_cut_is_noticed(images):
    model = cropr.apply(randomize(BLOCK_RUNNERS["ViT"]()).eval(), rate=4, num_outputs=0)
    model.vit.layers = model.vit.layers[:2]
    with pytest.raises(RuntimeError, match=r"blocks of the model are not those of cropr.apply"):
        model(images)


@torch.no_grad()
def test_a_model_of_ones_own_is_pruned_by_its_structure(images):
    class Tutorial(nn.Module):
        """The Vision Transformer of many a tutorial."""

        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 64, 8, 8)
            self.token = nn.Parameter(torch.randn(1, 1, 64))
            self.positions = nn.Parameter(torch.randn(1, 65, 64))
            layers = (
                nn.TransformerEncoderLayer(64, 2, 128, batch_first=True, norm_first=True)
                for _ in range(4)
            )
            self.layers = nn.ModuleList(layers)
            self.head = nn.Linear(64, 10)

        def forward(self, images):
            x = self.patches(images).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
            for layer in self.layers:
                x = layer(x)
            return self.head(x[:, 0])

    model = Tutorial().eval()
    plain = model(images)
    with pytest.raises(
        TypeError, match=r"Tutorial cannot be pruned: a forward of \(1, 3, 224, 224\) fails"
    ):
        cropr.apply(model, rate=8)
    spec = cropr.find_spec(model, images)
    assert (spec.num_prefix, spec.grid, spec.patch_size, spec.class_token) == (
        1,
        (8, 8),
        (8, 8),
        True,
    )
    assert torch.equal(cropr.apply(model, rate=0, spec=spec)(images), plain)
    pruned = cropr.calibrate(cropr.set_rate(model, 8), images)(images)
    assert pruned.shape == plain.shape and not torch.equal(pruned, plain)
    torch.testing.assert_close(cropr.deploy(model)(images), pruned, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_attention_that_is_written_out_weighs_tokens_too():
    model = cropr.apply(randomize(timm_vit()).eval(), rate=8, merge=True)
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*MODELS, "torchvision"])
@torch.no_grad()
def test_a_trial_forward_shows_what_the_attributes_of_known_families_say(name):
    model = randomize({**MODELS, **BLOCK_RUNNERS}[name]()).eval()
    named = cropr.find_spec(model)
    probed = probe(model, model, torch.zeros(1, 3, 64, 64))
    own = ("inner", "head", "engine", "engine_refusal")  # of one way or the other
    for field in fields(named):
        if field.name not in own:
            assert getattr(probed, field.name) == getattr(named, field.name), field.name


@pytest.mark.parametrize("name", ["vit_base_r50_s16_224", "vit_base_mci_224", "vitamin_small_224"])
def test_the_image_size_is_that_of_the_model_not_of_a_feature_map(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    with torch.device("meta"):
        model = cropr.apply(timm.create_model(name), rate=8, img_size=(224, 224), num_outputs=0)
    assert model.cropr.spec.img_size == (224, 224) and model.cropr.config.grid == (14, 14)
    assert model.cropr.spec.patch_size == (16, 16)


@torch.no_grad()
def test_a_model_without_values_is_specified_by_its_shapes():
    t = transformers()
    with torch.device("meta"):
        model = cropr.apply(t.CLIPVisionModel(t.CLIPVisionConfig(**HF)), rate=8, num_outputs=0)
        num_kept = model.cropr.config.counts(65, 4, 1)[-1]
        assert model(torch.empty(2, 3, 64, 64)).last_hidden_state.shape == (2, num_kept, 64)
    assert model.cropr.spec.num_prefix == 1 and model.cropr.spec.grid == (8, 8)


@torch.no_grad()
def test_a_keyword_that_blocks_do_not_name_passes(images):
    model = cropr.apply(randomize(BLOCK_RUNNERS["SigLIP"]()).eval(), rate=8, num_outputs=0)
    expected = model(images).last_hidden_state
    mask = torch.ones(2, 8, 8, dtype=torch.bool)  # ModernVBERT's, which nothing reads
    assert torch.equal(model(images, patch_attention_mask=mask).last_hidden_state, expected)


@torch.no_grad()
def test_a_depth_model_reads_full_maps_of_its_backbone(images):
    t = transformers()
    backbone = t.Dinov2Config(
        **HF, out_features=[f"stage{i}" for i in (1, 2, 3, 4)], reshape_hidden_states=False
    )
    sizes = dict(neck_hidden_sizes=[16] * 4, fusion_hidden_size=16, hidden_size=64, patch_size=8)
    config = t.DPTConfig(backbone_config=backbone, reassemble_factors=[4, 2, 1, 0.5], **sizes)
    model = t.DPTForDepthEstimation(config).eval()
    model.head.head[-1] = nn.Identity()  # a ReLU, which random weights may leave nothing
    plain = randomize(model)(images).predicted_depth
    cropr.apply(model, rate=0, num_outputs=0)
    assert model.cropr.spec.grid == (8, 8) and model.cropr.spec.map_layers == (0, 1, 2, 3)
    assert torch.equal(model(images).predicted_depth, plain)
    torch.testing.assert_close(
        cropr.deploy(model)(images).predicted_depth, plain, rtol=1e-4, atol=1e-4
    )
    pruned = cropr.set_rate(model, 8)(images).predicted_depth
    assert pruned.shape == plain.shape and not torch.equal(pruned, plain)
