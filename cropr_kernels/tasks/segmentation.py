"""Semantic segmentation: a linear decoder over the full map, one query per patch in every module.

Paper, section 4.2. Last Layer Fusion restores the pruned tokens before the last block.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pruning.model import is_pruned
from .backbone import Backbone, Task
from .features import patch_features


def pixel_loss(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Mean cross-entropy of logits (B, classes, ...) over labeled pixels of target (B, ...), 0 if
    none."""
    total = F.cross_entropy(logits.float(), target, ignore_index=ignore_index, reduction="sum")
    return total / (target != ignore_index).sum().clamp_min(1)


def patch_labels(target: Tensor, grid: tuple[int, int]) -> Tensor:
    """Label maps (B, H, W) at the centre of every patch of a grid: (B, patches) int64."""
    return (
        F.interpolate(target[:, None].float(), size=grid, mode="nearest-exact")[:, 0]
        .long()
        .flatten(1)
    )


class Segmenter(Task):
    """A backbone without a head, a linear decoder with bilinear upsampling, and their losses.

    Args:
        backbone: pruned by `apply` with llf=True, num_queries = patches and num_outputs =
            num_classes, or not pruned.
        num_classes: classes of the label maps.
        grid: patches in height and width at the training size.
        ignore_index: label of ignored pixels.
    """

    backbone: Backbone

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        grid: tuple[int, int],
        ignore_index: int = 255,
    ):
        super().__init__(backbone)
        self.grid = grid
        self.ignore_index = ignore_index
        self.head = nn.Linear(backbone.embed_dim, num_classes)

    def logits(self, images: Tensor, *, predict: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Return logits of all patches (B, patches, classes), and with `predict` those of every
        module."""
        tokens, aux = patch_features(self.backbone, images, predict=predict)
        return self.head(tokens), aux

    def aux_loss(self, prediction: Tensor, labels: Tensor) -> Tensor:
        """Loss of an auxiliary prediction (B, patches, classes) against labels (B, patches)."""
        return pixel_loss(prediction.transpose(1, 2), labels, self.ignore_index)

    def to_map(self, logits: Tensor, images: Tensor) -> Tensor:
        """Upsample patch logits (B, patches, classes) to the images' size, (B, classes, H, W)."""
        patch = self.backbone.patch_embed.patch_size
        grid = images.shape[2] // patch[0], images.shape[3] // patch[1]
        patch_map = logits.transpose(1, 2).unflatten(2, grid).float()
        return F.interpolate(patch_map, size=images.shape[2:], mode="bilinear", align_corners=False)

    def forward(self, images: Tensor, target: Tensor | None = None) -> Any:
        """Return losses {"main", "aux"} in training with a target (B, H, W) int64, else logits (B,
        classes, H, W)."""
        if not self.training or target is None:
            return self.to_map(self.logits(images)[0], images)
        logits, aux = self.logits(images, predict=True)
        main = pixel_loss(self.to_map(logits, images), target, self.ignore_index)
        labels = patch_labels(target, self.grid) if aux else target
        return {
            "main": main,
            "aux": sum(
                (self.aux_loss(prediction, labels) for prediction in aux), main.new_zeros(())
            ),
        }

    def predictions(self, images: Tensor) -> list[Tensor]:
        """Return logits (B, patches, classes) of every auxiliary head, in order, then of the
        decoder."""
        logits, aux = self.logits(images, predict=is_pruned(self.backbone))
        return [*aux, logits]

    def slide(self, images: Tensor, size: tuple[int, int], stride: tuple[int, int]) -> Tensor:
        """Average logits (B, classes, H, W) of images of any size over windows of the training
        size.

        Images smaller than a window are padded with zeros. Raises ValueError for strides that leave
        gaps.
        """
        if not all(1 <= step <= side for step, side in zip(stride, size)):
            raise ValueError(
                f"Segmenter.slide: stride must be from 1 to the window's size {size}, got {stride}"
            )
        height, width = images.shape[2:]
        padded = F.pad(images, (0, max(size[1] - width, 0), 0, max(size[0] - height, 0)))
        total = padded.new_zeros(
            len(images), self.head.out_features, *padded.shape[2:], dtype=torch.float32
        )
        count = total.new_zeros(padded.shape[2:])
        # The last window ends at the edge.
        starts = [
            [*range(0, length - side, step), length - side]
            for length, side, step in zip(padded.shape[2:], size, stride)
        ]
        for top, left in itertools.product(*starts):
            window = ..., slice(top, top + size[0]), slice(left, left + size[1])
            total[window] += self(padded[window])
            count[window] += 1
        return (total / count)[:, :, :height, :width]
