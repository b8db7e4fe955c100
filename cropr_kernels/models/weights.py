"""Load a local weight file into the reference ViT: the architecture is read off the tensors' shapes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .vit import PRESETS, ViT, create_vit


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise ImportError("load_weights: .safetensors files need safetensors: pip install safetensors") from error
        try:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"load_weights: {path} is not a readable safetensors file: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler meets
        raise ValueError(f"load_weights: {path} is not a readable PyTorch checkpoint: {error}") from error
    for key in ("model", "state_dict", "model_ema"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"load_weights: {path} must hold a state dict of tensors")
    return state, {}


def _match(state: dict[str, Tensor]) -> tuple[str, int]:
    """The preset whose parameters have these names and shapes, and the number of classes."""
    shapes = {name: tensor.shape for name, tensor in state.items() if not name.startswith("head.")}
    head = state.get("head.weight")
    classes = 0 if head is None else head.shape[0]
    for name in PRESETS:
        with torch.device("meta"):
            candidate = create_vit(name, num_classes=classes).state_dict()
        if {key: value.shape for key, value in candidate.items() if not key.startswith("head.")} == shapes:
            return name, classes
    raise ValueError(f"load_weights: no architecture has these {len(state)} tensors; known are {', '.join(PRESETS)}")


def load_weights(path: str | Path, **overrides: Any) -> tuple[ViT, dict[str, str]]:
    """Build the reference ViT that a weight file was made for, and load it.

    Args:
        path: a .safetensors file, or a PyTorch state dict (timm's names).
        overrides: fields of ``ViTConfig`` to change. With another num_classes the head is a new one.

    Returns:
        The model in eval mode, float32, and the file's metadata (empty for PyTorch files).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or no known architecture has its tensors.
        ImportError: the file is .safetensors and safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_weights: no weight file at {path}")
    state, metadata = _read(path)
    name, classes = _match(state)
    model = create_vit(name, **{"num_classes": classes, **overrides})
    if model.num_classes != classes:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
        if model.num_classes:  # a new head starts small: the features it reads are not small
            torch.nn.init.trunc_normal_(model.get_parameter("head.weight"), std=0.02)
        state |= {key: value for key, value in model.state_dict().items() if key.startswith("head.")}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"load_weights: {path} does not fit {name} with {overrides}: {error}") from error
    return model.eval(), {"name": name, **metadata}
