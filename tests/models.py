"""Small models of every family, for the tests that run whole networks."""

import pytest
import torch

from cropr_kernels.models.vit import ViT, ViTConfig

SMALL = dict(img_size=64, patch_size=8, embed_dim=64, depth=4, num_heads=2, num_classes=5)


def reference_vit(**options):
    return ViT(ViTConfig(**{**SMALL, **options}))


def timm_vit(**options):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.models.vision_transformer.VisionTransformer(**{**SMALL, **options})


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
    "reference, rotary": lambda: reference_vit(rope=True, swiglu=True, qkv="joint_eva", global_pool="avg"),
    "timm ViT": timm_vit,
    "timm ViT, registers": lambda: timm_vit(reg_tokens=4, no_embed_class=True, init_values=0.1),
    "timm ViT, no class token": lambda: timm_vit(class_token=False, global_pool="avg"),
    "timm ViT, any size": lambda: timm_vit(dynamic_img_size=True, drop_path_rate=0.2),
    "timm EVA-02": timm_eva,
    "timm EVA-02, split, sub-norms": lambda: timm_eva(qkv_fused=False, scale_mlp=True, scale_attn_inner=True),
}


def randomise(model):
    """Nothing at its neutral value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
