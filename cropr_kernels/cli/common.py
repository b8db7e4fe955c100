"""What the commands share: arguments, the models they name, where those run."""

import argparse
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..calibration import load_queries, read_queries
from ..models.factory import create_model, is_transformers_folder, require_own_head
from ..models.pixels import Pixels, pixels_of
from ..pruning.api import apply, set_rate
from ..pruning.merging import Merge
from ..pruning.model import is_pruned
from ..pruning.saving import load, was_saved
from ..schedule import SCHEDULES
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
        help="a preset of cropr_kernels, a model of timm or torchvision, a weight file, or a folder of transformers, "
        "cropr.save or cropr train"
    ),
    "--arch": dict(help="of a weight file: a preset, or a model of timm or torchvision (default: by its tensors)"),
    "--img-size": dict(type=count, help="side of the images in pixels (default: the model's)"),
    "--num-classes": dict(type=int, help="0: features in place of classes (default: the model's)"),
    "--queries": dict(
        type=Path, help="what cropr calibrate wrote; it also says rate, merge and llf where no option does"
    ),
    "--rate": dict(type=int, help="tokens pruned after each block (default: that of the queries or the model, or 8)"),
    "--keep": dict(type=Path, help="a schedule that cropr tune wrote"),
    "--rates": dict(type=int, nargs="+", help="tokens pruned after each block (default: four rates)"),
    "--llf": dict(action=argparse.BooleanOptionalAction, help="Last Layer Fusion"),
    "--merge": dict(action=argparse.BooleanOptionalAction, help="merge the pruned tokens into those that are kept"),
    "--mean": dict(type=float, nargs=3, help="of the pixels (default: the model's, or 0.5)"),
    "--std": dict(type=float, nargs=3, help="of the pixels (default: the model's, or 0.5)"),
    "--crop-pct": dict(type=float, help="side of the crop over that of the resized photo (default: the model's)"),
    "--interpolation": dict(choices=("bicubic", "bilinear", "lanczos"), help="default: the model's"),
    "--max-pixels": dict(type=count, help="of a photo; larger ones are not read (default: 178956970)"),
    "--batch": dict(type=count, default=1, help="images at a time (default: %(default)s)"),
    "--rounds": dict(type=count, default=9, help="timings of each, the median is used (default: %(default)s)"),
    "--device": dict(default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"),
    "--dtype": dict(choices=DTYPES, help="default: bfloat16 on cuda, else float32"),
    "--quiet": dict(action="store_true", help="no progress bar"),
}


def add_arguments(parser: Any, *names: str) -> None:
    """Arguments that several commands have."""
    for name in names:
        parser.add_argument(name, **_ARGUMENTS[name])


def add_model(parser: Any, **how: Any) -> None:
    """The arguments that name a model."""
    parser.add_argument("model", **_ARGUMENTS["model"] | how)
    add_arguments(parser, "--arch", "--img-size", "--num-classes")


def add_pixels(parser: Any) -> None:
    """The arguments that say how photos are read."""
    add_arguments(parser, "--mean", "--std", "--crop-pct", "--interpolation", "--max-pixels")


def add_pruning(parser: Any) -> None:
    """The arguments of `load_with_queries`."""
    add_model(parser)
    add_arguments(parser, "--queries", "--llf", "--merge")
    add_pixels(parser)
    schedule = parser.add_mutually_exclusive_group()
    add_arguments(schedule, "--rate", "--keep")


def place_of(options: argparse.Namespace) -> dict[str, Any]:
    """Device and dtype, as `Tensor.to` takes them."""
    device = torch.device(options.device)
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
    made = {key: own for key in ("arch", "img_size", "num_classes") if (own := given.get(key)) is not None}
    is_run = (Path(name) / "config.json").is_file() and not is_transformers_folder(name) and not was_saved(name)
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
            require_own_head(name, model, made["num_classes"])
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
        how = {name: about[name] for name in (*SCHEDULES, "llf") if about.get(name) is not None}
        how["merge"] = Merge(**about["merge"]) if isinstance(about.get("merge"), dict) else bool(about.get("merge"))
    schedules = ({name: one[name] for name in SCHEDULES if name in one} for one in (asked, how, default))
    rest = {name: own for name, own in (how | asked).items() if name not in SCHEDULES}
    apply(model, **next(filter(None, schedules)), **rest, num_outputs=0)
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
