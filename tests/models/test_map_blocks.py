"""Blocks over maps (B, height, width, D) with windows: SAM, ViTDet, timm's samvit."""

import pytest
import torch
from helpers.extras import require
from helpers.models import randomize

import cropr_kernels as cropr
from benchmarks.models.supported import MaskedMaps, check
from cropr_kernels.calibration import ranks
from cropr_kernels.pruning.maps import token_maps
from cropr_kernels.pruning.model import run
from cropr_kernels.pruning.observing import observe_blocks, windows_of
from cropr_kernels.pruning.state import PruningOptions

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


# Others are in the table of supported models
MODELS = {
    "SAM, attention written out": lambda: sam("eager"),
    "SAM, full windows": lambda: sam(window_size=3),
    "ViTDet, maps of two blocks": lambda: vitdet(
        "VitDetBackbone", out_features=["stage2", "stage4"]
    ),
    "samvit, rotary": lambda: samvit(use_rel_pos=False, use_rope=True),
    "samvit, LayerScale": lambda: samvit(qk_norm=True, init_values=0.1),
    "samvit, no windows": lambda: samvit(global_attn_indexes=(0, 1, 2, 3)),
}


def build(make=sam, size=SIZE):
    torch.manual_seed(0)
    model = randomize(make()).eval()
    return (
        model,
        cropr.find_spec(model, torch.zeros(1, 3, size, size)),
        torch.randn(2, 3, SIZE, SIZE),
    )


def output_of(model, images):
    output = model(images)
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


@pytest.mark.parametrize("name", MODELS)
def test_rate_0_is_the_unpruned_model_and_dropping_is_masking_in_its_windows(name):
    model, spec, _ = build(MODELS[name])
    assert_supported(model, spec)


def test_images_of_other_sizes_have_other_windows_at_the_edge():
    model, spec, _ = build(samvit, size=88)
    assert spec.grid == (11, 11)
    assert_supported(model, spec)


def assert_supported(model, spec):
    verdict = check(model, spec)
    assert verdict.supported, verdict.reason
    assert (verdict.masking, verdict.merges, verdict.calibrates) == ("yes", "yes", "yes")


def slowly(spec, images, keep, queries):
    """Return the map (B, N, D) after the last block: blocks see dropped tokens no more, and these
    come back with the change of the kept token of their window that they were most like."""
    tower = spec.tower.vision_encoder
    x = tower.patch_embed(images) + tower.pos_embed
    cells = torch.arange(81).view(9, 9)
    windows = [cells[y : y + 4, x : x + 4].flatten() for y in (0, 4, 8) for x in (0, 4, 8)]
    active = torch.ones(len(x), 81, dtype=torch.bool)
    dropped = []
    for layer, block in enumerate(spec.blocks):
        hidden = torch.zeros(len(x), 9, 9).masked_fill(~active.view(-1, 9, 9), -torch.inf)
        with MaskedMaps(hidden, block.window_size, []):
            x = block(x)
        if layer == len(keep):
            break
        for image, tokens in enumerate(x.flatten(1, 2)):
            for window in windows:
                left = window[active[image, window]]
                order = left[(tokens[left] @ queries[layer]).argsort(descending=True)]
                kept = order[: keep[layer]]
                for patch in order[keep[layer] :]:
                    parent = kept[torch.cosine_similarity(tokens[kept], tokens[patch], -1).argmax()]
                    dropped.append((image, patch, parent, tokens[patch] - tokens[parent]))
                    active[image, patch] = False
    x = x.flatten(1, 2)
    for image, patch, parent, offset in reversed(dropped):
        x[image, patch] = x[image, parent] + offset
    return x


