"""Checkpoints: written atomically, and checked when they are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.io import atomic_write, load_tensors


def save(path: Path, state: Mapping[str, object]) -> None:
    """Write a checkpoint; the previous one stays until it is complete, or if RuntimeError is
    raised."""
    try:
        with atomic_write(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:
        previous = "the previous one is kept" if path.exists() else "there is none"
        reason = error if isinstance(error, OSError) else f"{path} cannot be written: {error}"
        raise RuntimeError(f"checkpoint: {reason}; {previous}") from error


def load(path: Path, *fields: str) -> dict[str, Any]:
    """Read a checkpoint.

    Raises FileNotFoundError, or ValueError if it is damaged, lacks a field or holds NaN.
    """
    state = load_tensors(path)
    checkpoint = state if isinstance(state, dict) else {}
    missing = [name for name in ("model", *fields) if name not in checkpoint]
    if missing or not isinstance(checkpoint["model"], dict):
        raise ValueError(f"checkpoint: {path} holds no {', '.join(missing) or 'model'}")
    reject_nan(checkpoint["model"], path)
    return checkpoint


def reject_nan(weights: Mapping[str, object], path: str | Path) -> None:
    """Raise ValueError if a weight is NaN."""
    for name, value in weights.items():
        if isinstance(value, Tensor) and value.isnan().any():
            raise ValueError(f"checkpoint: {path} holds NaN in {name}")


def load_model(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load weights; raises ValueError if a name or a shape does not match."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"checkpoint: {path} does not fit this model: {error}") from error


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return full tensors on the CPU, also of sharded models. All processes must call it."""
    from torch.distributed.checkpoint.state_dict import (  # imported here: nearly a second
        StateDictOptions,
        get_state_dict,
    )

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": moments}


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what state_of returned; every process has read the full checkpoint."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    options = StateDictOptions(full_state_dict=True)
    weights = state["model"]
    moments = state["optimizer"]
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options
    )
