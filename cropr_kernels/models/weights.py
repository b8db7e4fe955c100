"""Weight files: what is in them, which architecture they are of, and how a model takes them."""

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.io import load_safetensors, load_tensors
from ..utils.optional import import_optional, is_installed
from .vit import PRESETS, ViT, resize_positions

WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin", ".pth.tar", ".ckpt")
TORCHVISION = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")
_CONTAINERS = ("model", "state_dict", "model_state_dict", "model_ema", "state_dict_ema")  # what holds a state dict
_PREFIXES = ("module.", "_orig_mod.", "model.")  # what DataParallel, torch.compile and Lightning put before names
_HEADS = ("head.", "heads.", "head_dist.")
_SIZES = {192: "tiny", 384: "small", 512: "medium", 768: "base", 1024: "large", 1280: "huge"}  # widths in timm's names

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def is_weight_file(name: str | Path) -> bool:
    """Whether a name ends as weight files do."""
    return str(name).endswith(WEIGHT_FILES)


def read_weights(path: str | Path) -> tuple[State, dict[str, str]]:
    """The state dict in a weight file with plain names, and its metadata.

    Raises FileNotFoundError, and ValueError where the file cannot be read or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_weights: no weight file at {path}")
    if path.suffix == ".safetensors":
        state, metadata = load_safetensors(path)
    else:
        state, metadata = _unwrap(load_tensors(path, classes=[argparse.Namespace, pathlib.PosixPath]), path), {}
    return {_plain(name): value for name, value in state.items()}, metadata


def _unwrap(found: Any, path: Path) -> State:
    if isinstance(found, dict) and {"model", "config", "classes"} <= found.keys():
        raise ValueError(f"load_weights: {path} is a checkpoint of cropr train: give its folder, {path.parent}")
    while isinstance(found, dict):
        inner = next((found[key] for key in _CONTAINERS if isinstance(found.get(key), dict)), None)
        if inner is None:
            break
        found = inner
    odd = [name for name, value in found.items() if not isinstance(value, Tensor)] if isinstance(found, dict) else []
    if not isinstance(found, dict) or not found or odd:
        what = f"{odd[0]!r} in it is no tensor" if odd else f"holds {type(found).__name__}"
        raise ValueError(
            f"load_weights: {path} must hold a state dict of tensors, plain or under {', '.join(_CONTAINERS)}, {what}: "
            "write one with torch.save(model.state_dict(), FILE)"
        )
    return found


def _plain(name: str) -> str:
    while prefix := next((one for one in _PREFIXES if name.startswith(one)), ""):
        name = name.removeprefix(prefix)
    return name


def split_queries(state: State) -> tuple[State, State]:
    """The tensors of a model, and those of the Cropr modules that were in it."""
    own = {name: value for name, value in state.items() if not name.startswith("cropr.")}
    return own, {name: value for name, value in state.items() if name not in own}


def num_classes_of(state: State) -> int:
    """How many classes the head of a state dict tells apart; 0 without one."""
    names = ("head.weight", "heads.head.weight")
    return next((len(state[name]) for name in names if name in state), 0)


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in state.items()}


def without_head(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if not name.startswith(_HEADS)}


def differences(wanted: Shapes, got: Shapes) -> list[str]:
    """Tensors that an architecture and a file do not share, as text."""
    found = []
    for name in [*wanted, *(name for name in got if name not in wanted)]:
        if name not in got:
            found.append(f"{name} {wanted[name]} is missing")
        elif name not in wanted:
            found.append(f"{name} {got[name]} is too many")
        elif got[name] != wanted[name]:
            found.append(f"{name} must be {wanted[name]}, is {got[name]}")
    return found


def find_architecture(state: State, path: Path, build: Callable[[str], Any]) -> str:
    """The preset, or model of torchvision, that has exactly these tensors, whatever its head.

    ValueError names the nearest architecture, those of timm included, and the first tensors that differ.
    """
    got, seen = without_head(shapes_of(state)), dict[str, Shapes]()
    for name in TORCHVISION if "conv_proj.weight" in state else PRESETS:
        seen[name] = _shapes_on_meta(build, name)
        if seen[name] == got:
            return name
    seen |= {name: _shapes_on_meta(build, name) for name in _of_timm(state) if name not in seen}
    nearest = max(seen, key=lambda name: len(seen[name].items() & got.items()) / len(seen[name].keys() | got.keys()))
    odd, how = differences(seen[nearest], got), "name a preset of cropr_kernels, a model of timm or of torchvision"
    what = f"load_weights: {path} has the tensors of no architecture that can be told from them"
    if not seen[nearest].items() & got.items():
        first = ", ".join(f"{name} {shape}" for name, shape in list(got.items())[:3])
        what += f", nor of any like them: it begins with {first}; if it is a Vision Transformer"
        raise ValueError(f"{what}, {how} with arch= (--arch)")
    fits = f"which differs in {len(odd)} of them: {'; '.join(odd[:3])}" if odd else "which has the same"
    raise ValueError(f"{what}; the nearest is {nearest}, {fits}; {how} with arch= (--arch {nearest})")


def _shapes_on_meta(build: Callable[[str], Any], name: str) -> Shapes:
    with torch.device("meta"):
        return without_head(shapes_of(build(name).state_dict()))


def _of_timm(state: State) -> Iterable[str]:
    """Models of timm of the file's width and patch size, if timm is there: there are hundreds of others."""
    patch = state.get("patch_embed.proj.weight")
    if patch is None or patch.ndim != 4 or patch.shape[0] not in _SIZES or not is_installed("timm"):
        return ()
    timm = import_optional("timm", "timm", "naming an architecture")
    names = [name for family in ("vision_transformer", "eva") for name in timm.list_models(module=family)]
    return [name for name in names if f"_{_SIZES[patch.shape[0]]}_patch{patch.shape[-1]}_" in name]


