"""The reference ViT against timm's own forward, and on its own."""

import json

import pytest
import torch
from helpers.photos import read_photos

import cropr_kernels as cropr
from cropr_kernels.models.vit import PRESETS, ViT, ViTConfig

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)


def randomize(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    return model.eval()


@pytest.mark.parametrize(
    "name", [name for name in PRESETS if "large" not in name and "384" not in name]
)
def test_equals_timm_with_the_same_weights(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    options = {"num_classes": 10, "depth": 2, "embed_dim": 192}  # for each number of heads
    theirs, ours = (
        randomize(timm.create_model(name, **options)),
        cropr.create_vit(name, **options).eval(),
    )
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, ours.config.img_size, ours.config.img_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            ours.forward_features(images), theirs.forward_features(images), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    "name",
    [name for name in PRESETS if name not in ("deit_tiny_patch16_384", "deit_small_patch16_384")],
)
def test_parameters_equal_those_of_timm(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    with torch.device("meta"):
        model = cropr.create_vit(name, num_classes=1000)
        ours = {key: value.shape for key, value in model.state_dict().items()}
        try:
            theirs = {
                key: value.shape
                for key, value in timm.create_model(name, num_classes=1000).state_dict().items()
            }
        except RuntimeError as error:
            pytest.skip(f"timm {timm.__version__} cannot be built without memory: {error}")
    assert ours == theirs


@pytest.mark.parametrize(
    ("name", "size"), [("vit_tiny_patch16_224", (192, 256)), ("eva02_tiny_patch14_224", (140, 252))]
)
def test_other_image_sizes_equal_timm(name, size):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    options = {"num_classes": 10, "depth": 2}
    theirs = randomize(timm.create_model(name, dynamic_img_size=True, **options))
    ours = cropr.create_vit(name, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_pretrained_weights_classify_real_photos_as_timm_does(data):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    from safetensors.torch import load_file

    from cropr_kernels.models.factory import load_weights

    path = data / "vit_tiny_p16_224_tin200_fp16.safetensors"
    ours, metadata = load_weights(path)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=200).eval()
    theirs.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    images, labels = read_photos(data, 60)
    logits = ours(images)
    torch.testing.assert_close(logits[:8], theirs(images[:8]), rtol=1e-4, atol=1e-4)
    names = metadata["classes"].split()
    accuracy = sum(names[i] == label for i, label in zip(logits.argmax(1).tolist(), labels)) / len(
        labels
    )
    assert accuracy > 0.55, json.dumps({"accuracy": accuracy})


def test_drop_path_is_the_identity_in_eval_and_unbiased_in_training():
    from cropr_kernels.models.vit import DropPath

    layer, x = DropPath(0.3), torch.ones(20000, 1, 1)
    assert torch.equal(layer.eval()(x), x)
    dropped = layer.train()(x)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cropr.create_vit("resnet50"), "name must be one of vit_tiny_patch16_224"),
        (
            lambda: cropr.create_vit("vit_tiny_patch16_224", widht=3),
            "no such option widht; options are",
        ),
        (lambda: ViT(ViTConfig(class_token=False)), "global_pool='token' needs class_token=True"),
        (
            lambda: ViT(ViTConfig(embed_dim=100, num_heads=3)),
            "embed_dim must be a multiple of num_heads = 3, got 100",
        ),
        (
            lambda: ViT(ViTConfig(**SMALL))(torch.zeros(1, 3, 30, 32)),
            "must be multiples of 8, got \\(30, 32\\)",
        ),
        (
            lambda: ViT(ViTConfig(**SMALL))(torch.zeros(3, 32, 32)),
            r"images must have shape \(B, 3, H, W\)",
        ),
        (
            lambda: ViT(ViTConfig(**SMALL))(torch.zeros(1, 1, 32, 32)),
            r"images must have shape \(B, 3, H, W\)",
        ),
    ],
)
def test_illegal_options_and_images_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_load_weights_finds_the_architecture(tmp_path):
    from safetensors.torch import save_file

    from cropr_kernels.models.factory import load_weights

    model = cropr.create_vit("vit_tiny_patch16_224", num_classes=3).eval()
    save_file(model.state_dict(), tmp_path / "a.safetensors", metadata={"classes": "a b c"})
    torch.save({"model": model.state_dict()}, tmp_path / "b.pth")
    image = torch.randn(1, 3, 224, 224)
    for name in ("a.safetensors", "b.pth"):
        loaded, metadata = load_weights(tmp_path / name)
        assert torch.equal(loaded(image), model(image))
        assert metadata["name"] in ("vit_tiny_patch16_224", "deit_tiny_patch16_224")
