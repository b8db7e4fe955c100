"""Configurations of a training run, the published recipes, and the learning rates that follow from
them."""

import dataclasses

import pytest

import cropr_kernels as cropr
from cropr_kernels.train import PRESETS, Config
from cropr_kernels.train.data import seed_of
from cropr_kernels.train.optim import layer_of, lr_share, param_groups, progress


def test_configurations_round_trip_and_errors_name_the_option(tmp_path):
    for name, preset in PRESETS.items():
        (tmp_path / "config.json").write_text(preset.to_json())
        assert Config.read(tmp_path / "config.json") == preset, name
    assert Config().changed(
        rate="8", llf="true", img_size="64,96", lr="1e-3", keep="none"
    ) == Config(rate=8, llf=True, img_size=(64, 96), lr=1e-3)
    (tmp_path / "bad.json").write_text("{")
    for values, message in [
        (dict(rat=8), "unknown option rat; options are task, data"),
        (dict(rate="eight"), "rate must be int, got 'eight'"),
        (dict(llf=1), "llf must be bool, got 1"),
        (dict(epochs=1.5), "epochs must be int, got 1.5"),
        (
            dict(task="depth"),
            "task must be one of 'classification', 'segmentation', 'detection', got 'depth'",
        ),
        (dict(img_size="224"), "img_size must be 2 values, got '224'"),
        (dict(rate=8, ratio=0.9), "set one schedule, got rate and ratio"),
        (dict(accumulate=3), "accumulate must be a divisor of batch_size=64, got 3"),
        (
            dict(task="detection", num_queries=4),
            "num_queries must be 1 for detection, which has one per patch",
        ),
        (dict(layer_decay=0), r"layer_decay must be in \(0, 1\], got 0"),
        (dict(last_block_lr_scale=-1.0), r"last_block_lr_scale must be >= 0, got -1.0"),
        (dict(task="segmentation"), "num_classes must be >= 1 for segmentation"),
        (dict(task="detection", rate=8), "llf must be true for detection"),
        (
            dict(task="segmentation", num_classes=3, stride="300,8"),
            r"stride must be from 1 to img_size=\(224, 224\)",
        ),
        (dict(ema=0.9, parallel="fsdp"), "ema must be 0 with parallel=fsdp"),
        (dict(model_options="depth"), "model_options must be name=value, got 'depth'"),
        (dict(std="0,0,0"), r"std must be > 0, got \(0.0, 0.0, 0.0\)"),
        (dict(std=(0.5, 0.5, -1)), "std must be > 0"),
        (dict(std="0.5"), "std must be 3 values, got '0.5'"),
        (dict(mean="0,nan,0"), "mean must be a finite number, got 'nan'"),
        (dict(poly_power=float("inf")), "poly_power must be a finite number, got inf"),
        (dict(lr=10**400), "lr must be a finite number, got 10000"),
        (
            dict(detector_options="box_nms_thresh"),
            "detector_options must be name=value, got 'box_nms_thresh'",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            Config().changed(**values)
    with pytest.raises(ValueError, match=r"bad\.json is not JSON"):
        Config.read(tmp_path / "bad.json")


def test_values_of_options_are_json_or_text():
    config = Config().changed(model_options="depth=4,qk_norm=true,global_pool=avg")
    options = {"depth": 4, "qk_norm": True, "global_pool": "avg"}
    assert config.options_of("model_options") == options


def test_the_published_recipes_name_models_that_have_weights_and_schedules_that_fit():
    timm = pytest.importorskip("timm", reason="needs the train extra")
    left = {
        "imagenet1k-vit-l": (197, 1, 20),
        "ade20k-eva02-l": (1025, 1, 144),
        "coco-eva02-l-1536": (256, 0, 8),
    }
    for name, (tokens, prefix, last) in left.items():
        preset = PRESETS[name]
        assert preset.pretrained and timm.is_model_pretrained(preset.model), preset.model
        counts = cropr.Schedule(**preset.schedule).counts(tokens, 24, prefix, preset.llf)
        assert counts[-1] == last and len(counts) == 22, name


def test_learning_rates_fall_with_depth_and_rise_and_fall_with_time():
    model = cropr.apply(
        cropr.create_vit("vit_tiny_patch16_224", depth=4, embed_dim=24, num_heads=2), rate=8
    )
    from cropr_kernels.tasks import Classifier

    task = Classifier(model)
    config = Config(
        lr=1.0,
        layer_decay=0.5,
        head_lr_scale=3.0,
        query_lr_scale=2.0,
        weight_decay=0.1,
        warmup_epochs=2,
        epochs=10,
    )
    groups = {id(p): group for group in param_groups(task, config) for p in group["params"]}
    assert len(groups) == len(list(task.parameters()))
    expected = {
        "backbone.patch_embed.proj.weight": (0.5**5, 0.1), "backbone.pos_embed": (0.5**5, 0.0),
        "backbone.blocks.0.attn.qkv.weight": (0.5**4, 0.1), "backbone.blocks.3.norm1.weight": (0.5,
        0.0),
        "backbone.norm.bias": (1.0, 0.0), "backbone.head.weight": (1.0, 0.1),
        "backbone.cropr.1.queries": (2.0, 0.0), "backbone.cropr.0.aggregator.mlp.0.weight": (3.0,
        0.1),
    }  # fmt: skip
    named = dict(task.named_parameters())
    for name, (scale, decay) in expected.items():
        group = groups[id(named[name])]
        assert (group["lr_scale"], group["weight_decay"]) == (scale, decay), name
    assert layer_of("head.weight", 4) == 5
    assert [round(lr_share(config, epoch), 3) for epoch in (1, 2, 6, 10)] == [0.5, 1.0, 0.5, 0.0]
    poly = dataclasses.replace(config, lr_schedule="poly", warmup_epochs=0)
    assert lr_share(poly, 5) == pytest.approx(0.5**0.9)
    faster = param_groups(task, dataclasses.replace(config, last_block_lr_scale=6.0))
    scales = {id(p): group["lr_scale"] for group in faster for p in group["params"]}
    for name, parameter in named.items():
        times = 6 if name.startswith("backbone.blocks.3.") else 1
        assert scales[id(parameter)] == times * groups[id(parameter)]["lr_scale"], name
    ramp = dataclasses.replace(config, curriculum=0.5)
    assert [progress(ramp, epoch) for epoch in (0, 2.5, 5, 9)] == [0, 0.5, 1, 1] and progress(
        config, 0
    ) == 1
    assert seed_of(1, 2) != seed_of(2, 1)
