"""Parameter groups with layer-wise learning rate decay, and the learning rate schedule."""

import math
import re
from typing import Any

from torch import nn

from .config import Config

_NO_DECAY = ("pos_embed", "cls_token", "reg_token", "queries", "q_bias", "v_bias")
_FIRST = tuple(
    f"backbone.{name}" for name in ("patch_embed", "pos_embed", "cls_token", "reg_token")
)


def layer_of(name: str, depth: int) -> int:
    """Layer of a parameter of a task: 0 for the embedding, l + 1 for block l, depth + 1 for all
    that follows."""
    block = re.match(r"backbone\.blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return 0 if name.startswith(_FIRST) else depth + 1


def is_new(name: str) -> bool:
    """Return true for parameters outside the pretrained backbone: Cropr modules, decoders."""
    return not name.startswith("backbone.") or name.startswith("backbone.cropr.")


def param_groups(task: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Group parameters by learning rate, lr * layer_decay ^ (layers above), and weight decay.

    Vectors and embeddings have no weight decay.

    Source: Clark et al. 2020 (ELECTRA) for the decay, as BEiT and MAE use it.
    """
    depth = len(task.backbone.blocks)  # type: ignore[union-attr, arg-type]
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in task.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, depth)
        scale = config.layer_decay ** (depth + 1 - layer)
        if name.startswith("backbone.cropr.") and name.endswith(".queries"):
            scale *= config.query_lr_scale
        elif is_new(name):
            scale *= config.head_lr_scale
        elif layer == depth:
            scale *= config.last_block_lr_scale
        decay = config.weight_decay if parameter.ndim > 1 and not name.endswith(_NO_DECAY) else 0.0
        group = {"params": [], "lr": config.lr * scale, "lr_scale": scale, "weight_decay": decay}
        groups.setdefault((scale, decay), group)["params"].append(parameter)
    return list(groups.values())


def lr_share(config: Config, epoch: float) -> float:
    """Share of the learning rate at this time: linear warm-up, then cosine or polynomial decay."""
    if epoch < config.warmup_epochs:
        return max(epoch / config.warmup_epochs, 1e-3)
    elapsed = min(
        (epoch - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1e-9), 1.0
    )
    if config.lr_schedule == "poly":
        return (1 - elapsed) ** config.poly_power
    return 0.5 * (1 + math.cos(math.pi * elapsed))


def progress(config: Config, epoch: float) -> float:
    """Share of the schedule that is pruned at this time: the curriculum of the paper."""
    return 1.0 if not config.curriculum else min(epoch / (config.curriculum * config.epochs), 1.0)
