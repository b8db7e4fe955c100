"""Models by name: their library, their weights, and the preprocessing of their images."""

import json
import sys

import pytest
import torch
from helpers.folders import FOLDERS, MEAN, STD
from helpers.models import BLOCK_RUNNERS, CLASSIFIERS, MODELS, reference_vit

from cropr_kernels.models.factory import create_model, model_source
from cropr_kernels.models.outputs import outputs_of, remove_classifier
from cropr_kernels.models.pixels import pixels_of
from cropr_kernels.models.vit import ViT


def test_a_name_determines_the_library_of_a_model(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    for name, source in (
        ("vit_tiny_patch16_224", "preset"),
        ("vit_tiny_patch16_224.augreg_in21k", "timm"),
        ("deit_tiny_distilled_patch16_224", "timm"),
        ("hf-hub:timm/vit_tiny_patch16_224", "timm"),
        ("vit_b_16", "torchvision"),
        ("weights.safetensors", "weight file"),
        (str(tmp_path), "transformers"),
    ):
        assert model_source(name) == source
    assert model_source("vit_tiny_patch16_224", pretrained=True) == "timm"
    (tmp_path / "config.json").write_text("[]")
    for name in ("resnet_of_nobody", str(tmp_path)):
        with pytest.raises(
            ValueError,
            match=r"a model must be a preset .* or a folder of transformers, cropr.save or .* got ",
        ):
            model_source(name)


def test_without_timm_presets_load_and_other_names_raise(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert isinstance(create_model("vit_tiny_patch16_224", depth=2), ViT)
    with pytest.raises(
        ImportError, match=r"model 'eva_x', which is no preset .* needs timm: pip install timm"
    ):
        create_model("eva_x")


@pytest.mark.parametrize("source", FOLDERS)
def test_files_and_folders_load_with_their_weights_and_pixels(source, tmp_path):
    name = FOLDERS[source](tmp_path)
    model, again = (create_model(name, pretrained=True) for _ in range(2))
    assert not model.training and next(model.parameters()).dtype == torch.float32
    pixels = pixels_of(model, name)
    stated = source in ("timm", "transformers classifier")
    assert pixels[1:3] == ((MEAN, STD) if stated else ((0.5,) * 3, (0.5,) * 3))
    assert pixels.img_size == ((224, 224) if source == "weight file" else (64, 64))
    images = torch.rand(2, 3, *pixels.img_size)
    with torch.no_grad():
        output = outputs_of(model(pixels.normalize(images)))
        torch.testing.assert_close(outputs_of(again(pixels.normalize(images))), output)
    assert output.shape == (2, 64 if "features" in source or "tower" in source else 5)


def test_a_preprocessor_without_normalization_is_respected(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    name = FOLDERS["transformers features"](tmp_path)
    transformers.ViTImageProcessor(do_normalize=False).save_pretrained(name)
    assert pixels_of(create_model(name), name)[1:3] == ((0.0,) * 3, (1.0,) * 3)


def test_a_preprocessor_determines_how_photos_are_resized(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    name = FOLDERS["transformers features"](tmp_path)
    for processor, expected in (
        (transformers.ViTImageProcessor(resample=2), (1.0, "bilinear", True)),
        (
            transformers.BitImageProcessor(size={"shortest_edge": 256}, resample=3),
            (0.875, "bicubic", False),
        ),
        (
            transformers.BitImageProcessor(size={"shortest_edge": 80}, do_center_crop=False),
            (1.0, "bicubic", False),
        ),
    ):
        processor.save_pretrained(name)
        assert pixels_of(create_model(name), name)[3:] == expected


def test_torchvision_takes_its_options_and_has_the_pixels_of_imagenet():
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    model = create_model("vit_b_32", num_classes=3, image_size=64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert pixels_of(model, "vit_b_32") == ((64, 64), *imagenet, 0.875, "bilinear", False)


@pytest.mark.parametrize("name", [*MODELS, *CLASSIFIERS])
def test_a_model_without_its_classifier_gives_the_features_that_it_reads(name):
    model = (MODELS | BLOCK_RUNNERS)[name]().eval()
    images, seen = torch.randn(2, 3, 64, 64), []
    last = [module for module in model.modules() if getattr(module, "out_features", 0) == 5][-1]
    hook = last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(images)
        hook.remove()
        remove_classifier(model)
        assert torch.equal(outputs_of(model(images)), seen[0])


def test_outputs_without_logits_or_features_raise():
    with pytest.raises(
        ValueError, match="must be a tensor or hold logits, image_embeds, pooler_output, got dict"
    ):
        outputs_of({})
    model = reference_vit()
    del model.head
    with pytest.raises(
        TypeError, match="ViT must have a classifier named head, classifier or heads, has none"
    ):
        remove_classifier(model)
