"""Semantic segmentation: a linear decoder over the whole map, one query per patch in every module (paper, section 4.2).

Last Layer Fusion brings the pruned tokens back before the last block.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pruning.model import is_pruned
from .features import patch_features


class PatchLogits(NamedTuple):
    """Logits of all patches (B, patches, classes): the decoder's, and those of the modules."""

    output: Tensor
    aux: list[Tensor]


def pixel_loss(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Mean cross-entropy of logits (B, classes, ...) over the places of target (B, ...) that have a class.

    0 where none has.
    """
    total = F.cross_entropy(logits.float(), target, ignore_index=ignore_index, reduction="sum")
    return total / (target != ignore_index).sum().clamp_min(1)


def patch_labels(target: Tensor, grid: tuple[int, int]) -> Tensor:
    """Label maps (B, H, W) at the centre of every patch of a grid: (B, patches) int64."""
    return F.interpolate(target[:, None].float(), size=grid, mode="nearest-exact")[:, 0].long().flatten(1)


class Segmenter(nn.Module):
    """A backbone without a head, a linear decoder with bilinear upsampling, and their losses.

    Args:
        backbone: pruned by `apply` with llf=True, num_queries = patches and num_outputs = num_classes, or not pruned.
        num_classes: classes of the label maps.
        grid: patches in height and width at the training size.
        ignore_index: label of the pixels that count nowhere.
    """

    def __init__(self, backbone: Any, num_classes: int, *, grid: tuple[int, int], ignore_index: int = 255):
        super().__init__()
        self.backbone, self.grid, self.ignore_index = backbone, grid, ignore_index
        self.head = nn.Linear(backbone.embed_dim, num_classes)

    def logits(self, images: Tensor, *, predict: bool = False) -> PatchLogits:
        """Logits of all patches (B, patches, classes), and with `predict` those of every module."""
        tokens, aux = patch_features(self.backbone, images, predict=predict)
        return PatchLogits(self.head(tokens), aux)

    def aux_loss(self, prediction: Tensor, labels: Tensor) -> Tensor:
        """Loss of an auxiliary prediction (B, patches, classes) against labels (B, patches)."""
        return pixel_loss(prediction.transpose(1, 2), labels, self.ignore_index)

    def to_map(self, logits: Tensor, images: Tensor) -> Tensor:
        """Patch logits (B, patches, classes), bilinear, as a map of the images' size (B, classes, H, W)."""
        sides = self.backbone.patch_embed.patch_size
        grid = images.shape[2] // sides[0], images.shape[3] // sides[1]
        low = logits.transpose(1, 2).unflatten(2, grid).float()
        return F.interpolate(low, size=images.shape[2:], mode="bilinear", align_corners=False)

    def forward(self, images: Tensor, target: Tensor | None = None) -> Any:
        """Losses {"main", "aux"} in training with a target (B, H, W) int64, else logits (B, classes, H, W)."""
        if not self.training or target is None:
            return self.to_map(self.logits(images).output, images)
        logits, aux = self.logits(images, predict=True)
        main = pixel_loss(self.to_map(logits, images), target, self.ignore_index)
        total = main.new_zeros(())
        labels = patch_labels(target, self.grid) if aux else target
        for prediction in aux:
            total = total + self.aux_loss(prediction, labels)
        return {"main": main, "aux": total}

    def predictions(self, images: Tensor) -> list[Tensor]:
        """Label logits (B, patches, classes) of every auxiliary head, in order, and of the decoder last."""
        logits, aux = self.logits(images, predict=is_pruned(self.backbone))
        return [*aux, logits]

    def slide(self, images: Tensor, size: tuple[int, int], stride: tuple[int, int]) -> Tensor:
        """Logits (B, classes, H, W) of images of any size, averaged over windows of the training size.

        Images smaller than a window are padded with zeros.

        Raises:
            ValueError: windows so far apart would leave gaps.
        """
        if not all(1 <= step <= side for step, side in zip(stride, size)):
            raise ValueError(f"Segmenter.slide: stride must be from 1 to the window's size {size}, got {stride}")
        height, width = images.shape[2:]
        padded = F.pad(images, (0, max(size[1] - width, 0), 0, max(size[0] - height, 0)))
        total = padded.new_zeros(len(images), self.head.out_features, *padded.shape[2:], dtype=torch.float32)
        count = total.new_zeros(padded.shape[2:])
        for top in _starts(padded.shape[2], size[0], stride[0]):
            for left in _starts(padded.shape[3], size[1], stride[1]):
                window = ..., slice(top, top + size[0]), slice(left, left + size[1])
                total[window] += self(padded[window])
                count[window] += 1
        return (total / count)[:, :, :height, :width]


def _starts(length: int, size: int, stride: int) -> list[int]:
    """Where windows begin, so that they cover everything and the last one ends at the edge."""
    return [*range(0, max(length - size, 0), stride), length - size]
