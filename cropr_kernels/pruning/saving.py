"""Pruned models as folders: weights, queries, how tokens are pruned and how images are prepared, and back."""

import contextlib
import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..models.architecture import architecture_of, build, versions_of
from ..models.factory import is_transformers_folder
from ..models.pixels import Pixels, pixels_of
from ..models.weights import differences, shapes_of
from ..utils.io import disk_errors, load_safetensors, publish
from ..utils.optional import import_optional
from .api import apply_options, options_of, remove, set_progress
from .model import is_pruned, require_pruned

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_NO_OPTIONS = {"share", "pixels", "versions", "class", "architecture", "sha256"}  # what `apply` does not take


def save(model: Any, path: str | Path, *, pixels: Pixels | None = None) -> None:
    """Write a pruned model into a folder: model.safetensors, its weights and queries, and config.json, all else.

    That is the schedule, merging, fusion and windows, how images are prepared, what makes the model, versions and a
    checksum. A model of transformers is written by its save_pretrained, into whose config.json the same goes. What only
    training uses is left out: dropout, stochastic depth. A deployed model comes back not deployed.

    Args:
        model: pruned by `apply`.
        path: a folder, made if it is not there; other files in it stay, such as those of a preprocessor.
        pixels: how images are prepared; default what `load` or calibrated commands knew, timm's or torchvision's own.

    Raises:
        TypeError: the model is not pruned.
        ValueError: the path is a file.
        OSError: the folder cannot be written.
        ImportError: safetensors is not installed.
    """
    stack, folder = require_pruned(model, "cropr.save"), Path(path)
    if folder.is_file():
        raise ValueError(f"cropr.save: the path must be a folder, {path} is a file")
    pixels = pixels or stack.pixels
    if pixels is None and (getattr(model, "pretrained_cfg", None) or hasattr(model, "conv_proj")):
        pixels = pixels_of(model, "")
    transformers = hasattr(getattr(model, "config", None), "save_pretrained")
    made = {"library": "transformers"} if transformers else architecture_of(model)
    about = {
        **(options_of(stack) or {}),
        "share": stack.config.schedule.share,
        "pixels": pixels and pixels._asdict(),
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "architecture": made,
        "versions": versions_of(made),
    }
    if made is None:
        what = f"nothing that can be named makes this {about['class']}"
        warnings.warn(f"cropr.save: {what}; cropr.load will need one: cropr.load(path, model=...)", stacklevel=2)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".save") as scratch, disk_errors(folder / _WEIGHTS):
        parts, config = Path(scratch), dict[str, Any]()
        if transformers:
            model.save_pretrained(parts)
            config = json.loads((parts / _CONFIG).read_text())
        else:
            write = import_optional("safetensors.torch", "demo", "cropr.save").save_file
            write({name: value.detach().clone() for name, value in model.state_dict().items()}, parts / _WEIGHTS)
        config["cropr"] = about | {"sha256": _checksum(parts, about)}
        (parts / _CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        for old in folder.glob("model*.safetensors*"):  # such as the parts of a larger model
            old.unlink()
        for part in sorted(parts.iterdir(), key=lambda part: part.name == _CONFIG):  # the configuration last
            publish(part, folder / part.name)


def load(path: str | Path, model: Any = None) -> Any:
    """A pruned model as `save`, or save_pretrained of transformers, wrote it, in eval mode; outputs are the same bits.

    `model.cropr.pixels`, where it is known, reads and normalises photos.

    Args:
        path: the folder.
        model: put it into this one, in place, where nothing that can be named makes one. If it is pruned already, it is
            pruned anew as the folder says; with modules of its own (make_module) it must be.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no pruned model or is damaged, or the model does not fit or must be given.
        ImportError: safetensors, or the library of the model, is not installed.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"cropr.load: there is no folder {path}; cropr.save writes one")
    if model is None and is_transformers_folder(folder):
        return from_pretrained(folder)
    if not was_saved(folder):
        raise ValueError(f"cropr.load: {path} holds no pruned model; cropr.save writes one into a folder")
    about = json.loads((folder / _CONFIG).read_text())["cropr"]
    _check(folder, about)
    if model is None and about["architecture"] is None:
        what = f"nothing that can be named makes the {about['class']} in {path}"
        raise ValueError(f"cropr.load: {what}; make one and give it: cropr.load(path, model=...)")
    model, state = build(about["architecture"]) if model is None else model, _saved_state(folder)
    device, dtype = (
        next(model.parameters()).device,
        next(one.dtype for one in state.values() if one.is_floating_point()),
    )
    _prune(model.to(dtype).eval(), about, path)
    try:
        model.load_state_dict({name: value.to(device) for name, value in state.items()}, assign=True)
    except RuntimeError as error:
        odd = differences(shapes_of(model.state_dict()), shapes_of(state))
        what = f"does not fit this {type(model).__name__}: {len(odd)} tensors differ"
        raise ValueError(f"cropr.load: {path} {what}, the first are {'; '.join(odd[:3])}") from error
    return model.eval()


def from_pretrained(name: str | Path, **options: Any) -> Any:
    """A pruned model as `save_pretrained` of transformers wrote it: weights, schedule and queries, in eval mode.

    What was pruned may be a part of what was saved, such as the vision tower of a LLaVA. A deployed model comes back
    not deployed.

    Args:
        name: a folder, or a model of the Hub.
        options: of from_pretrained of the model's class, such as dtype.

    Raises:
        ValueError: nothing in it was pruned when it was saved, or it is damaged.
        ImportError: transformers is not installed.
    """
    transformers = import_optional("transformers", "transformers", "cropr.from_pretrained")
    folder = Path(name)
    if not folder.is_dir():
        hub = import_optional("transformers.utils.hub", "transformers", "cropr.from_pretrained")
        folder = Path(hub.snapshot_download(str(name)))
    [kind] = transformers.AutoConfig.from_pretrained(folder).architectures
    with _knows_queries(getattr(transformers, kind)) as family:
        model = family.from_pretrained(folder, **options)
    parts = (part for part in model.modules() if getattr(getattr(part, "config", None), "cropr", None))
    part: Any = next(parts, None)
    if part is None:
        raise ValueError(f"cropr.from_pretrained: nothing in {name} was pruned when it was saved")
    about = {**part.config.cropr}
    _check(folder, about)
    _prune(part, about, name)
    own = {key.partition("cropr.")[2]: value for key, value in _saved_state(folder, "cropr.").items()}
    part.cropr.load_state_dict(own, assign="dtype" not in options)
    return model.eval()


@contextlib.contextmanager
def _knows_queries(family: Any) -> Iterator[Any]:
    """A class of transformers that does not report the tensors of Cropr modules as unexpected."""
    before = family._keys_to_ignore_on_load_unexpected
    family._keys_to_ignore_on_load_unexpected = [*(before or ()), r"(^|\.)cropr\."]
    try:
        yield family
    finally:
        family._keys_to_ignore_on_load_unexpected = before


def was_saved(name: str | Path) -> bool:
    """Whether there is a folder of a model that was pruned when it was saved."""
    try:
        return isinstance(json.loads((Path(name) / _CONFIG).read_text())["cropr"], dict)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _prune(model: Any, about: dict[str, Any], path: str | Path) -> None:
    """Prune a model as a folder says."""
    options = {name: value for name, value in about.items() if name not in _NO_OPTIONS}
    if options:
        apply_options(remove(model) if is_pruned(model) else model, options)
    elif not is_pruned(model):
        what = "modules of its own: prune a model with the same make_module and give it"
        raise ValueError(f"cropr.load: the model in {path} has {what}: cropr.load(path, model=...)")
    set_progress(model, about.get("share", 1.0))
    model.cropr.pixels = Pixels.of(about["pixels"]) if about.get("pixels") else None


def _saved_state(folder: Path, part: str = "") -> dict[str, Tensor]:
    """The tensors in a folder, of those with `part` in their names; copies, as those of a file are not aligned.

    Kernels round in another way where they are not.
    """
    files = (load_safetensors(path, part)[0] for path in sorted(folder.glob("*.safetensors")))
    return {name: value.clone() for tensors in files for name, value in tensors.items()}


def _check(folder: Path, about: dict[str, Any]) -> None:
    """Raise ValueError where a folder is not as `save` wrote it; save_pretrained alone writes no checksum."""
    written = about.get("sha256")
    if written is not None and written != _checksum(folder, {k: v for k, v in about.items() if k != "sha256"}):
        raise ValueError(
            f"cropr.load: {folder} is damaged, or not all of it was written: its checksum does not match; save it again"
        )


def _checksum(folder: Path, about: dict[str, Any]) -> str:
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                found.update(chunk)
    return found.hexdigest()
