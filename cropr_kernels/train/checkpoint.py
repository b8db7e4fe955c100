"""Checkpoints: written whole or not at all, read with errors that say what is wrong."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from ..utils.io import atomic_write, load_tensors


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; until it is complete, and where that fails with a RuntimeError, the one before stays."""
    try:
        with atomic_write(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:
        kept = "the one before is still there" if path.exists() else "there is none"
        raise RuntimeError(f"checkpoint: cannot write {path}: {error}; {kept}") from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint. Raises FileNotFoundError where there is none, ValueError where the file is none."""
    state = load_tensors(path)
    if not isinstance(state, dict) or "model" not in state:
        raise ValueError(f"checkpoint: {path} holds no model")
    return state


def load_model(model: nn.Module, weights: dict[str, Any], path: Path) -> None:
    """Load weights; ValueError where a name or a shape does not match."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"checkpoint: {path} does not fit this model: {error}") from error


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Whole tensors on the CPU, also where they are sharded. All processes must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": moments}


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse of state_of; every process has read the whole checkpoint."""
    options = StateDictOptions(full_state_dict=True)
    weights, moments = state["model"], state["optimizer"]
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)
