"""The shapes at which ops are measured, and their inputs."""

import torch
from torch import Tensor

from benchmarks.baselines.prune import PREFIX

# (B, N, D) and what it stands for
CPU_SHAPES = {
    (1, 197, 384): "ViT-S/16, 224 px, one image",
    (8, 197, 768): "ViT-B/16, 224 px",
    (32, 197, 1024): "ViT-L/16, 224 px",
    (4, 1025, 1024): "EVA-02-L/16, 512 px",
    (1, 9216, 768): "ViT-B/16, 1536 px, one image",
}
GPU_SHAPES = {
    (1, 197, 1024): "ViT-L/16, 224 px, one image",
    (256, 197, 384): "ViT-S/16, 224 px",
    (256, 197, 1024): "ViT-L/16, 224 px",
    (64, 577, 1024): "ViT-L/16, 384 px",
    (64, 1025, 1024): "EVA-02-L/16, 512 px",
    (8, 9216, 1024): "ViT-L/16, 1536 px",
}


def num_keep(n: int) -> int:
    """The paper's rates, about 4 % a layer: 188 of 197, 984 of 1025."""
    return n - n // 24 - PREFIX


def make_inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=device).to(dtype)
    return x, torch.randn(1, shape[2], generator=generator, device=device).to(dtype)
