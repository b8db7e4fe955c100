"""Loading of the models that commands and predictors name, and their device and dtype."""

import argparse
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..models.factory import create_model, is_transformers_folder, require_pretrained_head
from ..models.pixels import Pixels, pixels_of
from ..pruning.api import apply, set_rate
from ..pruning.fusion import Fusion
from ..pruning.merging import Merge
from ..pruning.model import CroprModules, is_pruned
from ..pruning.saving import load, was_saved
from ..query_files import load_queries, read_queries
from ..schedule import SCHEDULES
from ..train.loop import rebuild
from ..utils.optional import import_optional

_Options = dict[str, Any]  # keyword arguments of apply


def device_and_dtype(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype that the arguments name, or the defaults of this machine."""
    has_cuda = torch.cuda.is_available()
    try:
        device = torch.device(options.device or ("cuda" if has_cuda else "cpu"))
    except RuntimeError as error:
        raise ValueError(
            f"--device must be one of torch, such as cpu, cuda or cuda:1, got {options.device}"
        ) from error
    if device.type == "cuda" and (not has_cuda or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"--device {options.device}: torch finds {torch.cuda.device_count()} GPUs")
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return device, getattr(torch, dtype)


class Loaded(NamedTuple):
    """A pruned model in eval mode, its preprocessing, and whether it was trained pruned."""

    model: Any
    pixels: Pixels
    trained: bool  # a run of cropr train, or saved pruned: it has a schedule and queries
    note: str = ""  # what a file of queries sets


def is_run_folder(name: str | Path) -> bool:
    """Return true if this is the folder of a run of `cropr train`."""
    return (
        (Path(name) / "config.json").is_file()
        and not is_transformers_folder(name)
        and not was_saved(name)
    )


def load_model(
    options: argparse.Namespace, *, pretrained: bool = True, announce: bool = True
) -> Loaded:
    """Load the model that the arguments name, and prune it as they say; a run as it was trained.

    Commands without a rate prune at rate 0; announce: print what a file of queries sets. Raises the
    errors of `create_model`, `rebuild` and `apply`, and ValueError if the arguments do not fit the
    model.
    """
    name = options.model
    values = {key: value for key, value in vars(options).items() if value is not None}
    architecture = {
        key: values[key] for key in ("arch", "img_size", "num_classes") if key in values
    }
    is_run = is_run_folder(name)
    if architecture and (is_run or was_saved(name)):
        raise ValueError(
            f"{name} defines the model: leave out --arch, --img-size and --num-classes"
        )
    if is_run:
        task, config, _ = rebuild(name)
        if config.task != "classification":
            raise ValueError(f"{name} must be a run of classification, got {config.task}")
        model = task.backbone
        pixels = Pixels(config.img_size, config.mean, config.std)
    elif was_saved(name):
        model = load(name).to(torch.float32)
        pixels = model.cropr.pixels or pixels_of(model, name)
    else:
        model = create_model(name, pretrained=pretrained, **architecture)
        if pretrained and "num_classes" in architecture:
            require_pretrained_head(name, model, architecture["num_classes"])
        pixels = pixels_of(model, architecture.get("arch", name))
    trained = is_pruned(model)
    note = ""
    requested = _pruning_options(options)
    if not trained:
        default = {"rate": 8 if "rate" in vars(options) else 0}
        note = _prune(model, requested, default, values.get("queries"))
    elif requested.keys() - {"rate"}:
        raise ValueError(f"{name} defines the pruning: leave out --llf, --merge and --keep")
    elif requested:
        set_rate(model, requested["rate"])
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ValueError(f"{name} has weights that are not finite")
    names = ("mean", "std", "crop_pct", "interpolation")
    pixels = pixels._replace(**{name: values[name] for name in names if values.get(name)})
    if not all(math.isfinite(value) for value in pixels.mean) or not all(
        0 < value < math.inf for value in pixels.std
    ):
        raise ValueError(
            f"--mean must be finite and --std positive, got {pixels.mean}, {pixels.std}"
        )
    if not 0 < pixels.crop_pct <= 1:
        raise ValueError(f"--crop-pct must be in (0, 1], got {pixels.crop_pct}")
    if values.get("max_pixels"):  # Pillow warns from this number on, and raises from twice as many
        import_optional("PIL.Image", "viz", "reading photos").MAX_IMAGE_PIXELS = (
            values["max_pixels"] // 2
        )
    if announce and note and os.environ.get("RANK", "0") == "0":
        print(note)
    return Loaded(model, pixels, trained, note)


def _pruning_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `apply` that the command line sets."""
    names = ("rate", "keep", "llf", "merge")
    values = vars(options)
    return {name: values[name] for name in names if values.get(name) is not None}


def _schedule_of(options: _Options) -> _Options:
    return {name: options[name] for name in SCHEDULES if name in options}


def _prune(model: nn.Module, requested: _Options, default: _Options, queries: Path | None) -> str:
    """Prune a model by the command line, then by the file of queries, then by the default; return
    what the file sets."""
    saved: _Options = {}
    if queries is not None:
        metadata = read_queries(queries)[1]
        saved = {name: metadata[name] for name in SCHEDULES if metadata.get(name) is not None}
        saved["llf"] = Fusion.from_saved(metadata.get("llf")) or False
        merge = metadata.get("merge")
        saved["merge"] = Merge(**merge) if isinstance(merge, dict) else bool(merge)
    schedule = _schedule_of(requested) or _schedule_of(saved) or default
    options = {name: value for name, value in (saved | requested).items() if name not in SCHEDULES}
    options.setdefault("merge", True)  # better than dropping without training
    apply(model, **schedule, **options, num_outputs=0)
    if queries is None:
        return ""
    overrides = f" (as asked: {', '.join(requested)})" if requested else ""
    modules: CroprModules = model.cropr  # type: ignore[assignment]
    return f"pruned as {queries} says: {modules.config}{overrides}"


def load_with_queries(options: argparse.Namespace, *, announce: bool = True) -> Loaded:
    """Load the model of these arguments with its queries; raises ValueError if there are none."""
    loaded = load_model(options, announce=announce)
    if options.queries is not None:
        load_queries(loaded.model, options.queries)
    elif not loaded.trained and options.rate != 0:
        raise ValueError(
            "without queries tokens would be pruned at random: pass --queries FILE, which 'cropr "
            "calibrate "
            "MODEL FOLDER' writes, or --rate 0 for no pruning"
        )
    return loaded
