"""Comparisons of photos: they are those of the model, and the model runs once for each."""

import itertools
import threading

import pytest
import torch
from helpers.models import HF, MODELS, reference_vit, timm_vit, transformers

import cropr_kernels as cropr
from cropr_kernels.models.pixels import Pixels
from cropr_kernels.pruning.model import modules_of, run
from cropr_kernels.pruning.state import PruningOptions
from cropr_kernels.utils.flops import flop_counter
from cropr_kernels.view.colors import ColorScale
from cropr_kernels.view.comparison import Photo, Setting, Viewer

PIXELS = Pixels((64, 64), (0.5,) * 3, (0.5,) * 3)
EQUAL_COUNTS = PruningOptions(engine=True, equal_counts=True)
SETTINGS = [Setting(rate, merge) for rate in (0, 5, 12) for merge in (True, False)]


def photo(seed=0):
    return Photo(
        f"photo {seed}", torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed))
    )


def calibrated(model, **options):
    """Prune a model and calibrate it on random images."""
    model = cropr.apply(model.eval(), **{"rate": 5, "merge": True, "num_outputs": 0, **options})
    return cropr.calibrate(model, torch.randn(4, 3, 64, 64))


@pytest.mark.parametrize("name", MODELS)
def test_a_comparison_is_that_of_agreement_and_of_the_model(name):
    model = calibrated(MODELS[name]())
    viewer = Viewer(model, PIXELS)
    shown = photo()
    images = PIXELS.normalize(shown.pixels.unsqueeze(0))
    thresholds = modules_of(model).thresholds
    for rate, equal in itertools.product((5, 12), (False, True)):
        setting = Setting(rate, equal_counts=equal)
        comparison = viewer.compare(shown, setting)
        modules_of(model).thresholds = None if equal else thresholds
        [row] = cropr.agreement(model, images, [rate])
        assert comparison.agreement == row.agreement
        assert comparison.divergence == pytest.approx(row.divergence, abs=1e-5)
        with torch.no_grad():
            if not equal:
                expected = cropr.deploy(cropr.set_rate(model, rate))(images)[0]
                torch.testing.assert_close(comparison.pruned, expected, rtol=1e-4, atol=1e-5)
                continue
            assert viewer.measure(setting).flop_ratio == pytest.approx(row.flops, rel=0.02)
            torch.testing.assert_close(
                comparison.pruned, cropr.set_rate(model, rate)(images)[0], rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                comparison.unpruned, cropr.set_rate(model, 0)(images)[0], rtol=1e-4, atol=1e-5
            )


def test_dropping_and_merging_are_those_of_models_that_were_pruned_so():
    torch.manual_seed(0)
    plain = reference_vit()
    merging = calibrated(plain)
    viewer = Viewer(merging, PIXELS)
    shown = photo()
    images = PIXELS.normalize(shown.pixels.unsqueeze(0))
    queries = [merging.cropr.scorer(layer).query().clone() for layer in range(3)]
    dropping = cropr.apply(cropr.remove(merging), rate=12, num_outputs=0)
    with torch.no_grad():
        for layer, query in enumerate(queries):
            dropping.cropr[layer].queries.copy_(query)
        expected = dropping(images)[0]
    torch.testing.assert_close(
        viewer.compare(shown, Setting(12, merge=False)).pruned, expected, rtol=1e-4, atol=1e-5
    )
    merged = viewer.compare(shown, Setting(12, merge=True))
    assert (merged.pruned - expected).abs().max() > 1e-3


def test_flops_and_tokens_of_the_blocks_add_up_to_those_of_the_forward():
    model = calibrated(reference_vit())
    viewer = Viewer(model, PIXELS)
    for setting in SETTINGS:
        comparison = viewer.compare(photo(), setting)
        cost = viewer.measure(setting)
        viewer._set(setting)
        with flop_counter() as counter, torch.inference_mode():
            run(viewer.model, lambda: viewer.model(torch.zeros(1, 3, 64, 64)), EQUAL_COUNTS)
        assert sum(cost.flops) == counter.get_total_flops() and len(cost.flops) == 4
        assert cost.flop_ratio == 1 if setting.rate == 0 else cost.flop_ratio > 1
        maps = comparison.token_maps
        for block, count in enumerate(comparison.tokens):
            assert len(maps[block][maps[block] >= 0].unique()) == count - 1  # the class token


def test_tiles_are_those_of_the_maps_and_tokens_that_met_stay_together():
    model = calibrated(reference_vit(depth=6))
    viewer = Viewer(model, PIXELS)
    shown = photo()
    images = PIXELS.normalize(shown.pixels.unsqueeze(0))
    merged = viewer.compare(shown, Setting(8)).token_maps
    expected = cropr.merge_map(cropr.deploy(cropr.set_rate(model, 8)), images)[0]
    assert merged.shape == (7, 8, 8) and torch.equal(merged[-1], expected)
    assert torch.equal(merged[0].flatten(), torch.arange(64))
    for before, after in itertools.pairwise(merged):
        together = before.flatten()[:, None] == before.flatten()
        assert (after.flatten()[:, None] == after.flatten())[together].all()
    dropped = viewer.compare(shown, Setting(8, merge=False)).token_maps
    viewer._set(Setting(8, merge=False))
    last_blocks = cropr.pruning_map(viewer.model, images)[0]
    assert torch.equal(dropped[-1], dropped[-2])  # nothing is pruned after the last block
    for block, token_map in enumerate(dropped[:-1]):
        assert torch.equal(token_map < 0, last_blocks <= block)


