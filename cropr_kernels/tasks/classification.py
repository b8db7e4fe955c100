"""Image classification: one query per module, whose auxiliary head predicts the image's label
(paper section 4.1)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..models.outputs import outputs_of
from ..pruning.model import is_pruned, run
from ..pruning.predictions import mean_over_queries
from ..pruning.state import PruningOptions
from .backbone import Task


class Classifier(Task):
    """An image classifier and its losses.

    Args:
        backbone: an image classifier with logits (B, classes), also of Hugging Face; pruned by
            `apply` or not.
        smoothing: label smoothing in [0, 1), of all targets.
    """

    def __init__(self, backbone: nn.Module, smoothing: float = 0.0):
        super().__init__(backbone)
        if not 0 <= smoothing < 1:
            raise ValueError(f"Classifier: smoothing must be in [0, 1), got {smoothing}")
        self.smoothing = smoothing

    def criterion(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of logits (B, classes) with labels (B,), or with probabilities (B, classes)
        (mixup, cutmix)."""
        return F.cross_entropy(logits.float(), target, label_smoothing=self.smoothing)

    def forward(self, images: Tensor, target: Tensor | None = None) -> Any:
        """Return losses {"main", "aux"} in training with a target, else logits (B, classes)."""
        if not self.training or target is None:
            return self.backbone(images)
        *aux, output = self.predictions(images)
        main = self.criterion(output, target)
        aux_losses = [self.criterion(prediction, target) for prediction in aux]
        return {"main": main, "aux": sum(aux_losses, main.new_zeros(()))}

    def predictions(self, images: Tensor) -> list[Tensor]:
        """Return logits (B, classes) of every auxiliary head, in order, then of the output."""
        if not is_pruned(self.backbone):
            return [outputs_of(self.backbone(images))]
        output, state = run(
            self.backbone, lambda: self.backbone(images), PruningOptions(predict=True)
        )
        return [*map(mean_over_queries, state.aux), outputs_of(output)]
