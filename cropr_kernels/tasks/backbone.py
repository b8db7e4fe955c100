"""Types of the networks that tasks are built around."""

from typing import Protocol

from torch import Tensor, nn

from ..pruning.model import CroprModules


class PatchEmbed(Protocol):
    """The patch embedding of a backbone."""

    patch_size: tuple[int, int]


class Backbone(nn.Module):
    """The attributes that tasks use, for type checking only: those of timm and of the package's
    ViT."""

    embed_dim: int
    num_prefix_tokens: int
    patch_embed: PatchEmbed
    blocks: nn.Sequential
    norm: nn.Module
    cropr: CroprModules  # of a pruned backbone

    def forward_features(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool) -> None:
        raise NotImplementedError


class Task(nn.Module):
    """A backbone with its head and losses.

    task(images, target) returns the losses in training, task(images) predictions in eval mode.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
