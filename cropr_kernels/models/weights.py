"""Weight files: their content, their architecture, and loading them into a model."""

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..utils.io import load_safetensors, load_tensors
from ..utils.optional import import_optional, is_installed
from .vit import PRESETS, ViT, resize_positions

WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin", ".pth.tar", ".ckpt")
TORCHVISION = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")
# Keys of a state dict
_CONTAINERS = ("model", "state_dict", "model_state_dict", "model_ema", "state_dict_ema")
_PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile and Lightning
_HEADS = ("head.", "heads.", "head_dist.")
# Widths in timm's names
_SIZES = {192: "tiny", 384: "small", 512: "medium", 768: "base", 1024: "large", 1280: "huge"}

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def is_weight_file(name: str | Path) -> bool:
    """Tell whether a name has the ending of a weight file."""
    return str(name).endswith(WEIGHT_FILES)


def read_weights(path: str | Path) -> tuple[State, dict[str, str]]:
    """Read the state dict in a weight file, without prefixes of its names, and its metadata.

    Raises FileNotFoundError, and ValueError if the file cannot be read or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_weights: no weight file at {path}")
    if path.suffix == ".safetensors":
        state, metadata = load_safetensors(path)
    else:
        state = _unwrap(load_tensors(path, classes=[argparse.Namespace, pathlib.PosixPath]), path)
        metadata = {}
    return {_without_prefixes(name): value for name, value in state.items()}, metadata


def _unwrap(checkpoint: object, path: Path) -> State:
    """Return the state dict that a checkpoint is or contains."""
    if isinstance(checkpoint, dict) and {"model", "config", "classes"} <= checkpoint.keys():
        raise ValueError(
            f"load_weights: {path} is a checkpoint of cropr train: choose its folder, {path.parent}"
        )
    state = checkpoint
    while isinstance(state, dict):
        inner = next((state[key] for key in _CONTAINERS if isinstance(state.get(key), dict)), None)
        if inner is None:
            break
        state = inner
    if (
        isinstance(state, dict)
        and state
        and all(isinstance(value, Tensor) for value in state.values())
    ):
        return state
    problem = f"holds {type(state).__name__}"
    if isinstance(state, dict) and state:
        name = next(name for name, value in state.items() if not isinstance(value, Tensor))
        problem = f"{name!r} in it is no tensor"
    raise ValueError(
        f"load_weights: {path} must hold a state dict of tensors, plain or under "
        f"{', '.join(_CONTAINERS)}, {problem}: "
        "write one with torch.save(model.state_dict(), FILE)"
    )


def _without_prefixes(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def split_queries(state: State) -> tuple[State, State]:
    """Separate the tensors of a model from those of its Cropr modules."""
    backbone = {name: value for name, value in state.items() if not name.startswith("cropr.")}
    return backbone, {name: value for name, value in state.items() if name not in backbone}


def num_classes_of(state: State) -> int:
    """The number of classes of the head in a state dict; 0 without one."""
    names = ("head.weight", "heads.head.weight")
    return next((len(state[name]) for name in names if name in state), 0)


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in state.items()}


def without_head(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if not name.startswith(_HEADS)}


def differences(expected: Shapes, shapes: Shapes) -> list[str]:
    """Describe the tensors that an architecture and a file do not share."""
    mismatches = []
    for name in dict.fromkeys([*expected, *shapes]):
        if name not in shapes:
            mismatches.append(f"{name} {expected[name]} is missing")
        elif name not in expected:
            mismatches.append(f"{name} {shapes[name]} is too many")
        elif shapes[name] != expected[name]:
            mismatches.append(f"{name} must be {expected[name]}, is {shapes[name]}")
    return mismatches


def find_architecture(state: State, path: Path, build: Callable[[str], nn.Module]) -> str:
    """Find the preset, or torchvision model, that has exactly these tensors, whatever its head.

    Otherwise ValueError names the nearest architecture, those of timm included, and the first
    tensors that differ.
    """
    shapes = without_head(shapes_of(state))
    candidates: dict[str, Shapes] = {}
    for name in TORCHVISION if "conv_proj.weight" in state else PRESETS:
        candidates[name] = _shapes_on_meta(build, name)
        if candidates[name] == shapes:
            return name
    candidates |= {
        name: _shapes_on_meta(build, name)
        for name in _timm_models_like(state)
        if name not in candidates
    }
    nearest = max(candidates, key=lambda name: _similarity(candidates[name], shapes))
    problem = f"load_weights: {path} has the tensors of no known architecture"
    advice = "name a preset of cropr_kernels, a model of timm or of torchvision with arch= (--arch"
    if not _similarity(candidates[nearest], shapes):
        first = ", ".join(f"{name} {shape}" for name, shape in list(shapes.items())[:3])
        raise ValueError(
            f"{problem}, nor of a similar one: it begins with {first}; if it is a Vision "
            f"Transformer, {advice})"
        )
    mismatches = differences(candidates[nearest], shapes)
    fit = f"which differs in {len(mismatches)} of them: {'; '.join(mismatches[:3])}"
    raise ValueError(
        f"{problem}; the nearest is {nearest}, {fit if mismatches else 'which has the same'}; "
        f"{advice} {nearest})"
    )


def _similarity(a: Shapes, b: Shapes) -> float:
    """The share of the tensors of two architectures that are equal."""
    return len(a.items() & b.items()) / len(a.keys() | b.keys())


def _shapes_on_meta(build: Callable[[str], nn.Module], name: str) -> Shapes:
    with torch.device("meta"):
        return without_head(shapes_of(build(name).state_dict()))


def _timm_models_like(state: State) -> Iterable[str]:
    """List the timm models of the file's width and patch size, if timm is installed: there are
    hundreds of others."""
    patch = state.get("patch_embed.proj.weight")
    if patch is None or patch.ndim != 4 or patch.shape[0] not in _SIZES or not is_installed("timm"):
        return ()
    timm = import_optional("timm", "timm", "naming an architecture")
    names = [
        name for family in ("vision_transformer", "eva") for name in timm.list_models(module=family)
    ]
    return [name for name in names if f"_{_SIZES[patch.shape[0]]}_patch{patch.shape[-1]}_" in name]


def load_state(model: nn.Module, state: State, path: Path, name: str, *, resize: bool) -> None:
    """Load a state dict into a model; with `resize`, positions are resized if the file's image size
    differs.

    A head with another number of classes than the file's is new. ValueError names the tensors that
    differ.
    """
    expected = model.state_dict()
    if not resize:
        _require_positions(expected, state, path, name)
    if isinstance(model, ViT):
        if "pos_embed" in state and state["pos_embed"].shape != expected["pos_embed"].shape:
            state = state | {"pos_embed": _resized(state["pos_embed"], model)}
    elif hasattr(model, "conv_proj"):
        interpolate = import_optional(
            "torchvision.models.vision_transformer", "train", name
        ).interpolate_embeddings
        if "encoder.pos_embedding" in state:
            state = dict(interpolate(model.image_size, model.patch_size, state.copy()))
    elif hasattr(library := sys.modules[type(model).__module__], "checkpoint_filter_fn"):
        # timm's: positions, and names of other authors
        state = library.checkpoint_filter_fn(state, model)
    state = _with_head(state, expected)
    mismatches = differences(shapes_of(expected), shapes_of(state))
    if mismatches:
        raise ValueError(
            f"load_weights: {path} does not fit {name}: {len(mismatches)} of its {len(state)} "
            "tensors differ, the "
            f"first are {'; '.join(mismatches[:3])}; name another architecture with arch= (--arch)"
        )
    model.load_state_dict(state)


def _with_head(state: State, expected: State) -> State:
    """Replace the head of a state dict by a new one, if it is missing or has another number of
    classes."""
    heads = {key for key in expected if key.startswith(_HEADS)}
    if heads & state.keys() and all(
        key not in state or state[key].shape == expected[key].shape for key in heads
    ):
        return state
    for key in heads:  # a new head starts small: the features it reads are not small
        if expected[key].ndim == 2:
            nn.init.trunc_normal_(expected[key], std=0.02)
    backbone = {key: value for key, value in state.items() if not key.startswith(_HEADS)}
    return backbone | {key: expected[key] for key in heads}


def _require_positions(expected: State, state: State, path: Path, name: str) -> None:
    """Raise ValueError if only the number of positions differs, which another image size would
    fix."""
    for key in ("pos_embed", "encoder.pos_embedding"):
        if key in expected and key in state and expected[key].shape[1] != state[key].shape[1]:
            raise ValueError(
                f"load_weights: {path} has {state[key].shape[1]} positions, {name} has "
                f"{expected[key].shape[1]}; "
                "choose the size to run it at with img_size= (--img-size)"
            )


def _resized(table: Tensor, model: ViT) -> Tensor:
    """Resize the position embeddings of a square grid to the model's; those of other grids stay."""
    prefix = model.pos_embed.shape[1] - model.grid**2
    side = round((table.shape[1] - prefix) ** 0.5)
    is_square = table.shape[1] == prefix + side**2
    return (
        resize_positions(table, prefix, (side, side), (model.grid, model.grid))
        if is_square
        else table
    )
