"""Window attention: equal counts per window, some global blocks, a full map at the end."""

import copy

import pytest
import torch
from helpers.models import embed, randomize, reference_vit, timm_eva

import cropr_kernels as cropr
from cropr_kernels.pruning.model import run
from cropr_kernels.pruning.observing import observe_blocks, windows_of
from cropr_kernels.pruning.state import PruningOptions, PruningState
from cropr_kernels.pruning.windowed_state import WindowedState

IMAGES = dict(size=(2, 3, 64, 96))  # 8 x 12 patches: 2 x 3 windows of 4 x 4
GRID, SIZE = (8, 12), 4
MODELS = {
    "class token": lambda: reference_vit(),
    "patches alone": lambda: reference_vit(class_token=False, global_pool="avg"),
    "rotary": lambda: reference_vit(rope=True, swiglu=True, qkv="joint_eva", global_pool="avg"),
    "timm EVA-02": lambda: timm_eva(dynamic_img_size=True),
}


def build(name, **options):
    torch.manual_seed(0)
    model = randomize(MODELS[name]()).double().eval()
    return model, torch.randn(**IMAGES).double()


def patches_of(model, images):
    x, rope = embed(model, images)
    return x[:, model.num_prefix_tokens :], rope


def without_prefix(model):
    for block in model.blocks:
        for name in ("num_prefix", "num_prefix_tokens"):
            if hasattr(block.attn, name):
                setattr(block.attn, name, 0)


def slowly(model, images, counts, queries, global_blocks):
    """Return features, one image and one window at a time, with rows by position."""
    tokens, rope = patches_of(model, images)
    without_prefix(model)
    outputs = []
    for image in tokens:
        cells = torch.arange(GRID[0] * GRID[1]).view(GRID)
        windows = [
            cells[top : top + SIZE, left : left + SIZE].flatten()
            for top in range(0, GRID[0], SIZE)
            for left in range(0, GRID[1], SIZE)
        ]
        rows = {int(p): image[p] for p in cells.flatten()}
        alive = [window.tolist() for window in windows]
        for layer, block in enumerate(model.blocks):
            if layer == len(model.blocks) - 1:
                alive = [window.tolist() for window in windows]
            groups = [[p for window in alive for p in window]] if layer in global_blocks else alive
            for group in groups:
                x = torch.stack([rows[p] for p in group])[None]
                out = block(x) if rope is None else block(x, rope=rope[group])
                rows |= dict(zip(group, out[0]))
            if layer < len(counts):
                for i, window in enumerate(alive):
                    scores = torch.stack([rows[p] @ queries[layer] for p in window])
                    best = scores.argsort(descending=True)[: counts[layer]].tolist()
                    alive[i] = sorted(window[j] for j in best)
        outputs.append(torch.stack([rows[p] for p in range(GRID[0] * GRID[1])]))
    return model.norm(torch.stack(outputs))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("global_blocks", [(), (1,), (0, 3)], ids=["none", "one", "first and last"])
@torch.no_grad()
def test_features_equal_a_slow_implementation(name, global_blocks):
    model, images = build(name)
    cropr.apply(
        model, keep=[12, 5], llf=True, windows=cropr.Windows(SIZE, global_blocks), num_outputs=0
    )
    features = model.forward_features(images)
    queries = [module.query().double() for module in model.cropr]
    expected = slowly(cropr.remove(model), images, [12, 5], queries, global_blocks)
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_every_window_keeps_the_same_number_of_tokens():
    model, images = build("rotary")
    cropr.apply(model, keep=[10, 3], llf=True, windows=cropr.Windows(SIZE), num_outputs=0)
    left = cropr.pruning_map(model, images)
    assert left.shape == (2, *GRID)
    windows = (
        left.unflatten(1, (2, SIZE)).unflatten(3, (3, SIZE)).transpose(2, 3).reshape(-1, SIZE**2)
    )
    for window in windows:
        assert window.bincount(minlength=5).tolist() == [0, 6, 7, 0, 3]


