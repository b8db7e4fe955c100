"""Small models of every architecture of transformers that takes images, videos or spectrograms,
random weights."""

import importlib
import importlib.util
from dataclasses import dataclass, field
from typing import Any

from torch import nn

WIDTH = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}
SMALL = {**WIDTH, "image_size": 64, "patch_size": 8}
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
}
_STAGES = ["stage1", "stage2", "stage3", "stage4"]


@dataclass(frozen=True)
class Tower:
    """A model class of transformers, and the options of its configuration beside `SMALL`."""

    architecture: str  # its module in transformers.models
    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    # Module, class, options of each
    nested: dict[str, tuple[str, str, dict[str, Any]]] = field(default_factory=dict)
    small: bool = True  # the configuration takes `SMALL`

    def make(self) -> nn.Module:
        """Make the model in eval mode."""
        options = {**(SMALL if self.small else {}), **self.options}
        for name, (module, config, values) in self.nested.items():
            options[name] = _class_of(module, "configuration", config)(**values)
        config = _class_of(self.architecture, "configuration", self.config)(**options)
        return _class_of(self.architecture, "modeling", self.model)(config).eval()


def _class_of(architecture: str, kind: str, name: str) -> Any:
    folder, _, module = architecture.partition("/")
    package = importlib.import_module(f"transformers.models.{folder}")
    names = (f"{kind}_{module or folder}", f"{kind}_{folder}", module)
    path = next(name for name in names if importlib.util.find_spec(f"{package.__name__}.{name}"))
    return getattr(importlib.import_module(f"{package.__name__}.{path}"), name)


def _vision(architecture: str, prefix: str, model: str = "VisionModel", **options: Any) -> Tower:
    """A tower whose classes are named by a prefix."""
    return Tower(architecture, prefix + model, prefix + "VisionConfig", options)


def _plain(architecture: str, prefix: str, model: str = "Model", **options: Any) -> Tower:
    """A model whose classes are named by a prefix."""
    return Tower(architecture, prefix + model, prefix + "Config", options)


_DINOV2 = {"backbone_config": ("dinov2", "Dinov2Config", {**SMALL, "out_features": _STAGES})}
_DENSE = {
    "backbone_config": (
        "dinov2",
        "Dinov2Config",
        {**SMALL, "out_features": _STAGES, "reshape_hidden_states": False},
    )
}
_HEAD = {"neck_hidden_sizes": [16] * 4, "fusion_hidden_size": 16}
# 9 x 9 patches: windows of 4 reach over the edge
_MAPS = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 72,
    "patch_size": 8,
    "window_size": 4,
}
_SAM = {**_MAPS, "output_channels": 16, "global_attn_indexes": [1, 3], "mlp_dim": 128}

