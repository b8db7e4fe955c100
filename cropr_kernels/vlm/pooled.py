"""Pruning inside towers whose projector pools s x s patches into one token (InternVL, Idefics3,
SmolVLM, Gemma3): by groups, so that whole tokens go."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..importance import importance
from ..models.blocks import mask_at
from ..pruning.merging import Merge
from ..schedule import Schedule
from .features import VisionLanguageModel
from .groups import SegmentSizes
from .towers import Attention, GroupTower, TowerState


class PooledTower(GroupTower):
    """Pruning inside a tower of tokens (B, N, D), a square of patches after at most one other.

    Args:
        blocks: take tokens, and perhaps attention_mask.
        side: s.
        schedule: counts groups of s x s patches, of each image or tile.
        merge: groups merge into others of their image, instead of being lost.
    """

    def begin(self, arguments: dict[str, Any]) -> TowerState:
        x: Tensor = next(iter(arguments.values()))
        patches, prefix = self._patches(x.shape[1])
        groups = patches // self.side
        order = torch.arange(groups**2)
        state = self.state_of([(1, patches, patches)] * len(x), [order] * len(x))
        # The row of each patch among those of its group, group after group
        cells = torch.arange(patches**2, device=x.device).view(groups, self.side, groups, self.side)
        state.patches = cells.permute(0, 2, 1, 3).flatten()
        state.num_prefix = prefix
        return state

    def _patches(self, num_tokens: int) -> tuple[int, int]:
        """Patches on a side, and tokens before them."""
        patches = math.isqrt(num_tokens)
        prefix = num_tokens - patches**2
        if prefix > 1 or patches % self.side:
            raise ValueError(
                f"cropr: a tower that pools {self.side} x {self.side} patches needs a square of "
                f"them after at most one other token, got {num_tokens} tokens"
            )
        return patches, prefix

    def rows_of(self, state: TowerState, output: Tensor) -> Tensor:
        patches = output[:, state.num_prefix :]
        if state.positions is None:
            patches = patches[:, state.patches]
        return patches.flatten(0, 1)

    def tokens_of(self, state: TowerState, rows: Tensor, output: Tensor) -> Tensor:
        patches = rows.unflatten(0, (len(output), -1))
        if len(rows) == state.num_rows:
            patches = patches[:, state.patches.argsort()]
        return torch.cat([output[:, : state.num_prefix], patches], 1)

    def select(
        self, state: TowerState, arguments: dict[str, Any]
    ) -> tuple[dict[str, Any], SegmentSizes | None]:
        mask = arguments.get("attention_mask")
        num_images = len(state.num_groups)
        if isinstance(mask, Tensor) and state.positions is not None:
            images = state.positions.unflatten(0, (num_images, -1)) % len(state.patches)
            positions = state.num_prefix + state.patches[images]
            prefix = torch.arange(state.num_prefix, device=positions.device)
            positions = torch.cat([prefix.expand(num_images, -1), positions], 1)
            arguments = arguments | {"attention_mask": mask_at(mask, positions)}
        if state.sizes is None:
            return arguments, None
        sizes = state.sizes.repeat_interleave(self.group).unflatten(0, (num_images, -1))
        sizes = torch.cat([sizes.new_ones(num_images, state.num_prefix), sizes], 1)
        return arguments, SegmentSizes(sizes, [sizes.shape[1]])

    def attention_to_rows(self, inputs: Sequence[Attention]) -> Tensor:
        state = self.states.state
        if state is None or len(inputs) != 1:
            return torch.empty(0)
        weights = importance(inputs[0], state.num_prefix, class_token=False)
        return (weights * weights.shape[1])[:, state.patches].flatten()


def pooled_tower(
    model: VisionLanguageModel, schedule: Schedule, merge: Merge | None
) -> PooledTower | None:
    """Prune inside the tower of a model whose projector pools patches; None for any other."""
    side = pooled_side(model.config)
    base = model.base_model
    tower = getattr(base, "vision_tower", None) or getattr(base, "vision_model", None)
    if side is None or not isinstance(tower, nn.Module):
        return None
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            return PooledTower(list(module), side, schedule, merge)
    return None


def pooled_side(config: Any) -> int | None:
    """Patches on a side of those that the projector makes one token; None if it is not known to
    pool."""
    if getattr(config, "downsample_ratio", None):  # InternVL
        return round(1 / config.downsample_ratio)
    if getattr(config, "scale_factor", None):  # Idefics3, SmolVLM
        return int(config.scale_factor)
    if getattr(config, "mm_tokens_per_image", None):  # Gemma3
        patches = config.vision_config.image_size // config.vision_config.patch_size
        return patches // math.isqrt(config.mm_tokens_per_image)
    return None
