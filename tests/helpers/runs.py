"""A dataset and a task that make a training run instant."""

import torch
from torch import nn

import cropr_kernels as cropr


class Broken:
    """A dataset with unreadable samples."""

    def __init__(self, count, broken):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError(f"image file {index} is truncated")
        return torch.full((3, 32, 32), float(index)), index % 2


class Explodes(nn.Module):
    """A task whose loss is NaN at the given calls."""

    def __init__(self, bad):
        super().__init__()
        self.backbone = cropr.create_vit(
            "vit_tiny_patch16_224", depth=2, embed_dim=8, num_heads=1, img_size=32
        )
        self.backbone.requires_grad_(False)
        self.weight, self.bad, self.calls = nn.Parameter(torch.ones(1)), bad, 0

    def forward(self, images, target=None):
        self.calls += 1
        factor = float("nan") if self.calls in self.bad else 1.0
        return {"main": self.weight.sum() * factor * images.mean(), "aux": torch.zeros(())}

    def predictions(self, images):
        return [torch.zeros(len(images), 2)]
