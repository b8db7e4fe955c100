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


def count(text: str) -> int:
    """A number of things, as `type` of an argument."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {text}")
    return int(text)


DTYPES = ("float32", "bfloat16", "float16")
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "model": dict(
        help="a preset of cropr_kernels, a model of timm or torchvision, a weight file, a folder of transformers, or a "
        "run of cropr train"
    ),
    "--queries": dict(type=Path, help="what cropr calibrate wrote; a run of cropr train has its own"),
    "--rate": dict(type=int, help="tokens pruned after each block (default: 8, or that of the run)"),
    "--keep": dict(type=Path, help="a schedule that cropr tune wrote"),
    "--rates": dict(type=int, nargs="+", help="tokens pruned after each block (default: four rates)"),
    "--llf": dict(action="store_true", help="Last Layer Fusion"),
    "--merge": dict(action="store_true", help="merge the pruned tokens into those that are kept"),
    "--mean": dict(type=float, nargs=3, help="of the pixels (default: the model's, or 0.5)"),
    "--std": dict(type=float, nargs=3, help="of the pixels (default: the model's, or 0.5)"),
    "--crop-pct": dict(type=float, help="side of the crop over that of the resized photo (default: the model's)"),
    "--interpolation": dict(choices=("bicubic", "bilinear", "lanczos"), help="default: the model's"),
    "--max-pixels": dict(type=count, help="of a photo; larger ones are not read (default: 178956970)"),
    "--batch": dict(type=count, default=1, help="images at a time (default: %(default)s)"),
    "--rounds": dict(type=count, help="timings of each, the median is used (default: 3 to 9, as many as take 45 s)"),
    "--device": dict(help="default: cuda where there is a GPU, else cpu"),
    "--dtype": dict(choices=DTYPES, help="default: bfloat16 on cuda, else float32"),
    "--quiet": dict(action="store_true", help="no progress"),
}


def add_arguments(parser: Any, *names: str) -> None:
    """Arguments that several commands have."""
    for name in names:
        parser.add_argument(name, **_ARGUMENTS[name])


def add_pixels(parser: Any) -> None:
    """The arguments that say how photos are read."""
    add_arguments(parser, "--mean", "--std", "--crop-pct", "--interpolation", "--max-pixels")


def add_pruning(parser: Any) -> None:
    """The arguments of `load_with_queries`."""
    add_arguments(parser, "model", "--queries", "--llf", "--merge")
    add_pixels(parser)
    schedule = parser.add_mutually_exclusive_group()
    add_arguments(schedule, "--rate", "--keep")


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
