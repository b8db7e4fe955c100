"""cropr.load restores what cropr.save wrote, bit for bit; damaged or unknown files raise."""

import json
import warnings
from functools import partialmethod

import pytest
import torch
from helpers.models import (
    BLOCK_RUNNERS,
    outputs_of,
    randomize,
    reference_vit,
    timm_eva,
    timm_vit,
    torchvision_vit,
)

import cropr_kernels as cropr
from cropr_kernels.models.architecture import architecture_of
from cropr_kernels.utils import io

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore:.*(Parameter|unauthenticated).*")


def by_name(name="vit_tiny_patch16_224", **options):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model(name, **{"img_size": 64, "num_classes": 5, **options})


FAMILIES = {
    "reference": lambda: reference_vit(rope=True, swiglu=True, qkv="joint_eva", global_pool="avg"),
    "timm": lambda: by_name(depth=4, patch_size=8, drop_path_rate=0.1),
    "timm, average": lambda: by_name(depth=4, patch_size=8, global_pool="avg", class_token=False),
    "timm, Eva": lambda: by_name("eva02_tiny_patch14_224", img_size=112, num_classes=3),
    "torchvision": torchvision_vit,
    "transformers": BLOCK_RUNNERS["ViT"],
}
WAYS = [{"rate": 1, "merge": cropr.Merge(2.0)}, {"ratio": 0.8, "llf": True, "num_queries": 3}]


def images_of(model):
    size = getattr(getattr(model, "patch_embed", None), "img_size", (64, 64))
    return torch.nn.functional.interpolate(IMAGES, size).to(next(model.parameters()).dtype)


