"""From the arguments of a command to a pretrained model, pruned."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calibration import load_queries
from ..models.weights import load_weights
from ..pruning.api import apply, set_rate
from ..pruning.model import is_pruned

WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin")


class Loaded(NamedTuple):
    """A model in eval mode, and how its images are prepared."""

    model: Any
    img_size: int
    mean: tuple[float, ...]  # of each channel
    std: tuple[float, ...]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels (..., 3, H, W) in [0, 1] as the model takes them."""
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std


def load_model(name: str, mean: Any = None, std: Any = None) -> Loaded:
    """A pretrained model by name: timm's, a weight file, or the folder of a classifier that `cropr train` made.

    Args:
        mean, std: of the pixels, three numbers each; default the model's own, 0.5 where nothing says it.

    Raises:
        FileNotFoundError, ValueError: there is no such file or model.
        ImportError: it is a model of timm, and timm is not installed.
    """
    loaded = _load(name)
    return loaded._replace(mean=tuple(mean or loaded.mean), std=tuple(std or loaded.std))


def _load(name: str) -> Loaded:
    half = (0.5, 0.5, 0.5)
    if (Path(name) / "config.json").is_file():
        return _load_run(Path(name))
    if Path(name).suffix in WEIGHT_FILES:
        model: Any = load_weights(name)[0]
        return Loaded(model, model.config.img_size, half, half)
    try:
        import timm
    except ImportError as error:
        raise ImportError("models by name are timm's: pip install 'cropr_kernels[timm]'") from error
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(
            f"{name} is neither a model of timm, a weight file ({', '.join(WEIGHT_FILES)}), nor a run of cropr train"
        )
    model = timm.create_model(name, pretrained=True).eval()
    about = timm.data.resolve_model_data_config(model)
    return Loaded(model, about["input_size"][1], about["mean"], about["std"])


def _load_run(folder: Path) -> Loaded:
    from ..train.loop import rebuild

    task, config, _ = rebuild(folder)
    if config.task != "classification":
        raise ValueError(f"{folder} holds a run of {config.task}; only classifiers are supported here")
    return Loaded(task.backbone.eval(), config.img_size[0], config.mean, config.std)


def add_model_arguments(parser: Any) -> None:
    """The arguments that `load_pruned` reads."""
    parser.add_argument(
        "model", help="a model of timm, which downloads its weights, a local weight file, or a run of cropr train"
    )
    parser.add_argument("--queries", type=Path, help="what cropr calibrate wrote; a run of cropr train has its own")
    schedule = parser.add_mutually_exclusive_group()
    schedule.add_argument("--rate", type=int, help="tokens dropped after each block (default: 8, or a run's own)")
    schedule.add_argument("--keep", type=Path, help="a schedule that cropr tune wrote")
    parser.add_argument("--llf", action="store_true", help="Last Layer Fusion")
    parser.add_argument("--merge", action="store_true", help="tokens that leave merge into those that stay")
    parser.add_argument("--mean", type=float, nargs=3, help="of the pixels (default: the model's, or 0.5)")
    parser.add_argument("--std", type=float, nargs=3, help="of the pixels (default: the model's, or 0.5)")


def load_pruned(options: argparse.Namespace) -> Loaded:
    """The model of these arguments, pruned and with its queries.

    Raises:
        ValueError: nothing says what its queries are, or the options do not fit it.
    """
    loaded = load_model(options.model, options.mean, options.std)
    model = loaded.model
    if is_pruned(model):
        if options.llf or options.merge or options.keep:
            raise ValueError(f"{options.model} says itself how it is pruned: leave out --llf, --merge and --keep")
        if options.rate is not None:
            set_rate(model, options.rate)
    else:
        rate = 8 if options.rate is None and options.keep is None else options.rate
        schedule = {"rate": rate} if options.keep is None else {"keep": options.keep}
        apply(model, **schedule, llf=options.llf, merge=options.merge, num_outputs=0)
        if options.queries is None and rate != 0:
            raise ValueError(
                "without queries tokens would leave at random: --queries FILE names what 'cropr calibrate MODEL "
                "FOLDER' wrote; --rate 0 prunes nothing"
            )
    if options.queries is not None:
        load_queries(model, options.queries)
    return loaded