def test_predictions_come_in_order_of_position_and_deploy_gives_the_same_features():
    model, images = build("rotary")
    windows = cropr.Windows(SIZE, (1,))
    cropr.apply(model, rate=3, llf=True, windows=windows, num_queries=SIZE**2, num_outputs=7)
    features, aux = cropr.features(model.double().train(), images, predict=True)
    assert (
        features.shape == (2, 96, 64)
        and [prediction.shape for prediction in aux] == [(2, 96, 7)] * 2
    )
    sum(prediction.square().sum() for prediction in aux).backward()
    assert all(
        p.grad is None for name, p in model.named_parameters() if not name.startswith("cropr")
    )
    with torch.no_grad():
        assert torch.equal(
            cropr.deploy(model).forward_features(images), model.eval().forward_features(images)
        )


@torch.no_grad()
def test_one_window_over_the_map_calibrates_and_merges_as_none():
    plain, images = build("patches alone")
    images = images[:, :, :, :64]
    windowed = copy.deepcopy(plain)
    cropr.apply(plain, rate=9, llf=True, merge=True, num_outputs=0)
    cropr.apply(windowed, rate=9, llf=True, merge=True, windows=cropr.Windows(8), num_outputs=0)
    for model in (plain, windowed):
        cropr.calibrate(model, images)
    for module, expected in zip(windowed.cropr, plain.cropr):
        torch.testing.assert_close(module.query(), expected.query(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        windowed.forward_features(images), plain.forward_features(images), rtol=1e-6, atol=1e-6
    )


@torch.no_grad()
def test_windows_calibrate_by_the_attention_within_them_and_merge_one_by_one():
    model, images = build("rotary")
    windows = cropr.Windows(SIZE, (1,))
    cropr.apply(model, rate=3, llf=True, merge=True, windows=windows, num_outputs=0)
    tokens, importances = observe_blocks(model, images, {})
    for values, x in zip(importances, tokens):
        assert x.shape == (2, 96, 64)
        sums = values[:, windows_of(model.cropr, images)[0]].sum(2)
        torch.testing.assert_close(sums, torch.ones(2, 6))
    cropr.calibrate(model, images)
    for tokens in merged_in(model, images):
        parts = tokens.unflatten(0, (2, SIZE)).unflatten(2, (3, SIZE)).transpose(1, 2)
        assert [len(part.unique()) for part in parts.reshape(6, -1)] == [10] * 6
        assert tokens.unique().tolist() == list(range(6 * 10))


def merged_in(model, images):
    _, state = run(model, lambda: model.forward_features(images), PruningOptions())
    return state.merge_map(images.device)


def test_remove_restores_the_model():
    model, images = build("timm EVA-02")
    before = model(images[:, :, :, :64])
    cropr.apply(model, rate=3, llf=True, windows=cropr.Windows(SIZE), num_outputs=0)
    assert torch.equal(cropr.remove(model)(images[:, :, :, :64]), before)


def test_schedules_and_grids_that_do_not_fit_raise():
    model, images = build("class token")
    windows = cropr.Windows(SIZE)
    with pytest.raises(ValueError, match="windows need llf=True"):
        cropr.apply(model, rate=1, windows=windows)
    with pytest.raises(ValueError, match="rate must be at most 7 for 16 tokens"):
        cropr.apply(model, rate=8, llf=True, windows=windows)
    with pytest.raises(ValueError, match="size must be an integer >= 1, got 0"):
        cropr.Windows(0)
    cropr.apply(model, rate=1, llf=True, windows=windows)
    with pytest.raises(RuntimeError, match="gives features only"):
        model(images)
    with pytest.raises(ValueError, match="grid of 8 x 7 patches must be a multiple of 4"):
        model.forward_features(images[:, :, :, :56])


def test_patches_that_form_no_known_grid_have_no_windows_and_no_map():
    plain, windowed = (
        cropr.apply(build("class token")[0], rate=1, **options)
        for options in ({}, dict(llf=True, windows=cropr.Windows(SIZE)))
    )
    tokens = torch.zeros(2, 1 + 15, 64)
    with pytest.raises(
        ValueError, match="cannot tell height and width of 15 patches, which windows need"
    ):
        WindowedState(windowed.cropr, tokens, PruningOptions(), None)
    state = PruningState(plain.cropr, tokens, PruningOptions(), None)
    with pytest.raises(ValueError, match="cannot tell height and width of 15 patches"):
        state.require_grid()
