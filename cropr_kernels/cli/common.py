"""What the commands share: arguments, the models they name, where those run."""

import argparse
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..calibration import load_queries, read_queries
from ..models.factory import create_model, is_transformers_folder, require_pretrained_head
from ..models.pixels import Pixels, pixels_of
from ..pruning.api import apply, set_rate
from ..pruning.fusion import Fusion
from ..pruning.merging import Merge
from ..pruning.model import is_pruned
from ..pruning.saving import load, was_saved
from ..schedule import SCHEDULES
from ..train.loop import rebuild
from ..utils.optional import need


def place_of(options: argparse.Namespace) -> dict[str, Any]:
    """Device and dtype, as `Tensor.to` takes them."""
    there = torch.cuda.is_available()
    try:
        device = torch.device(options.device or ("cuda" if there else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device must be one of torch, such as cpu, cuda or cuda:1, got {options.device}") from error
    if device.type == "cuda" and (not there or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"--device {options.device}: there are {torch.cuda.device_count()} GPUs in reach of torch")
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return {"device": device, "dtype": getattr(torch, dtype)}


class Loaded(NamedTuple):
    """A pruned model in eval mode, how its images are prepared, and whether it was trained pruned."""

    model: Any
    pixels: Pixels
    trained: bool  # a run of cropr train, or saved pruned: with a schedule and queries of its own


def is_run_folder(name: str | Path) -> bool:
    """Whether there is a folder of a run of `cropr train`."""
    return (Path(name) / "config.json").is_file() and not is_transformers_folder(name) and not was_saved(name)


def load_model(options: argparse.Namespace, *, pretrained: bool = True) -> Loaded:
    """The model that the arguments name, pruned as they say, at rate 0 if they cannot; a run as it was trained.

    Raises what `create_model`, `rebuild` and `apply` raise, and ValueError where the arguments do not fit the model.
    """
    given, name = vars(options), options.model
    made = {key: own for key in ("arch", "img_size", "num_classes") if (own := given.get(key)) is not None}
    is_run = is_run_folder(name)
    if made and (is_run or was_saved(name)):
        raise ValueError(f"{name} says itself what it is: leave out --arch, --img-size and --num-classes")
    if is_run:
        task, config, _ = rebuild(name)
        if config.task != "classification":
            raise ValueError(f"{name} must be a run of classification, is one of {config.task}")
        model, pixels = task.backbone, Pixels(config.img_size, config.mean, config.std)
    elif was_saved(name):
        model = load(name).to(torch.float32)
        pixels = model.cropr.pixels or pixels_of(model, name)
    else:
        model = create_model(name, pretrained=pretrained, **made)
        if pretrained and "num_classes" in made:
            require_pretrained_head(name, model, made["num_classes"])
        pixels = pixels_of(model, made.get("arch", name))
    trained, asked = is_pruned(model), _asked(options)
    if not trained:
        _prune(model, asked, {"rate": 8 if "rate" in given else 0}, given.get("queries"))
    elif asked.keys() - {"rate"}:
        raise ValueError(f"{name} says itself how it is pruned: leave out --llf, --merge and --keep")
    elif asked:
        set_rate(model, asked["rate"])
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ValueError(f"{name} has weights that are not finite")
    own = {part: value for part in ("mean", "std", "crop_pct", "interpolation") if (value := given.get(part))}
    pixels = pixels._replace(**own)
    if not all(math.isfinite(value) for value in pixels.mean) or not all(0 < value < math.inf for value in pixels.std):
        raise ValueError(f"--mean must be finite and --std positive, got {pixels.mean}, {pixels.std}")
    if not 0 < pixels.crop_pct <= 1:
        raise ValueError(f"--crop-pct must be in (0, 1], got {pixels.crop_pct}")
    if given.get("max_pixels"):  # Pillow warns from this number on, and refuses from twice as many
        need("PIL.Image", "viz", "reading photos").MAX_IMAGE_PIXELS = given["max_pixels"] // 2
    return Loaded(model, pixels, trained)


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says about how to prune."""
    names = ("rate", "keep", "llf", "merge")
    return {name: own for name in names if (own := vars(options).get(name)) is not None}


def _prune(model: Any, asked: dict[str, Any], default: dict[str, Any], queries: Path | None) -> None:
    """Prune a model as the command line asks; for what it leaves open as the queries say, or else by the default."""
    how: dict[str, Any] = {}
    if queries is not None:
        about = read_queries(queries)[1]
        how = {name: about[name] for name in SCHEDULES if about.get(name) is not None}
        how["llf"] = Fusion.from_saved(about.get("llf")) or False
        how["merge"] = Merge(**about["merge"]) if isinstance(about.get("merge"), dict) else bool(about.get("merge"))
    schedules = ({name: one[name] for name in SCHEDULES if name in one} for one in (asked, how, default))
    rest = {name: own for name, own in (how | asked).items() if name not in SCHEDULES}
    rest.setdefault("merge", True)  # the better of the two without training
    apply(model, **next(filter(None, schedules)), **rest)
    if queries is not None and os.environ.get("RANK", "0") == "0":
        but = f" (as asked: {', '.join(asked)})" if asked else ""
        print(f"pruned as {queries} says: {model.cropr.config}{but}")


def load_with_queries(options: argparse.Namespace) -> Loaded:
    """The model of these arguments, with queries; ValueError where nothing says what they are."""
    loaded = load_model(options)
    if options.queries is not None:
        load_queries(loaded.model, options.queries)
    elif not loaded.trained and options.rate != 0:
        raise ValueError(
            "without queries tokens would be pruned at random: --queries FILE names what 'cropr calibrate MODEL "
            "FOLDER' writes; --rate 0 prunes nothing"
        )
    return loaded