def load_state(model: Any, state: State, path: Path, name: str, *, resize: bool) -> None:
    """Load a state dict into a model named so; with `resize` positions follow another image size than the file's.

    A head with another number of classes than the file's is a new one. ValueError says which tensors differ.
    """
    own = model.state_dict()
    if not resize:
        _require_positions(own, state, path, name)
    if isinstance(model, ViT):
        if "pos_embed" in state and state["pos_embed"].shape != own["pos_embed"].shape:
            state = state | {"pos_embed": _resized(state["pos_embed"], model)}
    elif hasattr(model, "conv_proj"):
        interpolate = import_optional("torchvision.models.vision_transformer", "train", name).interpolate_embeddings
        if "encoder.pos_embedding" in state:
            state = dict(interpolate(model.image_size, model.patch_size, state.copy()))
    elif hasattr(module := sys.modules[type(model).__module__], "checkpoint_filter_fn"):
        state = module.checkpoint_filter_fn(state, model)  # timm's: positions, and names of other authors
    heads = {key for key in own if key.startswith(_HEADS)}
    if any(key in state and state[key].shape != own[key].shape for key in heads) or not heads & state.keys():
        state = {key: value for key, value in state.items() if not key.startswith(_HEADS)}
        for key in heads:  # a new head starts small: the features it reads are not small
            if own[key].ndim == 2:
                torch.nn.init.trunc_normal_(own[key], std=0.02)
        state |= {key: own[key] for key in heads}
    odd = differences(shapes_of(own), shapes_of(state))
    if odd:
        raise ValueError(
            f"load_weights: {path} does not fit {name}: {len(odd)} of its {len(state)} tensors differ, the first are "
            f"{'; '.join(odd[:3])}; name another with arch= (--arch)"
        )
    model.load_state_dict(state)


def _require_positions(own: State, state: State, path: Path, name: str) -> None:
    """ValueError where only the number of positions differs, which another image size would mend."""
    for key in ("pos_embed", "encoder.pos_embedding"):
        if key in own and key in state and own[key].shape[1] != state[key].shape[1]:
            raise ValueError(
                f"load_weights: {path} has {state[key].shape[1]} positions, {name} has {own[key].shape[1]}; say with "
                "img_size= (--img-size) at which size to run it"
            )


def _resized(table: Tensor, model: ViT) -> Tensor:
    """Position embeddings of a square grid as a model takes them; those of no square as they are."""
    prefix = model.pos_embed.shape[1] - model.grid**2
    side = round((table.shape[1] - prefix) ** 0.5)
    same = table.shape[1] == prefix + side**2
    return resize_positions(table, prefix, (side, side), (model.grid, model.grid)) if same else table
