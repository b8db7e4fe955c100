"""Pruned models as folders: weights, queries, pruning options and the preparation of images."""

import contextlib
import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..models.architecture import architecture_of, build, versions_of
from ..models.factory import is_transformers_folder
from ..models.pixels import Pixels, pixels_of
from ..models.weights import differences, shapes_of
from ..utils.io import disk_errors, load_safetensors, publish
from ..utils.optional import import_optional
from .api import apply_options, remove, set_progress
from .model import is_pruned, modules_of, require_pruned
from .options import options_of

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_SHARDS = "model-*-of-*.safetensors"  # that save_pretrained writes of a large model, with an index
_NO_OPTIONS = {"share", "pixels", "versions", "class", "architecture", "sha256"}  # not for `apply`

Metadata = dict[str, Any]  # the entry "cropr" of config.json


def save(model: nn.Module, path: str | Path, *, pixels: Pixels | None = None) -> None:
    """Write a pruned model into a folder: model.safetensors, its weights and queries, and
    config.json, all else.

    config.json holds the schedule, merging, fusion and windows, the preparation of images, the
    architecture, versions and a checksum. A Hugging Face model is written by its save_pretrained,
    with the same in its config.json. Options that only training uses are left out: dropout,
    stochastic depth. A deployed model is loaded undeployed.

    Args:
        model: pruned by `apply`.
        path: a folder, made if it does not exist; other files in it stay, such as those of a
            preprocessor.
        pixels: the preparation of images; default that of `load` or calibrated commands, timm's or
            torchvision's own.

    Raises:
        TypeError: the model is not pruned.
        ValueError: the path is a file, or a tensor of the model is quantized, sparse or wraps
            others.
        OSError: the folder cannot be written.
        ImportError: safetensors is not installed.
    """
    modules = require_pruned(model, "cropr.save")
    state = model.state_dict()
    for name, value in state.items():
        if not _is_plain(value):
            raise ValueError(
                "cropr.save: tensors must be dense and hold their values, got a quantized or "
                f"wrapped {name} of type "
                f"{type(value).__name__}; save the model first, and quantize it after cropr.load"
            )
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"cropr.save: the path must be a folder, {path} is a file")
    pixels = pixels or modules.pixels
    if pixels is None and (getattr(model, "pretrained_cfg", None) or hasattr(model, "conv_proj")):
        pixels = pixels_of(model, "")
    is_transformers = hasattr(getattr(model, "config", None), "save_pretrained")
    architecture = {"library": "transformers"} if is_transformers else architecture_of(model)
    metadata: Metadata = {
        **(options_of(modules) or {}),
        "share": modules.config.schedule.share,
        "pixels": pixels and pixels._asdict(),
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "architecture": architecture,
        "versions": versions_of(architecture),
    }
    if architecture is None:
        warnings.warn(
            f"cropr.save: no known constructor makes this {metadata['class']}; cropr.load will "
            "need a model: "
            "cropr.load(path, model=...)",
            stacklevel=2,
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=".save") as scratch,
        disk_errors(folder / _WEIGHTS),
    ):
        files = Path(scratch)
        config: dict[str, Any] = {}
        if is_transformers:
            cast(Any, model).save_pretrained(files)
            config = json.loads((files / _CONFIG).read_text())
        else:
            write = import_optional("safetensors.torch", "demo", "cropr.save").save_file
            write({name: value.detach().clone() for name, value in state.items()}, files / _WEIGHTS)
        config["cropr"] = metadata | {"sha256": _checksum(files, metadata)}
        (files / _CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        for stale in (folder / _WEIGHTS, folder / f"{_WEIGHTS}.index.json", *folder.glob(_SHARDS)):
            stale.unlink(missing_ok=True)
        # The configuration last
        for file in sorted(files.iterdir(), key=lambda file: file.name == _CONFIG):
            publish(file, folder / file.name)


def _is_plain(value: object) -> bool:
    """Tell whether this is a tensor whose values are in its own memory, one after another or
    strided."""
    if not isinstance(value, Tensor) or value.is_quantized or value.layout != torch.strided:
        return False
    return value.data_ptr() != 0 or value.numel() == 0


def load(path: str | Path, model: nn.Module | None = None) -> Any:
    """Load a pruned model that `save`, or save_pretrained of transformers, wrote, in eval mode,
    with the same bits out.

    `model.cropr.pixels`, if it is known, reads and normalizes photos.

    Args:
        path: the folder.
        model: load into this model, in place; for an architecture without a known constructor. If
            it is pruned already, it is pruned anew with the options in the folder; with modules of
            make_module it must be pruned.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no pruned model or is damaged, or the model does not fit or is missing.
        ImportError: safetensors, or the library of the model, is not installed.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"cropr.load: there is no folder {path}; cropr.save writes one")
    if model is None and is_transformers_folder(folder):
        return from_pretrained(folder)
    if not was_saved(folder):
        raise ValueError(
            f"cropr.load: {path} holds no pruned model; cropr.save writes one into a folder"
        )
    metadata: Metadata = json.loads((folder / _CONFIG).read_text())["cropr"]
    _check(folder, metadata)
    if model is None:
        if metadata["architecture"] is None:
            raise ValueError(
                f"cropr.load: no known constructor makes the {metadata['class']} in {path}; pass "
                "a model: "
                "cropr.load(path, model=...)"
            )
        model = build(metadata["architecture"])
    state = _saved_state(folder)
    device = next(model.parameters()).device
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    _prune(model.to(dtype).eval(), metadata, path)
    try:
        model.load_state_dict(
            {name: value.to(device) for name, value in state.items()}, assign=True
        )
    except RuntimeError as error:
        mismatches = differences(shapes_of(model.state_dict()), shapes_of(state))
        raise ValueError(
            f"cropr.load: {path} does not fit this {type(model).__name__}: {len(mismatches)} "
            "tensors differ, the first "
            f"are {'; '.join(mismatches[:3])}"
        ) from error
    return model.eval()


def from_pretrained(name: str | Path, **options: object) -> Any:
    """Load a pruned model that `save_pretrained` of transformers wrote, with schedule and queries,
    in eval mode.

    The pruned model may be a part of the saved one, such as the vision tower of a LLaVA. A deployed
    model is loaded undeployed.

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
    [class_name] = transformers.AutoConfig.from_pretrained(folder).architectures
    with _ignoring_queries(getattr(transformers, class_name)) as model_class:
        model = model_class.from_pretrained(folder, **options)
    pruned = next((module for module in model.modules() if _saved_metadata(module)), None)
    if pruned is None:
        raise ValueError(f"cropr.from_pretrained: nothing in {name} was pruned when it was saved")
    metadata = {**_saved_metadata(pruned)}
    _check(folder, metadata)
    _prune(pruned, metadata, name)
    queries = {
        key.partition("cropr.")[2]: value for key, value in _saved_state(folder, "cropr.").items()
    }
    modules_of(pruned).load_state_dict(queries, assign="dtype" not in options)
    return model.eval()


def _saved_metadata(module: nn.Module) -> Metadata:
    """Return the metadata in a Hugging Face configuration; empty if the model was not pruned."""
    return getattr(getattr(module, "config", None), "cropr", None) or {}


@contextlib.contextmanager
def _ignoring_queries(model_class: Any) -> Iterator[Any]:
    """Keep a class of transformers from reporting the tensors of Cropr modules as unexpected."""
    ignored = model_class._keys_to_ignore_on_load_unexpected
    model_class._keys_to_ignore_on_load_unexpected = [*(ignored or ()), r"(^|\.)cropr\."]
    try:
        yield model_class
    finally:
        model_class._keys_to_ignore_on_load_unexpected = ignored


def was_saved(name: str | Path) -> bool:
    """Tell whether this is a folder of a model that was pruned when it was saved."""
    try:
        return isinstance(json.loads((Path(name) / _CONFIG).read_text())["cropr"], dict)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _prune(model: nn.Module, metadata: Metadata, path: str | Path) -> None:
    """Prune a model with the options in a folder."""
    options = {name: value for name, value in metadata.items() if name not in _NO_OPTIONS}
    if options:
        apply_options(remove(model) if is_pruned(model) else model, options)
    elif not is_pruned(model):
        raise ValueError(
            f"cropr.load: the model in {path} has custom modules: prune a model with the same "
            "make_module and pass "
            "it: cropr.load(path, model=...)"
        )
    set_progress(model, metadata.get("share", 1.0))
    modules_of(model).pixels = Pixels.of(metadata["pixels"]) if metadata.get("pixels") else None


def _weight_files(folder: Path) -> list[Path]:
    """List the files of weights that `save` or save_pretrained wrote into a folder; others may be
    there."""
    return [*folder.glob(_WEIGHTS)] or sorted(folder.glob(_SHARDS))


def _saved_state(folder: Path, name_part: str = "") -> dict[str, Tensor]:
    """Read the tensors in a folder whose names contain `name_part`.

    They are copied, as those of a file are not aligned, for which kernels round in another way.
    """
    state: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        tensors, _ = load_safetensors(path, name_part)
        state |= {name: value.clone() for name, value in tensors.items()}
    return state


def _check(folder: Path, metadata: Metadata) -> None:
    """Raise ValueError if a folder is not as `save` wrote it; save_pretrained alone writes no
    checksum."""
    content = dict(metadata)
    checksum = content.pop("sha256", None)
    if checksum is not None and checksum != _checksum(folder, content):
        raise ValueError(
            f"cropr.load: {folder} is damaged, or not all of it was written: its checksum does "
            "not match; save it again"
        )


def _checksum(folder: Path, metadata: Metadata) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for path in _weight_files(folder):
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
