"""Checkpoints: written whole or not at all, read with errors that say what is wrong."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.io import atomic_write, load_tensors


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; until it is complete, and where that fails with a RuntimeError, the one before stays."""
    try:
        with atomic_write(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:
        kept = "the one before is still there" if path.exists() else "there is none"
        what = error if isinstance(error, OSError) else f"{path} cannot be written: {error}"
        raise RuntimeError(f"checkpoint: {what}; {kept}") from error


def load(path: Path, *fields: str) -> dict[str, Any]:
    """Read a checkpoint; FileNotFoundError without one, ValueError where it is damaged, lacks a field or holds NaN."""
    state = load_tensors(path)
    held = state if isinstance(state, dict) else {}
    missing = [name for name in ("model", *fields) if name not in held]
    if missing or not isinstance(held["model"], dict):
        raise ValueError(f"checkpoint: {path} holds no {', '.join(missing) or 'model'}")
    refuse_nan(held["model"], path)
    return held


def refuse_nan(weights: dict[str, Any], path: str | Path) -> None:
    """Raise ValueError where a weight is not a number."""
    for name, value in weights.items():
        if isinstance(value, Tensor) and value.isnan().any():
            raise ValueError(f"checkpoint: {path} holds NaN in {name}")


def load_model(model: nn.Module, weights: dict[str, Any], path: Path) -> None:
    """Load weights; ValueError where a name or a shape does not match."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"checkpoint: {path} does not fit this model: {error}") from error


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Whole tensors on the CPU, also where they are sharded. All processes must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict  # nearly a second

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": moments}


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse of state_of; every process has read the whole checkpoint."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    options = StateDictOptions(full_state_dict=True)
    weights, moments = state["model"], state["optimizer"]
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)
