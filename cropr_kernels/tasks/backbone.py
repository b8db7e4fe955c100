"""Types of the networks that tasks are built around."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from ..pruning.model import CroprModules


class PatchEmbed(Protocol):
    """The patch embedding of a backbone."""

    patch_size: tuple[int, int]


class Backbone(nn.Module):
    """The attributes that tasks use of timm's ViTs and of the package's, for type checking only."""

    embed_dim: int
    num_prefix_tokens: int
    patch_embed: PatchEmbed
    blocks: nn.Sequential
    norm: nn.Module
    cropr: CroprModules  # of a pruned backbone
    forward_features: Callable[[Tensor], Tensor]
    set_grad_checkpointing: Callable[[bool], None]


class Task(nn.Module):
    """A backbone with its head and losses.

    task(images, target) returns the losses in training, task(images) predictions in eval mode.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
