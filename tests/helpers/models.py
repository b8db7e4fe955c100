"""Small models of every family, for the tests that run full networks."""

import pytest
import torch

from cropr_kernels.models.vit import ViT, ViTConfig

SMALL = dict(img_size=64, patch_size=8, embed_dim=64, depth=4, num_heads=2, num_classes=5)


def reference_vit(**options):
    return ViT(ViTConfig(**{**SMALL, **options}))


def timm_vit(**options):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.models.vision_transformer.VisionTransformer(**{**SMALL, **options})


def timm_model(name):
    """Return a model of timm's registry, small."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    if not timm.is_model(name):
        pytest.skip(f"not in timm {timm.__version__}: {name}")
    return timm.create_model(name, **SMALL)


def timm_eva(**options):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    eva = dict(use_rot_pos_emb=True, swiglu_mlp=True, mlp_ratio=2.0, ref_feat_shape=(4, 4))
    try:
        return timm.models.eva.Eva(**{**SMALL, **eva, **options})
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        pytest.skip(f"not in timm {timm.__version__}: {error}")


MODELS = {
    "reference": reference_vit,
    "reference, registers": lambda: reference_vit(reg_tokens=3, no_embed_class=True),
    "reference, rotary": lambda: reference_vit(
        rope=True, swiglu=True, qkv="joint_eva", global_pool="avg"
    ),
    "timm ViT": timm_vit,
    "timm ViT, registers": lambda: timm_vit(reg_tokens=4, no_embed_class=True, init_values=0.1),
    "timm ViT, no class token": lambda: timm_vit(class_token=False, global_pool="avg"),
    "timm ViT, any size": lambda: timm_vit(dynamic_img_size=True, drop_path_rate=0.2),
    "timm EVA-02": timm_eva,
    "timm EVA-02, split, sub-norms": lambda: timm_eva(
        qkv_fused=False, scale_mlp=True, scale_attn_inner=True
    ),
}


# Hugging Face and torchvision models, which run their blocks themselves.

HF = dict(
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=128,
    image_size=64,
    patch_size=8,
)
TEXT = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    vocab_size=50,
    bos_token_id=0,
)


def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


def siglip_classifier():
    t = transformers()
    return t.SiglipForImageClassification(
        t.SiglipConfig(vision_config=HF, text_config=TEXT, num_labels=5)
    )


def clip_classifier():
    t = transformers()
    return t.CLIPForImageClassification(
        t.CLIPConfig(vision_config=HF, text_config=TEXT, num_labels=5)
    )


def torchvision_vit():
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    return torchvision.models.VisionTransformer(64, 8, 4, 2, 64, 128, num_classes=5)


def hf(model, config, **options):
    t = transformers()
    return getattr(t, model)(getattr(t, config)(**HF, **options))


BLOCK_RUNNERS = {
    "ViT": lambda: hf("ViTForImageClassification", "ViTConfig", num_labels=5),
    "ViT, features": lambda: hf("ViTModel", "ViTConfig"),
    "ViT-MAE": lambda: hf("ViTMAEModel", "ViTMAEConfig", mask_ratio=0.0),
    "DINOv2": lambda: hf(
        "Dinov2ForImageClassification", "Dinov2Config", num_labels=5, drop_path_rate=0.1
    ),
    "DINOv2 with registers": lambda: hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
    "DINOv3": lambda: hf("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=3),
    "SigLIP": lambda: hf("SiglipVisionModel", "SiglipVisionConfig"),
    "SigLIP, classifier": siglip_classifier,
    "CLIP": lambda: hf("CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=16),
    "CLIP, classifier": clip_classifier,
    "DeiT": lambda: hf("DeiTForImageClassification", "DeiTConfig", num_labels=5),
    "RADIO": lambda: hf("RadioModel", "RadioConfig"),  # a linear embedding
    "AIMv2": lambda: hf("Aimv2VisionModel", "Aimv2VisionConfig", use_head=False),  # RMSNorm
    "BEiT": lambda: hf(
        "BeitForImageClassification", "BeitConfig", num_labels=5, use_relative_position_bias=True
    ),
    "torchvision": torchvision_vit,
}
PREFIX = {
    "DINOv2 with registers": 5,
    "DINOv3": 4,
    "SigLIP": 0,
    "SigLIP, classifier": 0,
    "DeiT": 2,
    "RADIO": 10,
    "AIMv2": 0,
}
CLASSIFIERS = (
    "ViT",
    "DINOv2",
    "SigLIP, classifier",
    "torchvision",
    "CLIP, classifier",
    "DeiT",
    "BEiT",
)


def randomize(model):
    """Add noise to every parameter, so that none is at its neutral value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def embed(model, images):
    """Return the tokens that enter the first block (timm or reference ViT) and the rotary table or
    None."""
    if isinstance(model, ViT):
        return model.embed(images)
    embedded = model._pos_embed(model.patch_embed(images))
    x, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
    return model.norm_pre(x), rope


def output_and_aux(output):
    """Return the output of a model in training, and its auxiliary predictions, if it has any."""
    return output if isinstance(output, tuple) else (output, getattr(output, "aux", []))


def outputs_of(output):
    """Return the output for a full image: logits, embeddings or pooled features."""
    if isinstance(output, torch.Tensor):
        return output
    names = ("logits", "image_embeds", "pooler_output")
    return next(output[name] for name in names if output.get(name) is not None)
