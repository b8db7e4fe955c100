"""The same weights in every family's ViT: the same queries, logits and maps."""

import pytest
import torch
from helpers.models import BLOCK_RUNNERS, HF, SMALL, outputs_of, randomize, reference_vit, timm_vit

import cropr_kernels as cropr


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


def as_transformers(vit):
    """Return the Hugging Face ViT with the weights of the reference ViT."""
    model, tensors = BLOCK_RUNNERS["ViT"](), {}
    embeddings = "vit.embeddings."
    for key, value in vit.state_dict().items():
        if key.startswith("blocks."):
            _, layer, *rest = key.split(".")
            rest, suffix = ".".join(rest[:-1]), rest[-1]
            if rest == "attn.qkv":
                tensors |= {
                    (layer, part, suffix): v for part, v in zip(("q", "k", "v"), value.chunk(3))
                }
            else:
                tensors[layer, rest, suffix] = value
    names = {
        "q": ("attention.q_proj", "attention.attention.query"),  # in newer and in older versions
        "k": ("attention.k_proj", "attention.attention.key"),
        "v": ("attention.v_proj", "attention.attention.value"),
        "attn.proj": ("attention.o_proj", "attention.output.dense"),
        "norm1": ("layernorm_before",),
        "norm2": ("layernorm_after",),
        "mlp.fc1": ("mlp.fc1", "intermediate.dense"),
        "mlp.fc2": ("mlp.fc2", "output.dense"),
    }
    state = model.state_dict()
    with torch.no_grad():
        for (layer, part, suffix), value in tensors.items():
            ends = tuple(f".{layer}.{name}.{suffix}" for name in names[part])
            (key,) = [key for key in state if key.endswith(ends)]
            state[key].copy_(value)
        state[embeddings + "cls_token"].copy_(vit.cls_token)
        state[embeddings + "position_embeddings"].copy_(vit.pos_embed)
        for suffix in ("weight", "bias"):
            state[f"{embeddings}patch_embeddings.projection.{suffix}"].copy_(
                getattr(vit.patch_embed.proj, suffix)
            )
            state[f"vit.layernorm.{suffix}"].copy_(getattr(vit.norm, suffix))
            state[f"classifier.{suffix}"].copy_(getattr(vit.head, suffix))
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    return model


def as_torchvision(vit):
    """Return the torchvision ViT with the weights of the reference ViT."""
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    model = torchvision.models.VisionTransformer(64, 8, 4, 2, 64, 256, num_classes=5)
    names = {
        "pos_embed": "encoder.pos_embedding",
        "cls_token": "class_token",
        "patch_embed.proj": "conv_proj",
        "norm.": "encoder.ln.",
        "head.": "heads.head.",
        "blocks.": "encoder.layers.encoder_layer_",
        "attn.qkv.": "self_attention.in_proj_",
        "attn.proj": "self_attention.out_proj",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
    }
    state = {}
    for key, value in vit.state_dict().items():
        for old, new in names.items():
            key = key.replace(old, new) if not (old == "norm." and "blocks" in key) else key
        state[key] = value
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("convert", [as_transformers, as_torchvision])
@pytest.mark.parametrize("llf", [False, True])
def test_calibration_and_logits_are_those_of_the_reference_vit(convert, llf, images, monkeypatch):
    monkeypatch.setitem(HF, "intermediate_size", 256)
    vit = randomize(reference_vit(**{key: SMALL[key] for key in ("embed_dim", "depth")})).eval()
    other = convert(vit).eval()
    torch.testing.assert_close(outputs_of(other(images)), vit(images), rtol=1e-4, atol=1e-4)
    for model in (vit, other):
        cropr.calibrate(cropr.apply(model, rate=8, llf=llf), images)
    for reference_module, module in zip(vit.cropr, other.cropr):
        torch.testing.assert_close(reference_module.query(), module.query(), rtol=1e-3, atol=1e-3)
        module.queries.data.copy_(reference_module.queries.data)
    with torch.no_grad():
        torch.testing.assert_close(outputs_of(other(images)), vit(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cropr.pruning_map(other, images), cropr.pruning_map(vit, images))
    ours, theirs = (cropr.agreement(model, images, [4])[0] for model in (vit, other))
    assert ours.agreement == theirs.agreement and abs(ours.divergence - theirs.divergence) < 1e-4


@pytest.mark.parametrize("convert", [as_transformers, as_torchvision])
@pytest.mark.parametrize("llf", [False, True])
@torch.no_grad()
def test_merged_models_of_other_families_equal_the_merged_timm_model(
    convert, llf, images, monkeypatch
):
    monkeypatch.setitem(HF, "intermediate_size", 256)
    vit = randomize(reference_vit()).eval()
    timm = timm_vit().eval()
    timm.load_state_dict(vit.state_dict())
    models = [vit, timm, convert(vit).eval()]
    for model in models:
        cropr.apply(model, rate=8, merge=True, llf=llf, num_outputs=0)
        for module, first in zip(model.cropr, vit.cropr):
            module.queries.copy_(first.queries)
    for family in (models, [cropr.deploy(model) for model in models]):
        expected = outputs_of(family[0](images))
        for other in family[1:]:
            torch.testing.assert_close(outputs_of(other(images)), expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(cropr.merge_map(other, images), cropr.merge_map(family[0], images))