@torch.no_grad()
def test_maps_equal_a_slow_implementation():
    model, spec, images = build()
    cropr.apply(model, keep=[12, 7, 2], spec=spec)
    queries = [module.query() for module in model.cropr]
    maps = []
    handle = model.vision_encoder.neck.register_forward_pre_hook(
        lambda neck, args: maps.append(args[0].flatten(1, 2))
    )
    model(images)
    handle.remove()
    expected = slowly(cropr.remove(model) and spec, images, [12, 7, 2], queries)
    torch.testing.assert_close(maps[0], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_every_window_keeps_as_many_and_those_at_the_edge_lose_none_until_the_others_hold_as_few():
    model, spec, images = build()
    cropr.apply(model, keep=[12, 7, 2], spec=spec)
    left = cropr.pruning_map(model, images)
    for rows in (slice(0, 4), slice(4, 8)):
        for columns in (slice(0, 4), slice(4, 8)):
            for window in left[:, rows, columns].flatten(1):
                assert window.bincount(minlength=5).tolist() == [0, 4, 5, 5, 2]
    edge = left[:, 8, :4]
    assert [row.bincount(minlength=5).tolist() for row in edge] == [[0, 0, 0, 2, 2]] * 2
    assert left[:, 8, 8].tolist() == [4, 4]
    protect = torch.zeros(2, 9, 9, dtype=torch.bool)
    protect[:, 2:4, 3] = True
    assert (cropr.pruning_map(model, images, protect=protect)[:, 2:4, 3] == 4).all()


@torch.no_grad()
def test_merged_tokens_stay_in_their_window_and_are_numbered_one_by_one():
    model, spec, images = build()
    cropr.apply(model, keep=[12, 7, 3], merge=True, spec=spec)
    _, state = run(model, lambda: model(images), PruningOptions(collect=True))
    maps = token_maps(state)
    assert torch.equal(maps[-1], cropr.merge_map(model, images))
    for tokens in maps[-1]:
        assert sorted(tokens.unique().tolist()) == list(range(4 * 3 + 4 * 3 + 1))
        inside = tokens[:4, :4].unique()
        outside = torch.cat([tokens[4:].flatten(), tokens[:4, 4:].flatten()])
        assert len(inside) == 3 and not torch.isin(inside, outside).any()


@torch.no_grad()
def test_calibrated_queries_predict_the_attention_of_later_blocks_better_than_random_ones():
    model, spec, _ = build()
    cropr.apply(model, rate=2, spec=spec)
    photos = torch.nn.functional.interpolate(torch.randn(24, 3, 9, 9), SIZE, mode="bicubic")
    random = mean_correlation(model, photos[16:])
    calibrated = mean_correlation(cropr.calibrate(model, photos[:16], batch_size=8), photos[16:])
    assert calibrated > random + 0.2


def mean_correlation(model, photos):
    """Correlate scores within windows with the attention of later blocks."""
    tokens, importances = observe_blocks(model, photos, {})
    correlations = []
    for layer, module in enumerate(model.cropr):
        scores = tokens[layer] @ module.query()
        later = torch.stack(importances[layer + 1 :]).mean(0)
        cells = windows_of(model.cropr, photos)[0]
        pair = [ranks(values[:, cells].flatten(0, 1)) for values in (scores, later)]
        correlations.append(torch.cosine_similarity(*pair, dim=1).mean())
    return torch.stack(correlations).mean().item()


@torch.no_grad()
def test_hidden_states_of_all_blocks_are_full_maps(tmp_path):
    model, spec, images = build()
    plain = model(images, output_hidden_states=True).hidden_states
    cropr.apply(model, rate=0, merge=True, spec=spec)
    assert all(map(torch.equal, model(images, output_hidden_states=True).hidden_states, plain))
    cropr.calibrate(cropr.set_rate(model, 2), images)
    states = model(images, output_hidden_states=True)
    assert [state.shape for state in states.hidden_states] == [(2, 9, 9, 64)] * 5
    output = output_of(model, images)
    torch.testing.assert_close(states.last_hidden_state, output)
    cropr.save(model, tmp_path)
    assert torch.equal(output_of(cropr.load(tmp_path), images), output)
    torch.testing.assert_close(output_of(cropr.deploy(model), images), output)
    cropr.remove(model)
    assert all(map(torch.equal, model(images, output_hidden_states=True).hidden_states, plain))


def test_gradients_reach_all_parameters_and_stay_when_blocks_run_again():
    model, spec, images = build(lambda: samvit(drop_path_rate=0.5, proj_drop_rate=0.5))
    cropr.apply(model.train(), rate=2, spec=spec)
    gradients = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        model(images).square().sum().backward()
        named = [item for item in model.named_parameters() if not item[0].startswith("cropr")]
        gradients.append({name: parameter.grad.clone() for name, parameter in named})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)
    cropr.remove(model)
    assert model.blocks[3].drop_path1.drop_prob == 0.5 and model.blocks[3].mlp.drop1.p == 0.5


def test_options_that_maps_cannot_have_are_refused():
    model, spec, images = build()
    for options in (dict(windows=cropr.Windows(4)), dict(num_outputs=3)):
        with pytest.raises(ValueError, match="SamVisionModel takes neither windows, as it has"):
            cropr.apply(model, rate=1, spec=spec, **options)
    with pytest.raises(ValueError, match="rate must be at most 5 for 16 tokens"):
        cropr.apply(model, rate=6, spec=spec)
    cropr.apply(model, rate=1, spec=spec)
    with pytest.raises(ValueError, match="blocks over maps return no attention"):
        model(images, output_attentions=True)
    with pytest.raises(ValueError, match="padding is not supported with window attention"):
        model(images, padding=torch.zeros(2, 9, 9, dtype=torch.bool))
    assert cropr.deploy(model).cropr.engine_reason == "blocks take maps"
    model.vision_encoder.layers[2].attn.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="SamVisionSdpaAttention has forward hooks of others"):
        model(images)


def test_blocks_that_their_parts_do_not_compute_are_refused(monkeypatch):
    for make, reason in (
        (lambda: vitdet(residual_block_indices=[1]), "parameters of its own, not 2 at most"),
        (lambda: other_windows(sam()), "windows of several sizes"),
        (lambda: other_scale(sam()), "block 2 is no pre-norm block with windows"),
    ):
        with pytest.raises(TypeError, match=f"takes maps of four dimensions.* {reason}"):
            cropr.apply(randomize(make()).eval(), rate=1)


def test_maps_without_values_are_refused():
    with torch.device("meta"):
        model = sam().eval()
    with pytest.raises(TypeError, match="windows, and its parameters are on the meta device"):
        cropr.find_spec(model)


def other_windows(model):
    layer = model.vision_encoder.layers[2]
    layer.window_size = 3
    return model


def other_scale(model):
    attention = model.vision_encoder.layers[2].attn
    attention.register_forward_hook(lambda module, args, output: (output[0] * 1.1, output[1]))
    return model


def test_positions_are_compared_where_tables_are_zero(monkeypatch):
    model = sam().eval()
    attention = type(model.vision_encoder.layers[0].attn)
    assert not model.vision_encoder.layers[0].attn.rel_pos_h.any()
    cropr.find_spec(model)
    plain = attention.get_rel_pos
    monkeypatch.setattr(
        attention, "get_rel_pos", lambda self, q, k, table: plain(self, q, k, table.flip(0))
    )
    with pytest.raises(TypeError, match="block 0 is no pre-norm block with windows"):
        cropr.find_spec(model)
