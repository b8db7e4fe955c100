"""Last Layer Fusion that tracks parents: how it is set, trained, saved and counted."""

import copy
import re

import pytest
import torch
from helpers.models import BLOCK_RUNNERS, outputs_of, randomize, reference_vit, timm_vit

import cropr_kernels as cropr
from cropr_kernels.utils.flops import flop_counter

DROP, MERGE = {}, {"merge": True}


def pruned(**options):
    torch.manual_seed(0)
    return cropr.apply(
        randomize(reference_vit(depth=6)).eval().double(), rate=5, num_outputs=0, **options
    )


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(2, 3, 64, 64, dtype=torch.float64)


def fusion(model):
    return model.cropr.config.llf


def test_llf_true_tracks_parents_if_tokens_merge():
    assert (
        fusion(pruned(llf=True)) == cropr.Fusion() and not fusion(pruned(llf=True)).tracks_parents
    )
    assert fusion(pruned(llf=True, merge=True)) == cropr.Fusion("track_parent")
    assert fusion(pruned(llf="as_pruned", merge=True)) == cropr.Fusion("as_pruned")
    assert fusion(pruned(llf=cropr.Fusion(blocks=3))) == cropr.Fusion(None, 3)


def test_calibrated_queries_track_parents_unless_told_otherwise(images, tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    unset, as_pruned = pruned(llf=True), pruned(llf="as_pruned")
    for model in (unset, as_pruned):
        cropr.calibrate(model, images)
    assert fusion(unset) == cropr.Fusion("track_parent") and fusion(as_pruned) == cropr.Fusion(
        "as_pruned"
    )
    for model in (unset, as_pruned, cropr.calibrate(pruned(), images)):
        cropr.save_queries(model, tmp_path / "queries.safetensors")
        loaded = cropr.load_queries(pruned(llf=True), tmp_path / "queries.safetensors")
        assert fusion(loaded) == (fusion(model) or cropr.Fusion("track_parent"))
        assert fusion(cropr.set_llf(loaded, True)) == cropr.Fusion("track_parent")
        assert fusion(
            cropr.load_queries(pruned(llf="as_pruned"), tmp_path / "queries.safetensors")
        ) == cropr.Fusion("as_pruned")


@pytest.mark.parametrize("options", [DROP, MERGE], ids=["drop", "merge"])
@torch.no_grad()
def test_every_fusion_gives_a_full_map_of_its_own(images, options):
    model, tokens = pruned(**options), []
    unpruned = cropr.remove(copy.deepcopy(model)).forward_features(images)
    for llf in (
        "as_pruned",
        "track_parent",
        cropr.Fusion("as_pruned", 2),
        cropr.Fusion("track_parent", 2),
        cropr.Fusion(blocks=0),
    ):
        for runner in (cropr.set_llf(model, llf), cropr.deploy(cropr.set_llf(model, llf))):
            tokens.append(cropr.features(runner, images)[0])
            assert tokens[-1].shape == unpruned.shape
        torch.testing.assert_close(tokens[-1], tokens[-2], rtol=1e-9, atol=1e-9)
    assert len({round(part.abs().sum().item(), 6) for part in tokens}) == 5
    assert torch.equal(cropr.set_rate(model, 0).forward_features(images), unpruned)


@torch.no_grad()
def test_a_network_that_only_shifts_its_tokens_is_restored_exactly(images):
    """If every block shifts all tokens alike, pruned tokens get the shift that they missed from
    their parents."""
    model = pruned()
    for block in model.blocks:
        for part in (block.attn.proj, block.mlp.fc2):
            part.weight.zero_()
    unpruned = cropr.remove(copy.deepcopy(model)).forward_features(images)
    for llf in ("track_parent", cropr.Fusion("track_parent", 3), cropr.Fusion("track_parent", 0)):
        fused = pruned(llf=llf)
        fused.load_state_dict(
            {k: v for k, v in model.state_dict().items() if not k.startswith("cropr")}, strict=False
        )
        for runner in (fused, cropr.deploy(fused)):
            torch.testing.assert_close(cropr.features(runner, images)[0], unpruned)
    left = cropr.features(cropr.set_llf(model, "as_pruned"), images)[0]
    assert (left - unpruned).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("options", [DROP, MERGE], ids=["drop", "merge"])
def test_gradients_reach_tokens_and_their_parents(images, options):
    model = pruned(llf="track_parent", **options)
    model.cropr.requires_grad_(False)
    x = images[:1, :, :8, :8].clone().requires_grad_()

    def loss(patch):
        full = torch.cat([torch.cat([patch, images[:1, :, :8, 8:]], 3), images[:1, :, 8:]], 2)
        return model.forward_features(full).square().mean((0, 1))[:3]

    assert torch.autograd.gradcheck(loss, x, eps=1e-7, atol=1e-4)


@torch.no_grad()
def test_fusion_after_the_last_block_changes_no_logits_and_no_kept_token(images):
    for options in (DROP, MERGE):
        model = pruned(**options)
        plain = cropr.deploy(model)(images)
        kept = cropr.pruning_map(model, images).flatten(1) == 6
        copies = cropr.features(model, images)[0][:, 1:]
        fused = cropr.deploy(cropr.set_llf(model, cropr.Fusion(blocks=0)))
        tokens = cropr.features(fused, images)[0][:, 1:]
        # The head reads the class token
        torch.testing.assert_close(fused(images), plain, rtol=1e-9, atol=1e-9)
        if options:
            torch.testing.assert_close(tokens[kept], copies[kept], rtol=1e-9, atol=1e-9)
            assert not torch.allclose(tokens, copies)
        assert len(fused.cropr) == 5 and tokens.shape == (2, 64, 64)


def test_flops_are_those_of_the_blocks_that_see_all_tokens(images):
    counts = {}
    for llf in (
        False,
        cropr.Fusion(blocks=0),
        "as_pruned",
        "track_parent",
        cropr.Fusion("track_parent", 2),
    ):
        model = cropr.deploy(pruned(llf=llf))
        with flop_counter() as counter:
            model(images)
        counts[str(llf)] = counter.get_total_flops()
    without, after, as_pruned, track_parent, two_blocks = counts.values()
    assert without < after < as_pruned < track_parent < two_blocks
    assert after < 1.02 * without and track_parent < 1.02 * as_pruned


@torch.no_grad()
def test_tracking_parents_changes_no_map_and_no_mask(images):
    protect = torch.zeros(2, 8, 8, dtype=torch.bool)
    protect[:, 2:4, 2:4] = True
    padding = torch.zeros(2, 8, 8, dtype=torch.bool)
    padding[1, :, 6:] = True
    as_pruned, track_parent = pruned(llf="as_pruned"), pruned(llf="track_parent")
    for masks in ({}, {"protect": protect}, {"padding": padding}):
        maps = [cropr.pruning_map(model, images, **masks) for model in (as_pruned, track_parent)]
        assert torch.equal(*maps)
        expected = track_parent(images, **masks)
        torch.testing.assert_close(
            cropr.deploy(track_parent)(images, **masks), expected, rtol=1e-9, atol=1e-9
        )
    other = images.clone()
    other[1, :, :, 48:] = 7.0  # padding reaches no token, through no parent
    torch.testing.assert_close(track_parent(other, padding=padding), expected, rtol=1e-9, atol=1e-9)
    merging = pruned(llf="track_parent", merge=True)
    assert cropr.merge_map(merging, images).shape == (2, 8, 8)


@torch.no_grad()
def test_windows_track_parents_of_the_same_window(images):
    windows = cropr.Windows(4, (1, 5))
    model = randomize(reference_vit(depth=6)).eval().double()
    as_pruned, track_parent = (
        cropr.apply(
            copy.deepcopy(model), keep=[12, 8, 8, 5], windows=windows, llf=llf, num_outputs=0
        ).forward_features(images)
        for llf in ("as_pruned", "track_parent")
    )
    assert as_pruned.shape == track_parent.shape == (2, 64, 64) and not torch.allclose(
        as_pruned, track_parent
    )
    with pytest.raises(ValueError, match="windows need llf=True"):
        cropr.set_llf(
            cropr.apply(model, keep=[12, 8, 8, 5], windows=windows, llf=True, num_outputs=0), False
        )


@torch.no_grad()
def test_a_curriculum_leads_from_no_pruning_to_all_of_it(images):
    for options in (DROP, MERGE):
        model = pruned(llf="track_parent", **options)
        expected, plain = model(images), cropr.set_rate(copy.deepcopy(model), 0)(images)
        assert torch.equal(cropr.set_progress(model, 0.0)(images), plain)
        half = cropr.set_progress(model, 0.5)(images)
        torch.testing.assert_close(cropr.deploy(model)(images), half, rtol=1e-9, atol=1e-9)
        assert torch.equal(cropr.set_progress(model, 1.0)(images), expected) and not torch.allclose(
            half, expected
        )


def test_set_llf_needs_the_modules_it_uses():
    model = pruned()
    for llf in ("track_parent", cropr.Fusion("as_pruned", 2), False, True):
        cropr.set_llf(model, llf)
    assert cropr.set_llf(model, cropr.Fusion("track_parent", 2)).cropr.num_used == 3
    narrow = pruned(llf=cropr.Fusion("track_parent", 3))
    with pytest.raises(
        ValueError, match=re.escape("cropr.set_llf: llf=True needs 4 modules, and the model has 2")
    ):
        cropr.set_llf(narrow, True)
    with pytest.raises(
        ValueError, match=re.escape("depth must be at least 7 with LLF over 5 blocks, got 6")
    ):
        pruned(llf=cropr.Fusion(blocks=5))
    with pytest.raises(ValueError, match="restore='as_pruned' needs a block that sees the tokens"):
        cropr.Fusion("as_pruned", 0)
    for wrong, error in (
        ("right", "restore must be 'as_pruned' or 'track_parent', got 'right'"),
        (-1, "blocks must be an integer"),
    ):
        with pytest.raises(ValueError, match=error):
            cropr.Fusion(wrong) if isinstance(wrong, str) else cropr.Fusion(blocks=wrong)


@torch.no_grad()
def test_a_saved_model_loads_with_its_fusion(images, tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    for options in (
        {"llf": cropr.Fusion("track_parent", 2)},
        {"llf": True},
        {"llf": "as_pruned", "merge": True},
        {},
    ):
        model = pruned(**options)
        cropr.save(model, tmp_path / "one")
        again = cropr.load(tmp_path / "one")
        assert fusion(again) == fusion(model) and torch.equal(again(images), model(images))
    cropr.save(
        cropr.set_llf(model, cropr.Fusion("track_parent", 2)), tmp_path / "one"
    )  # one module more than fusion uses
    assert torch.equal(cropr.load(tmp_path / "one")(images), model(images))


@torch.no_grad()
def test_earlier_options_mean_as_pruned(images, tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    from cropr_kernels.pruning.api import apply_options

    model = apply_options(
        randomize(reference_vit()).eval(), {"rate": 4, "llf": True, "merge": {}, "num_outputs": 0}
    )
    assert fusion(model) == cropr.Fusion("as_pruned")


def test_stochastic_depth_is_off_in_every_block_that_sees_all_tokens():
    model = timm_vit(drop_path_rate=0.2, depth=6)
    cropr.apply(model, rate=5, llf=cropr.Fusion("track_parent", 2))
    rates = [
        block.drop_path1.drop_prob if hasattr(block.drop_path1, "drop_prob") else 0.0
        for block in model.blocks
    ]
    assert rates[4:] == [0.0, 0.0] and all(rates[1:4])
    assert cropr.remove(model).blocks[5].drop_path1.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize("name", ["ViT", "DINOv2 with registers", "SigLIP", "torchvision"])
@pytest.mark.parametrize("options", [DROP, MERGE], ids=["drop", "merge"])
@torch.no_grad()
def test_models_that_run_their_blocks_track_parents(name, options):
    torch.manual_seed(0)
    model, images = (
        randomize(BLOCK_RUNNERS[name]()).eval().double(),
        torch.randn(2, 3, 64, 64).double(),
    )
    plain = outputs_of(model(images))
    cropr.apply(model, rate=8, llf="track_parent", num_outputs=0, **options)
    got, fast = outputs_of(model(images)), outputs_of(cropr.deploy(model)(images))
    assert got.shape == plain.shape and not torch.allclose(got, plain)
    torch.testing.assert_close(fast, got, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(outputs_of(cropr.set_rate(model, 0)(images)), plain, rtol=0, atol=0)


@pytest.mark.each_choice
@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("options", [DROP, MERGE], ids=["drop", "merge"])
@torch.no_grad()
def test_tracking_parents_compiles_in_one_graph(images, options, deployed):
    torch._dynamo.reset()
    model = pruned(llf="track_parent", **options)
    runner = cropr.deploy(model) if deployed else model
    got = torch.compile(runner, backend="aot_eager", fullgraph=True)(images)
    torch.testing.assert_close(got, runner(images))
