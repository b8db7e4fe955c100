"""Weight files: containers and prefixes, architectures, sizes, and errors."""

import argparse

import pytest
import torch
from helpers.models import torchvision_vit

import cropr_kernels as cropr
from cropr_kernels.models.factory import create_model, load_weights
from cropr_kernels.models.weights import load_state

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def vit():
    return cropr.create_vit(NAME, num_classes=7).eval()


CONTAINERS = {
    "plain": ("a.pth", lambda state: state),
    "timm": (
        "a.pth.tar",
        lambda state: {
            "epoch": 3,
            "arch": "x",
            "state_dict": state,
            "args": argparse.Namespace(a=1),
        },
    ),
    "DeiT": (
        "a.pt",
        lambda state: {
            "model": state,
            "optimizer": {"state": {}},
            "args": argparse.Namespace(lr=0.1),
        },
    ),
    "EMA alone": ("a.bin", lambda state: {"model_ema": state, "epoch": 1}),
    "Lightning": (
        "a.ckpt",
        lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
    ),
    "DataParallel": (
        "a.pth",
        lambda state: {f"module.{key}": value for key, value in state.items()},
    ),
    "DataParallel, compiled": (
        "a.pth",
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    ),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_checkpoints_of_many_trainers_load_as_the_same_model(container, vit, tmp_path):
    name, wrap = CONTAINERS[container]
    torch.save(wrap(vit.state_dict()), tmp_path / name)
    model = create_model(str(tmp_path / name))
    assert model.config == vit.config
    assert all(
        torch.equal(value, vit.state_dict()[key]) for key, value in model.state_dict().items()
    )


@torch.no_grad()
def test_a_timm_architecture_loads_its_weights_at_any_size(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    path, name, images = (
        tmp_path / "weights.pth",
        "vit_tiny_patch16_224.augreg_in21k",
        torch.randn(1, 3, 64, 64),
    )
    model = timm.create_model("vit_tiny_patch16_224", img_size=64).eval()
    torch.save(model.state_dict(), path)
    with pytest.raises(
        ValueError,
        match=r"has 17 positions, vit.* has 197; choose the size to run it at with img_size= "
        r"\(--img-size\)",
    ):
        load_weights(path, arch=name)
    same, metadata = load_weights(path, arch=name, img_size=64)
    assert (
        torch.equal(same(images), model(images))
        and metadata == {"name": name}
        and type(same) is type(model)
    )
    assert load_weights(path, arch=name, img_size=96)[0](torch.randn(1, 3, 96, 96)).shape == (
        1,
        1000,
    )


@torch.no_grad()
def test_position_embeddings_of_torchvision_are_resized(tmp_path):
    small, images = torchvision_vit(), torch.randn(1, 3, 96, 96)
    larger = type(small)(96, 8, 4, 2, 64, 128, num_classes=5)
    state = small.state_dict()
    load_state(larger, state, tmp_path, "vit", resize=True)
    assert larger(images).shape == (1, 5) and torch.equal(
        larger.heads.head.weight, small.heads.head.weight
    )
    assert state["encoder.pos_embedding"].shape == (1, 65, 64)
    with pytest.raises(
        ValueError,
        match=r"has 65 positions, vit has 145; choose the size to run it at with img_size=",
    ):
        load_state(larger, state, tmp_path, "vit", resize=False)


def test_position_embeddings_of_a_preset_are_resized_as_in_its_forward(vit, tmp_path):
    torch.save(vit.state_dict(), tmp_path / "weights.pth")
    larger, images = (
        load_weights(tmp_path / "weights.pth", img_size=96)[0],
        torch.randn(1, 3, 96, 96),
    )
    assert larger.pos_embed.shape == (1, 37, 192) and torch.equal(larger(images), vit(images))


def test_the_state_of_a_pruned_model_loads_without_its_queries_and_warns(vit, tmp_path):
    pruned = cropr.apply(cropr.create_vit(NAME, num_classes=7), rate=8, num_outputs=0)
    torch.save(pruned.state_dict(), tmp_path / "weights.pth")
    with pytest.warns(
        UserWarning, match=r"is of a pruned model, and its queries are left out; cropr.save writes"
    ):
        model, _ = load_weights(tmp_path / "weights.pth")
    assert torch.equal(model.head.weight, pruned.head.weight)


def test_weight_files_that_do_not_fit_are_explained_in_one_sentence(vit, tmp_path):
    with pytest.raises(FileNotFoundError, match="load_weights: no weight file at"):
        load_weights(tmp_path / "missing.safetensors")
    for name in ("a.safetensors", "b.pth", "c.pth.tar"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(
            ValueError, match=rf"{name} cannot be read: .*; copy or download it again$"
        ):
            load_weights(tmp_path / name)
    path, state = tmp_path / "weights.pth", vit.state_dict()
    stem = {"patch_embed.proj.weight": torch.zeros(192, 3, 32, 32)}
    for saved, message in (
        (
            {"weight": torch.zeros(3)},
            r"of no known architecture, nor of a similar one: it begins with weight \(3,\)",
        ),
        (
            [1, 2],
            r"must hold a state dict of tensors, plain or under model, .*, holds list: write one "
            r"with torch.save",
        ),
        ({"state_dict": {}}, "holds dict: write one"),
        ({"model": {"a": torch.zeros(1), "epoch": 3}}, "'epoch' in it is no tensor"),
        (
            vit,
            r"it holds objects of cropr_kernels.models.vit.ViT, and only tensors are read; "
            r"torch.save\(model.state",
        ),
        (
            {"model": {}, "config": {}, "classes": []},
            f"is a checkpoint of cropr train: choose its folder, {tmp_path}",
        ),
        (
            state | stem,
            r"the nearest is vit_tiny_patch\d+_\d+, which differs in \d.*: "
            r"patch_embed.proj.weight must be "
            r"\(192, 3, 16, 16\), is \(192, 3, 32, 32\); name .* with arch= \(--arch vit_tiny",
        ),
    ):
        torch.save(saved, path)
        with pytest.raises(ValueError, match=message):
            load_weights(path)
    torch.save(
        {key: value for key, value in state.items() if "blocks.3." not in key} | {"extra": stem},
        path,
    )
    with pytest.raises(ValueError, match="'extra' in it is no tensor"):
        load_weights(path)
    for arch, message in (
        ("vit_small_patch16_224", r"does not fit vit_small_patch16_224: 150 of its 152 tensors "
            r"differ, "
            r"the "
            r"first "
            r"are "
         r"cls_token must be \(1, 1, 384\), is \(1, 1, 192\); pos_embed must"),
        ("nothing", "a model must be a preset"),
        (str(path), "arch must be a preset of cropr_kernels, a model of timm or of torchvision, "
            "got"),
    ):  # fmt: skip
        torch.save(state, path)
        with pytest.raises(ValueError, match=message):
            load_weights(path, arch=arch)
    with pytest.raises(
        ValueError,
        match=r"arch \(--arch\) names the architecture of a weight file, got 'x' for model",
    ):
        create_model(NAME, arch="x")


def test_a_timm_architecture_that_fits_is_named(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.save(timm.create_model("vit_small_patch32_224").state_dict(), tmp_path / "weights.pth")
    message = (
        r"the nearest is vit_small_patch32_224, which has the same; .* \(--arch "
        r"vit_small_patch32_224\)"
    )
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "weights.pth")
    assert load_weights(tmp_path / "weights.pth", arch="vit_small_patch32_224")[
        0
    ].patch_embed.patch_size == (32, 32)


def test_options_that_a_model_does_not_take_are_named():
    pytest.importorskip("timm", reason="timm is not installed")
    with pytest.raises(ValueError, match=r"model 'resnet18' takes no such option: .*'img_size'"):
        create_model("resnet18", img_size=64)
    with pytest.raises(
        ValueError, match=r"model 'vit_tiny_patch16_224.*' takes no such option: .*'colour'"
    ):
        create_model("vit_tiny_patch16_224.augreg_in21k", colour=1)
    with pytest.raises(TypeError, match=r"^unsupported operand"):  # a known option of another type
        create_model("vit_tiny_patch16_224", depth="four")


def test_load_weights_takes_another_head_and_counts_tensors_that_do_not_fit(tmp_path):
    model = cropr.create_vit("vit_tiny_patch16_224", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded, _ = load_weights(tmp_path / "weights.pt", num_classes=3, drop_path_rate=0.1)
    assert loaded.head.weight.shape == (3, 192) and loaded.blocks[
        -1
    ].drop_path2.drop_prob == pytest.approx(0.1)
    state, loaded_state = model.state_dict(), loaded.state_dict()
    assert all(
        torch.equal(loaded_state[key], state[key]) for key in state if not key.startswith("head.")
    )
    headless, _ = load_weights(tmp_path / "weights.pt", num_classes=0)
    assert headless(torch.randn(1, 3, 224, 224)).shape == (1, 192)
    with pytest.raises(
        ValueError,
        match=r"does not fit vit_tiny_patch16_224: 108 of its 152 tensors differ, .* is too many",
    ):
        load_weights(tmp_path / "weights.pt", depth=3)