@pytest.mark.each_choice
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_bit_for_bit(family, options, dtype, tmp_path):
    model = cropr.apply(randomize(FAMILIES[family]()).to(dtype), **options).eval()
    images = images_of(model)
    for saved in (model, cropr.deploy(model, engine=False)):
        cropr.save(saved, tmp_path / "model")
        other = cropr.load(tmp_path / "model")
        assert (
            type(other) is type(model)
            and other.cropr.config == model.cropr.config
            and not other.training
        )
        # Frozen, as the saved model
        again = other if saved is model else cropr.deploy(other, engine=False)
        assert torch.equal(outputs_of(again(images)), outputs_of(saved(images)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cropr.deploy(other)  # no warning of random queries
        assert {path.name for path in (tmp_path / "model").iterdir()} == {
            "config.json",
            "model.safetensors",
        }
    names = {name for name in model.state_dict() if not name.startswith("cropr.")}
    assert {name for name in other.state_dict() if not name.startswith("cropr.")} == names


def test_preprocessing_of_images_is_saved(tmp_path):
    mine = cropr.Pixels((64, 64), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.9, "bilinear", True)
    model = cropr.apply(reference_vit(), rate=2)
    for pixels, expected in ((None, None), (mine, mine)):
        cropr.save(model, tmp_path, pixels=pixels)
        assert cropr.load(tmp_path).cropr.pixels == expected
    cropr.save(cropr.load(tmp_path), tmp_path)
    assert cropr.load(tmp_path).cropr.pixels == mine
    model = by_name(depth=3)
    cropr.save(cropr.apply(model, rate=1), tmp_path)
    other = cropr.load(tmp_path)
    assert other.cropr.pixels.crop_pct == 0.9 and other.pretrained_cfg == model.pretrained_cfg


@torch.no_grad()
def test_windows_and_half_a_curriculum_are_saved(tmp_path):
    options = dict(rate=1, llf=True, windows=cropr.Windows(4, (1,)), num_queries=16)
    model = cropr.apply(randomize(timm_vit()), **options).eval()
    cropr.set_progress(model, 0.0)
    with pytest.warns(
        UserWarning, match=r"no known constructor makes this timm\.models\.vision_transformer\.Vis"
    ):
        cropr.save(model, tmp_path)
    other = cropr.load(tmp_path, timm_vit())
    assert other.cropr.config == model.cropr.config
    assert torch.equal(other.forward_features(IMAGES), model.forward_features(IMAGES))


@torch.no_grad()
def test_unknown_architectures_load_into_a_model_of_the_caller(tmp_path):
    def make():
        return timm_eva(scale_attn_inner=True)

    model = cropr.calibrate(cropr.apply(make().eval(), rate=4, merge=True), IMAGES)
    with pytest.warns(
        UserWarning, match=r"cropr.load will need a model: cropr.load\(path, model=\.\.\.\)"
    ):
        cropr.save(model, tmp_path)
    with pytest.raises(
        ValueError, match=r"makes the timm.models.eva.Eva in .*; pass a model: cropr.load\("
    ):
        cropr.load(tmp_path)
    for target in (make(), cropr.apply(make(), rate=9, num_outputs=0)):
        other = cropr.load(tmp_path, model=target)
        assert other is target and torch.equal(other(IMAGES), model(IMAGES))
    with pytest.raises(
        ValueError, match=r"does not fit this VisionTransformer: \d+ tensors differ, the first are "
    ):
        cropr.load(tmp_path, model=timm_vit(depth=4))


@torch.no_grad()
def test_custom_modules_load_into_a_model_that_has_them(tmp_path):
    class Mine(cropr.Scorer):
        def __init__(self):
            super().__init__()
            self.vector = torch.nn.Parameter(torch.randn(64))

        def query(self):
            return self.vector.float()

    def make():
        return cropr.apply(reference_vit(), rate=8, make_module=lambda layer, block: Mine()).eval()

    model = make()
    cropr.save(model, tmp_path)
    with pytest.raises(
        ValueError, match="has custom modules: prune a model with the same make_module and pass it"
    ):
        cropr.load(tmp_path)
    assert torch.equal(cropr.load(tmp_path, make())(IMAGES), model(IMAGES))


class Reversed(cropr.Cropr):
    def query(self):
        return -super().query()


@pytest.mark.parametrize(
    "make_module", [lambda *_: Reversed(64), lambda *_: cropr.Cropr(64, 5, mlp_ratio=2.0)]
)
def test_subclassed_and_configured_modules_count_as_custom(make_module, tmp_path):
    model = cropr.apply(randomize(reference_vit()), rate=8, make_module=make_module).eval()
    cropr.save(model, tmp_path)
    with pytest.raises(ValueError, match="prune a model with the same make_module and pass it"):
        cropr.load(tmp_path)
    other = cropr.apply(reference_vit(), rate=8, make_module=make_module).eval()
    assert torch.equal(cropr.load(tmp_path, other)(IMAGES), model(IMAGES))


def test_architectures_with_options_of_no_tensor_are_not_mistaken():
    assert architecture_of(by_name())["options"] == {"num_classes": 5, "img_size": [64, 64]}
    assert architecture_of(by_name(drop_path_rate=0.1, proj_drop_rate=0.1)) is not None
    for options in (dict(act_layer="relu"), dict(norm_layer=torch.nn.Identity), dict(qk_norm=True)):
        assert architecture_of(by_name(**options)) is None
    changed = by_name()
    changed.blocks[0].mlp.act = torch.nn.ReLU()
    assert architecture_of(changed) is None


@pytest.mark.parametrize("family", ["reference", "transformers"])
def test_damaged_files_raise(family, tmp_path):
    cropr.save(cropr.apply(FAMILIES[family](), rate=2, num_outputs=0), tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    intact = weights.read_bytes(), config.read_text()
    (tmp_path / "a.safetensors").write_bytes(intact[0])  # of another model
    for index in (len(intact[0]) // 2, len(intact[0]) - 1):
        weights.write_bytes(
            intact[0][:index] + bytes([intact[0][index] ^ 1]) + intact[0][index + 1 :]
        )
        with pytest.raises(
            ValueError, match=r"is damaged, or not all of it was written: .*; save it again"
        ):
            cropr.load(tmp_path)
    weights.write_bytes(intact[0])
    metadata = json.loads(intact[1])
    metadata["cropr"]["rate"] = 3
    config.write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="is damaged, or not all of it was written"):
        cropr.load(tmp_path)
    config.write_text(intact[1])
    assert cropr.load(tmp_path).cropr.config.schedule.rate == 2


@torch.no_grad()
@pytest.mark.parametrize("shard_size", [None, "50KB"])
@pytest.mark.parametrize("family", ["reference", "transformers"])
def test_other_files_of_tensors_in_the_folder_are_ignored_and_stay(
    family, shard_size, tmp_path, monkeypatch
):
    if shard_size and family == "transformers":
        base = pytest.importorskip("transformers").PreTrainedModel
        monkeypatch.setattr(
            base, "save_pretrained", partialmethod(base.save_pretrained, max_shard_size=shard_size)
        )
    model = cropr.apply(randomize(FAMILIES[family]()), rate=2, num_outputs=0).eval()
    cropr.save_queries(model, tmp_path / "queries.safetensors")
    (tmp_path / "model_old.safetensors").write_bytes(b"not ours")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "queries.safetensors").read_bytes())
    for _ in range(2):
        cropr.save(model, tmp_path)
        files = {path.name for path in tmp_path.iterdir()}
        assert {"queries.safetensors", "model_old.safetensors", "a.safetensors"} < files
        assert ("model.safetensors" in files) != bool(shard_size and family == "transformers")
        assert torch.equal(outputs_of(cropr.load(tmp_path)(IMAGES)), outputs_of(model(IMAGES)))
    monkeypatch.undo()
    cropr.save(model, tmp_path)
    assert not list(tmp_path.glob("model-*")) and torch.equal(
        outputs_of(cropr.load(tmp_path)(IMAGES)), outputs_of(model(IMAGES))
    )


class Wrapping(torch.Tensor):
    """A tensor without storage that holds another, as quantized ones of torchao are."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        result = function(
            *(arg.values if isinstance(arg, cls) else arg for arg in args), **(kwargs or {})
        )
        return cls(result) if function is torch.ops.aten.detach.default else result


@pytest.mark.parametrize("family", ["reference", "transformers"])
@pytest.mark.parametrize(
    "wrap",
    [Wrapping, torch.Tensor.to_sparse, lambda x: torch.empty_like(x, device="meta")],
    ids=["wrapped", "sparse", "meta"],
)
def test_tensors_that_hold_no_values_of_their_own_raise_and_nothing_is_written(
    wrap, family, tmp_path
):
    model = cropr.apply(FAMILIES[family](), rate=2, num_outputs=0)
    name, linear = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ][-1]
    linear.weight = torch.nn.Parameter(wrap(linear.weight.detach()), requires_grad=False)
    with pytest.raises(
        ValueError,
        match=rf"got a quantized or wrapped {name}.weight of type \w+; save the model first",
    ):
        cropr.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_paths_without_a_saved_model_raise(tmp_path):
    with pytest.raises(TypeError, match=r"cropr.save: the model is not pruned"):
        cropr.save(reference_vit(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*; cropr.save writes one"):
        cropr.load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("[]")
    for path in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(
            ValueError, match=r"holds no pruned model; cropr.save writes one into a folder"
        ):
            cropr.load(path)
    with pytest.raises(ValueError, match=r"the path must be a folder, .*config.json is a file"):
        cropr.save(cropr.apply(reference_vit(), rate=2), tmp_path / "config.json")


def test_a_full_disk_raises_and_keeps_the_previous_files(tmp_path, monkeypatch):
    model = cropr.apply(reference_vit(), rate=2, num_outputs=0)
    cropr.save(model, tmp_path)

    def fails(*args, **kwargs):
        raise RuntimeError("unexpected pos 896 vs 854") from None

    usage = type("Usage", (), {"free": 0})
    monkeypatch.setattr(io.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(pytest.importorskip("safetensors.torch"), "save_file", fails)
    queries = tmp_path / "queries.safetensors"
    for call, path in (
        (lambda: cropr.save(model, tmp_path), tmp_path / "model.safetensors"),
        (lambda: cropr.save_queries(model, queries), queries),
    ):
        with pytest.raises(
            OSError, match=rf"{path} cannot be written: No space left on device; fix this or choose"
        ):
            call()
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert cropr.load(tmp_path).cropr.config == model.cropr.config


@torch.no_grad()
def test_states_of_pruned_models_load_into_pruned_and_plain_ones():
    model = cropr.apply(randomize(reference_vit()), rate=4).eval()
    fast = cropr.deploy(model, engine=False)
    for options in ({}, {"num_outputs": 0}):
        other = cropr.apply(reference_vit(), rate=4, **options).eval()
        assert not any(other.load_state_dict(model.state_dict()))
        assert torch.equal(other(IMAGES), model(IMAGES))
    for state in (model.state_dict(), fast.state_dict()):
        other = cropr.deploy(cropr.apply(reference_vit(), rate=4), engine=False)
        assert not any(other.load_state_dict(state)) and torch.equal(other(IMAGES), model(IMAGES))
    other = cropr.apply(reference_vit(), rate=4, num_outputs=0).eval()
    assert not any(other.load_state_dict(fast.state_dict())) and torch.equal(
        other(IMAGES), model(IMAGES)
    )
    plain = reference_vit().eval()
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(name.startswith("cropr.") for name in unexpected)
    with pytest.raises(
        RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"cropr.0.queries\""
    ):
        plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(IMAGES), cropr.set_rate(model, 0)(IMAGES))
