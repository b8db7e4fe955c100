"""FLOPs of encoders with window attention: the arithmetic against what PyTorch counts."""

import pytest
import torch
from helpers.extras import require
from helpers.models import randomize, reference_vit

import cropr_kernels as cropr
from benchmarks.models.windows import ENCODERS, Blocks, count
from cropr_kernels.utils.flops import flop_counter

SMALL = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2)
ENCODER_OPTIONS = {  # windows that reach over the edge of the map
    "SAM, ViT-B": dict(
        size=96, patch_size=8, window_size=5, global_attn_indexes=[1, 3], mlp_dim=128, **SMALL
    ),
    "ViTDet, ViT-B": dict(size=96, patch_size=8, window=5, **SMALL),
    "SAM 2, Hiera-T": dict(
        size=128,
        hidden_size=16,
        blocks_per_stage=[1, 1, 4, 1],
        embed_dim_per_stage=[16, 32, 64, 128],
        num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[8, 4, 6, 3],
        global_attention_blocks=[4],
    ),
    "SAM 3, ViT-L+": dict(
        size=112,
        pretrain_image_size=112,
        window_size=3,
        global_attn_indexes=[3],
        intermediate_size=160,
        **SMALL,
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_the_arithmetic_is_what_pytorch_counts_in_unpruned_blocks(name):
    require("transformers")
    encoder = ENCODERS[name](**ENCODER_OPTIONS[name])
    total, in_blocks = count(encoder, torch.randn(1, 3, encoder.size, encoder.size))
    assert 0 < in_blocks < total


@pytest.mark.parametrize("rate", [1, 3])
@torch.no_grad()
def test_the_arithmetic_is_what_pytorch_counts_in_pruned_windows(rate):
    images = torch.randn(1, 3, 64, 64)
    model = reference_vit(global_pool="avg", class_token=False).eval()
    windows = cropr.Windows(4, (1, 3))
    totals = []
    for step in (0, rate):
        cropr.apply(model, rate=step, llf=cropr.Fusion(blocks=0), windows=windows, num_outputs=0)
        with flop_counter() as counter:
            model.forward_features(images)
        totals.append(counter.get_total_flops())
        cropr.remove(model)
    blocks = Blocks(8, 4, (True, False, True, False), 64, 256)
    assert totals[0] - totals[1] == blocks.flops(0) - blocks.flops(rate)


@pytest.mark.parametrize("name", [name for name in ENCODERS if "SAM 2" not in name])
@torch.no_grad()
def test_the_arithmetic_is_what_pytorch_counts_in_pruned_encoders(name):
    require("transformers")
    encoder = ENCODERS[name](**ENCODER_OPTIONS[name])
    model = randomize(encoder.model).eval()
    images = torch.randn(1, 3, encoder.size, encoder.size)
    totals = []
    for rate in (0, 2):
        cropr.apply(model, rate=rate)
        with flop_counter() as counter:
            model(images)
        totals.append(counter.get_total_flops())
        cropr.remove(model)
    assert totals[0] - totals[1] == encoder.blocks.flops(0) - encoder.blocks.flops(2)


def test_stages_that_pool_are_refused_in_a_sentence():
    require("transformers")
    model = randomize(ENCODERS["SAM 2, Hiera-T"](**ENCODER_OPTIONS["SAM 2, Hiera-T"]).model).eval()
    with pytest.raises(TypeError, match="4 blocks run apart from a list of 3, as in stages"):
        cropr.apply(model, rate=1)