TOWERS = (
    _plain("vit", "ViT", "ForImageClassification"),
    _plain("vit_mae", "ViTMAE", mask_ratio=0.0),
    _plain("dinov2", "Dinov2", "ForImageClassification"),
    _plain("dinov2_with_registers", "Dinov2WithRegisters"),
    _plain("dinov3_vit", "DINOv3ViT", num_register_tokens=3),
    _vision("siglip", "Siglip"),
    _vision("clip", "CLIP"),
    _plain("deit", "DeiT", "ForImageClassificationWithTeacher"),
    _plain("ijepa", "IJepa"),
    _plain("vit_msn", "ViTMSN", "ForImageClassification"),
    _vision("metaclip_2", "MetaClip2"),
    _vision("altclip", "AltCLIP"),
    _vision("chinese_clip", "ChineseCLIP"),
    _vision("clipseg", "CLIPSeg"),
    _vision("kosmos2", "Kosmos2"),
    _vision("owlvit", "OwlViT"),
    _vision("owlv2", "Owlv2"),
    _vision("idefics2", "Idefics2", "VisionTransformer"),
    _vision("idefics3", "Idefics3", "VisionTransformer"),
    _vision("smolvlm", "SmolVLM", "VisionTransformer"),
    _vision("tipsv2", "Tipsv2"),
    _plain("radio", "Radio"),
    _plain("pixio", "Pixio"),
    _plain("vivit", "Vivit", "ForVideoClassification", num_frames=4, tubelet_size=[2, 8, 8]),
    Tower(
        "audio_spectrogram_transformer",
        "ASTForAudioClassification",
        "ASTConfig",
        {"num_mel_bins": 32, "max_length": 64},
    ),
    _vision("siglip2", "Siglip2", num_patches=64),
    _vision("blip_2", "Blip2"),
    _vision("instructblip", "InstructBlip"),
    _vision("instructblipvideo", "InstructBlipVideo"),
    _vision("internvl", "InternVL"),
    _vision("qianfan_ocr", "QianfanOCR"),
    _vision("janus", "Janus"),
    _vision("aimv2", "Aimv2"),
    _vision("ovis2", "Ovis2"),
    _plain("videomae", "VideoMAE", "ForVideoClassification", num_frames=4),
    _plain("dpt", "DPT", "ForDepthEstimation", backbone_out_indices=[0, 1, 2, 3], **_HEAD),
    Tower(
        "depth_anything",
        "DepthAnythingForDepthEstimation",
        "DepthAnythingConfig",
        {"patch_size": 8, "reassemble_hidden_size": 64, **_HEAD},
        _DENSE,
        False,
    ),
    Tower(
        "upernet",
        "UperNetForSemanticSegmentation",
        "UperNetConfig",
        {"hidden_size": 16, "pool_scales": [1, 2], "auxiliary_in_channels": 64, "num_labels": 5},
        _DINOV2,
        False,
    ),
    Tower(
        "vitpose_backbone",
        "VitPoseBackbone",
        "VitPoseBackboneConfig",
        {"image_size": [64, 64], "patch_size": [8, 8]},
    ),
    _plain("beit", "Beit", "ForImageClassification", use_relative_position_bias=True),
    _plain("data2vec/data2vec_vision", "Data2VecVision", use_relative_position_bias=True),
    _vision("blip", "Blip"),
    _vision("git", "Git"),
    Tower("flava", "FlavaImageModel", "FlavaImageConfig"),
    Tower(
        "mgp_str",
        "MgpstrForSceneTextRecognition",
        "MgpstrConfig",
        {
            **WIDTH,
            "image_size": [32, 64],
            "patch_size": 8,
            "max_token_length": 5,
            "num_character_labels": 10,
            "num_bpe_labels": 10,
            "num_wordpiece_labels": 10,
        },
        {},
        False,
    ),
    _plain(
        "yolos",
        "Yolos",
        "ForObjectDetection",
        image_size=[64, 64],
        num_detection_tokens=5,
        use_mid_position_embeddings=False,  # as yolos-tiny
    ),
    _vision("mlcd", "MLCD", num_key_value_groups=1),
    Tower(
        "vjepa2",
        "VJEPA2Model",
        "VJEPA2Config",
        {
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "crop_size": 64,
            "patch_size": 8,
            "frames_per_clip": 4,
            "pred_hidden_size": 48,
            "pred_num_hidden_layers": 2,
            "pred_num_attention_heads": 2,
        },
        {},
        False,
    ),
    _vision(
        "llama4",
        "Llama4",
        intermediate_size=256,
        vision_output_dim=64,
        projector_input_dim=64,
        projector_output_dim=64,
    ),
    _plain("eomt", "Eomt", "ForUniversalSegmentation", num_blocks=1, num_queries=5, num_labels=3),
    Tower("sam", "SamVisionModel", "SamVisionConfig", _SAM, {}, False),
    Tower("sam_hq", "SamHQVisionModel", "SamHQVisionConfig", _SAM, {}, False),
    Tower("got_ocr2", "GotOcr2VisionEncoder", "GotOcr2VisionConfig", _SAM, {}, False),
    Tower(
        "deepseek_ocr2",
        "DeepseekOcr2SamVisionEncoder",
        "DeepseekOcr2SamVisionConfig",
        _SAM,
        {},
        False,
    ),
    Tower(
        "unlimited_ocr",
        "UnlimitedOcrSamVisionEncoder",
        "UnlimitedOcrSamVisionConfig",
        _SAM,
        {},
        False,
    ),
    Tower("slanext", "SLANeXtVisionEncoder", "SLANeXtVisionConfig", _SAM, {}, False),
    Tower(
        "pp_formulanet",
        "PPFormulaNetVisionModel",
        "PPFormulaNetVisionConfig",
        {**_SAM, "output_channels": 256},
        {},
        False,
    ),
    Tower(
        "sam3",
        "Sam3ViTModel",
        "Sam3ViTConfig",
        {
            **_MAPS,
            "global_attn_indexes": [1, 3],
            "intermediate_size": 128,
            "pretrain_image_size": 64,
        },
        {},
        False,
    ),
    Tower(
        "vitdet",
        "VitDetModel",
        "VitDetConfig",
        {
            **_MAPS,
            "window_block_indices": [0, 2],
            "use_relative_position_embeddings": True,
            "pretrain_image_size": 64,
        },
        {},
        False,
    ),
    _plain(
        "eomt_dinov3",
        "EomtDinov3",
        "ForUniversalSegmentation",
        num_blocks=1,
        num_queries=5,
        num_labels=3,
    ),
    _plain("videomt", "Videomt", "ForUniversalSegmentation", num_blocks=1, num_queries=5),
    _vision("step3p7", "Step3p7"),
    _plain(
        "sapiens2",
        "Sapiens2",
        num_first_full_attention_layers=1,
        num_last_full_attention_layers=1,
        num_key_value_attention_heads=1,
    ),
    _vision("phi4_multimodal", "Phi4Multimodal"),
    _vision("granite_docling", "GraniteDocling", deepstack_visual_indexes=[1], out_hidden_size=32),
    Tower("idefics/vision", "IdeficsVisionTransformer", "IdeficsVisionConfig"),
    Tower(
        "molmo2",
        "Molmo2VisionModel",
        "Molmo2VisionConfig",
        {
            **WIDTH,
            "head_dim": 32,
            "num_key_value_heads": 2,
            "image_size": [64, 64],
            "patch_size": 8,
        },
        {},
        False,
    ),
    _vision("gemma4", "Gemma4", head_dim=32, num_key_value_heads=2, pooling_kernel_size=2),
    _vision("pix2struct", "Pix2Struct", patch_embed_hidden_size=192, d_ff=64, d_kv=32, seq_len=64),
    _vision("kosmos2_5", "Kosmos2_5", patch_embed_hidden_size=192, head_dim=32),
    Tower(
        "bridgetower",
        "BridgeTowerVisionModel",
        "BridgeTowerVisionConfig",
        {"hidden_size": 64, "num_hidden_layers": 4, "image_size": 64, "patch_size": 8},
        {},
        False,
    ),
    _vision("x_clip", "XCLIP", num_frames=4, mit_num_hidden_layers=1),
    _vision(
        "videoprism",
        "VideoPrism",
        num_spatial_layers=4,
        num_temporal_layers=2,
        num_frames=4,
        tubelet_size=[1, 8, 8],
    ),
    Tower(
        "lw_detr",
        "LwDetrViTBackbone",
        "LwDetrViTConfig",
        {
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 64,
            "pretrain_image_size": 64,
            "patch_size": 8,
            "num_windows": 4,
            "window_block_indices": [0, 2],
        },
        {},
        False,
    ),
    Tower(
        "rf_detr",
        "RfDetrDinov2Backbone",
        "RfDetrDinov2Config",
        {
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "mlp_ratio": 2,
            "image_size": 64,
            "patch_size": 8,
            "num_windows": 2,
            "window_block_indexes": [0, 2],
        },
        {},
        False,
    ),
    _vision("pixtral", "Pixtral"),
    _plain("timesformer", "Timesformer", num_frames=2),
    Tower(
        "swin",
        "SwinModel",
        "SwinConfig",
        {
            "image_size": 64,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1, 2, 1],
            "num_heads": [1, 1, 2, 2],
            "window_size": 2,
        },
        {},
        False,
    ),
    Tower(
        "hiera",
        "HieraModel",
        "HieraConfig",
        {
            "image_size": [64, 64],
            "embed_dim": 16,
            "depths": [1, 1, 2, 1],
            "num_heads": [1, 1, 2, 2],
        },
        {},
        False,
    ),
    Tower(
        "groupvit",
        "GroupViTVisionModel",
        "GroupViTVisionConfig",
        {"depths": [2, 2], "num_group_tokens": [8, 0], "num_output_groups": [8, 8]},
    ),
)

# What is in the way of architectures that are not tried.
