"""What the commands share: arguments, the models they name, where those run."""

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..calibration import load_queries
from ..models.factory import Pixels, create_model, is_transformers_folder, pixels_of
from ..pruning.api import apply, set_rate
from ..pruning.model import is_pruned
from ..pruning.pretrained import from_pretrained, was_pruned
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


def load_model(options: argparse.Namespace, *, pretrained: bool = True) -> Loaded:
    """The model that the arguments name, pruned as they say, at rate 0 if they cannot; a run as it was trained.

    Raises what `create_model`, `rebuild` and `apply` raise, and ValueError where the arguments do not fit the model.
    """
    given, name = vars(options), options.model
    rate, keep, merge = given.get("rate", 0), given.get("keep"), given.get("merge", False)
    if (Path(name) / "config.json").is_file() and not is_transformers_folder(name):
        task, config, _ = rebuild(name)
        if config.task != "classification":
            raise ValueError(f"{name} must be a run of classification, is one of {config.task}")
        model, pixels = task.backbone, Pixels(config.img_size, config.mean, config.std)
    else:
        model = (
            from_pretrained(name, dtype=torch.float32)
            if was_pruned(name)
            else create_model(name, pretrained=pretrained)
        )
        pixels = pixels_of(model, name)
    trained = is_pruned(model)
    if not trained:
        schedule = {"rate": 8 if rate is None else rate} if keep is None else {"keep": keep}
        apply(model, **schedule, llf=options.llf, merge=merge, num_outputs=0)
    elif options.llf or merge or keep is not None:
        raise ValueError(f"{name} says itself how it is pruned: leave out --llf, --merge and --keep")
    elif given.get("rate") is not None:
        set_rate(model, rate)
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