def test_a_model_runs_once_for_each_photo_and_setting_whatever_is_drawn():
    viewer = Viewer(calibrated(reference_vit()), PIXELS)
    runs = []
    viewer.model.register_forward_pre_hook(lambda *_: runs.append(1))
    shown = photo()
    for _ in range(3):
        for setting in SETTINGS:
            viewer.compare(shown, setting)
    assert len(runs) == len(SETTINGS) + 1  # and once unpruned
    viewer.compare(photo(seed=1), SETTINGS[2])
    assert len(runs) == len(SETTINGS) + 3


def test_comparisons_from_several_threads_while_time_is_measured_are_those_of_a_single_thread():
    viewer = Viewer(calibrated(reference_vit()), PIXELS)
    expected = [viewer.compare(photo(), setting).pruned for setting in SETTINGS]
    results = {}

    def compare(number):
        results[number] = viewer.compare(photo(), SETTINGS[number]).pruned

    threads = [threading.Thread(target=compare, args=(number,)) for number in range(len(SETTINGS))]
    threads.append(threading.Thread(target=viewer.measure, args=(Setting(12),)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[number], output) for number, output in enumerate(expected))
    cost = viewer.measured(Setting(12))
    assert cost is not None and cost.ms > 0 and cost.unpruned_ms > 0 and cost.rounds >= 3
    assert viewer.measure(Setting(12)) is cost and viewer.measured(Setting(5)) is None


def test_calibration_sets_the_queries_of_all_photos_and_reports_on_half_of_them():
    photos = [photo(seed).pixels for seed in range(5)]
    torch.manual_seed(0)
    viewer = Viewer(cropr.apply(reference_vit().eval(), rate=5, merge=True, num_outputs=0), PIXELS)
    steps = []
    result = viewer.calibrate(photos, lambda done, total: steps.append((done, total)))
    assert steps[-1] == (10, 10) and steps == sorted(steps)
    images = PIXELS.normalize(torch.stack(photos))
    torch.manual_seed(0)
    model = cropr.apply(reference_vit().eval(), rate=5, merge=True, num_outputs=0)
    cropr.calibrate(model, images[::2])
    [row] = cropr.agreement(model, images[1::2], [5])
    assert result == (5, 3, row.agreement, 5)
    cropr.calibrate(model, images)
    for layer in range(3):
        torch.testing.assert_close(
            viewer.modules.scorer(layer).query(), model.cropr.scorer(layer).query()
        )
    assert viewer.calibrate(photos[:1]) is result
    with pytest.raises(ValueError, match="calibration needs photos, got none"):
        viewer.calibrate([])


def test_features_of_a_model_without_classifier_are_compared_patch_by_patch():
    model = calibrated(timm_vit(num_classes=0, global_pool=""), llf=cropr.Fusion(blocks=0))
    model.global_pool = "token"
    viewer = Viewer(model, PIXELS)
    assert not viewer.classifies
    shown = photo()
    images = PIXELS.normalize(shown.pixels.unsqueeze(0))
    unpruned = viewer.compare(shown, Setting(0))
    assert unpruned.feature_error == 0 and unpruned.agreement == pytest.approx(1)
    comparison = viewer.compare(shown, Setting(12))
    with torch.no_grad():
        full, _ = cropr.features(cropr.set_rate(model, 0), images)
        restored, _ = cropr.features(cropr.set_rate(model, 12), images)
    scale = ColorScale(full[0, 1:])
    torch.testing.assert_close(
        comparison.pruned_colors, scale.colors(restored[0, 1:]), rtol=0, atol=0.01
    )
    error = (restored - full)[0, 1:].norm() / full[0, 1:].norm()
    assert comparison.feature_error == pytest.approx(error.item(), rel=1e-4) and error > 0


def test_a_schedule_of_the_model_can_be_chosen_beside_rates():
    viewer = Viewer(calibrated(reference_vit(), rate=None, keep=[60, 30, 10]), PIXELS)
    assert viewer.has_schedule and viewer.default == Setting(None)
    comparison = viewer.compare(photo(), viewer.default)
    assert comparison.tokens == [65, 60, 30, 10]
    assert viewer.compare(photo(), Setting(5, equal_counts=True)).tokens == [65, 59, 54, 49]
    fused = Viewer(calibrated(reference_vit(), llf=True), PIXELS)
    assert not fused.has_schedule
    assert fused.compare(photo(), Setting(5, equal_counts=True)).tokens == [65, 59, 54, 65]


def test_the_highest_rate_is_the_one_that_the_schedule_allows():
    for llf in (False, True):
        viewer = Viewer(calibrated(reference_vit(), llf=llf), PIXELS)
        viewer.compare(photo(), Setting(viewer.highest_rate))
        with pytest.raises(ValueError, match="rate must be at most"):
            viewer.compare(photo(), Setting(viewer.highest_rate + 1))


def test_models_that_cannot_be_shown_are_refused():
    with pytest.raises(TypeError, match="the model is not pruned"):
        Viewer(reference_vit(), PIXELS)
    windows = cropr.Windows(4, (3,))
    model = cropr.apply(reference_vit(), rate=1, llf=True, windows=windows)
    with pytest.raises(ValueError, match="cannot be shown: it has window attention"):
        Viewer(model, PIXELS)
    t = transformers()
    videos = t.VideoMAEForVideoClassification(t.VideoMAEConfig(**HF, num_frames=4))
    with pytest.raises(ValueError, match="cannot be shown: it takes videos of 2 frames"):
        Viewer(cropr.apply(videos, rate=1, num_outputs=0), PIXELS)
