"""Blocks over maps (B, height, width, D) with windows: SAM, ViTDet, timm's samvit."""

import pytest
import torch
from helpers.extras import require
from helpers.models import randomize
from torch.utils._pytree import tree_leaves

import cropr_kernels as cropr
from benchmarks.models.supported import check

SIZE = 72  # 9 x 9 patches of 8 pixels: windows of 4 reach over the edge
OPTIONS = dict(
    hidden_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=SIZE, patch_size=8
)


def sam(attention="sdpa", **options):
    require("transformers")
    import transformers

    config = transformers.SamVisionConfig(
        **OPTIONS, output_channels=16, window_size=4, global_attn_indexes=[1, 3], mlp_dim=128
    )
    config.update(options)
    config._attn_implementation = attention
    return transformers.SamVisionModel(config)


def vitdet(name="VitDetModel", **options):
    require("transformers")
    import transformers

    config = transformers.VitDetConfig(
        **OPTIONS,
        window_size=4,
        window_block_indices=[0, 2],
        use_relative_position_embeddings=True,
        pretrain_image_size=64,
        **options,
    )
    return getattr(transformers, name)(config)


def samvit(**options):
    require("timm")
    import timm

    plain = dict(
        img_size=SIZE, patch_size=8, depth=4, embed_dim=64, num_heads=2, window_size=4,
        global_attn_indexes=(1, 3), neck_chans=16,
    )  # fmt: skip
    return timm.create_model("samvit_base_patch16", **{**plain, **options})


MODELS = {
    "SAM": sam,
    "SAM, attention written out": lambda: sam("eager"),
    "SAM, full windows": lambda: sam(window_size=3),
    "ViTDet": vitdet,
    "ViTDet, maps of two blocks": lambda: vitdet(
        "VitDetBackbone", out_features=["stage2", "stage4"]
    ),
    "samvit": samvit,
    "samvit, rotary": lambda: samvit(use_rel_pos=False, use_rope=True),
    "samvit, LayerScale": lambda: samvit(qk_norm=True, init_values=0.1),
    "samvit, no windows": lambda: samvit(global_attn_indexes=(0, 1, 2, 3)),
}


def build(name):
    torch.manual_seed(0)
    model = randomize(MODELS[name]()).eval()
    return (
        model,
        cropr.find_spec(model, torch.zeros(1, 3, SIZE, SIZE)),
        torch.randn(2, 3, SIZE, SIZE),
    )


def outputs(model, images):
    return [leaf for leaf in tree_leaves(model(images)) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", MODELS)
def test_rate_0_is_the_unpruned_model_and_dropping_is_masking_in_its_windows(name):
    model, spec, _ = build(name)
    verdict = check(model, spec)
    assert verdict.supported, verdict.reason
    assert (verdict.masking, verdict.merges, verdict.calibrates) == ("yes", "yes", "yes")


@torch.no_grad()
def test_every_window_keeps_as_many_and_those_at_the_edge_lose_none_until_the_others_hold_as_few():
    model, spec, images = build("SAM")
    cropr.apply(model, keep=[12, 7, 2], spec=spec)
    left = cropr.pruning_map(model, images)
    for rows in (slice(0, 4), slice(4, 8)):
        for columns in (slice(0, 4), slice(4, 8)):
            for window in left[:, rows, columns].flatten(1):
                assert window.bincount(minlength=5).tolist() == [0, 4, 5, 5, 2]
    edge = left[:, 8, :4]
    assert [row.bincount(minlength=5).tolist() for row in edge] == [[0, 0, 0, 2, 2]] * 2
    assert left[:, 8, 8].tolist() == [4, 4]
