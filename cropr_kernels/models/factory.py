"""Models by name: presets of this package, timm, torchvision, weight files and folders of transformers."""

import difflib
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..utils.images import load_photo
from ..utils.optional import need
from .adapters import find_spec
from .vit import PRESETS, create_vit
from .weights import (
    TORCHVISION,
    WEIGHT_FILES,
    find_architecture,
    is_weight_file,
    load_state,
    num_classes_of,
    read_weights,
    split_queries,
)

_HUBS = ("hf-hub:", "hf_hub:", "local-dir:")  # prefixes of names that timm looks up elsewhere


class Pixels(NamedTuple):
    """How a model's images are prepared; `load_photo` says what the last three mean."""

    img_size: tuple[int, int]  # height and width
    mean: tuple[float, ...]  # of each channel
    std: tuple[float, ...]
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    squash: bool = False

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:.3g}" for value in values) for values in (self.mean, self.std))
        how = f"{'squashed, ' if self.squash else ''}crop_pct {self.crop_pct:.3g}, {self.interpolation}"
        return f"{self.img_size[0]} x {self.img_size[1]} px, {how}, mean {mean}, std {std}"

    def load(self, file: Any) -> Tensor:
        """A photo as the model looks at it, (3, height, width) in [0, 1]; errors are those of `load_photo`."""
        how = {"crop_pct": self.crop_pct, "interpolation": self.interpolation, "squash": self.squash}
        return load_photo(file, self.img_size, **how)  # type: ignore[arg-type]

    def normalise(self, images: Tensor) -> Tensor:
        """Images (..., 3, H, W) in [0, 1] as the model takes them."""
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


def is_transformers_folder(path: str | Path) -> bool:
    """Whether there is a folder with a config.json of transformers."""
    try:
        return "model_type" in json.loads((Path(path) / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def kind_of(name: str, *, pretrained: bool = False) -> str:
    """What a name means: "weight file", "transformers", "preset", "torchvision" or "timm"; raises as `create_model`."""
    if is_weight_file(name):
        return "weight file"
    if is_transformers_folder(name):
        return "transformers"
    if name in PRESETS and not pretrained:  # timm has weights for the same names
        return "preset"
    if name in TORCHVISION:
        return "torchvision"
    timm = need("timm", "timm", f"model {name!r}, which is no preset of cropr_kernels,")
    if name.startswith(_HUBS) or timm.is_model(name.split(".")[0]):
        return "timm"
    near = difflib.get_close_matches(name, {*PRESETS, *TORCHVISION, *timm.list_models()}, 3)
    hint = f"; near are {', '.join(near)}" if near else ""
    raise ValueError(
        "a model must be a preset of cropr_kernels, a model of timm (hf-hub:OWNER/NAME too) or torchvision, a weight "
        f"file ({', '.join(WEIGHT_FILES)}) or a folder of transformers, cropr.save or cropr train, got {name!r}{hint}"
    )


def create_model(name: str, *, pretrained: bool = False, arch: str = "", **options: Any) -> Any:
    """A model in eval mode.

    Args:
        name: a preset of this package; a model of timm, "hf-hub:..." included; a vit_* of torchvision; a weight file
            (`load_weights`); a folder that transformers saved. Of a model of images and text it is the image tower.
        pretrained: download the weights of a name; otherwise they are random. Files and folders hold their own.
        arch: of a weight file, whose weights they are; see `load_weights`.
        options: of the model's constructor: of `ViTConfig`, timm, torchvision or the configuration of transformers.
            img_size (torchvision: image_size) and num_classes are known by these names everywhere.

    Raises:
        ValueError: the name or an option means nothing, or a file cannot be read.
        FileNotFoundError: there is no such file.
        TypeError: it is no model that can be pruned, and does not take the options.
        ImportError: the library of the model is not installed.
    """
    kind, what = kind_of(name, pretrained=pretrained), f"model {name!r}"
    if arch and kind != "weight file":
        raise ValueError(f"arch (--arch) says whose weights are in a weight file, got {arch!r} for {what}")
    if kind == "weight file":
        return load_weights(name, arch=arch, **options)[0]
    if kind == "transformers":
        return _from_folder(name, options).eval()
    create: Any = partial(create_vit, name)
    if kind == "torchvision":
        get_model = need("torchvision.models", "train", what).get_model
        create = partial(get_model, name, weights="DEFAULT" if pretrained else None)
        options = {"image_size" if key == "img_size" else key: value for key, value in options.items()}
    elif kind == "timm":
        create = partial(need("timm", "timm", what).create_model, name, pretrained=pretrained)
    try:
        return create(**options).eval()
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        with torch.device("meta"):
            find_spec(create())  # no Vision Transformer: says so
        raise ValueError(f"{what} takes no such option: {error}") from error


def _from_folder(name: str, options: dict[str, Any]) -> Any:
    """A model that transformers saved; of one of images and text the image tower."""
    for option in ("img_size", "num_classes"):
        if option in options:
            raise ValueError(f"{name} says itself what its {option} is: leave out --{option.replace('_', '-')}")
    transformers = need("transformers", "transformers", f"model {name!r}")
    architectures = transformers.AutoConfig.from_pretrained(name).architectures or []
    own = [one for one in architectures if one.endswith(("ForImageClassification", "WithProjection"))]
    family = getattr(transformers, own[0]) if own else transformers.AutoModel
    model = family.from_pretrained(name, dtype=torch.float32, **options)
    return model.vision_model if hasattr(model, "text_model") else model


def pixels_of(model: Any, name: str) -> Pixels:
    """How the images of a model of `create_model(name)` are prepared, by its own configuration or preprocessor.

    Where nothing says it: mean and standard deviation 0.5, and the defaults of `Pixels`. Raises TypeError where the
    family is not known.
    """
    known, what = find_spec(model), f"model {name!r}"
    pixels = Pixels((known.grid[0] * known.patch_size[0], known.grid[1] * known.patch_size[1]), (0.5,) * 3, (0.5,) * 3)
    if hasattr(model, "pretrained_cfg"):
        about = need("timm.data", "timm", what).resolve_model_data_config(model)
        squash = about.pop("crop_mode") == "squash"
        pixels = pixels._replace(mean=tuple(about["mean"]), std=tuple(about["std"]), squash=squash)
        return pixels._replace(crop_pct=about["crop_pct"], interpolation=about["interpolation"])
    if name in TORCHVISION:
        about = need("torchvision.models", "train", what).get_model_weights(name).DEFAULT.transforms()
        pixels = pixels._replace(mean=tuple(about.mean), std=tuple(about.std), interpolation=about.interpolation.value)
        return pixels._replace(crop_pct=about.crop_size[0] / about.resize_size[0])
    if not (Path(name) / "preprocessor_config.json").is_file():
        return pixels
    about = need("transformers", "transformers", what).AutoImageProcessor.from_pretrained(name)
    mean, std = (about.image_mean, about.image_std) if about.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    filters = need("PIL.Image", "viz", what).Resampling
    pixels = pixels._replace(mean=tuple(mean), std=tuple(std), interpolation=filters(int(about.resample)).name.lower())
    shortest = about.size.get("shortest_edge")
    crops = getattr(about, "do_center_crop", False)
    crop = about.crop_size["height"] / (shortest or about.size["height"]) if crops else 1.0
    return pixels._replace(crop_pct=crop, squash=shortest is None)


def load_weights(
    path: str | Path, *, arch: str = "", img_size: int | None = None, num_classes: int | None = None, **options: Any
) -> tuple[Any, dict[str, str]]:
    """Build the model that a weight file was made for, and load it.

    Args:
        path: a .safetensors file, or a state dict of PyTorch, plain or in a checkpoint, with the names of timm or
            torchvision; prefixes of DataParallel, torch.compile and Lightning are left out, and so are the Cropr
            modules of a pruned model, with a warning.
        arch: whose weights they are: a preset of this package, a model of timm or of torchvision; default: the preset,
            or the model of torchvision, that has these tensors.
        img_size: side of the images to run it with, in pixels; default that of the file. Positions are resized.
        num_classes: default those of the file. With another number the head is a new one.
        options: further ones of the model's constructor.

    Returns:
        The model in eval mode, float32, and the file's metadata with the architecture's name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or does not fit the architecture, or no known one has its tensors.
        ImportError: the file is .safetensors and safetensors is not installed, or the library of arch is not.
    """
    state, metadata = read_weights(path)
    state, queries = split_queries(state)
    if queries:
        warnings.warn(
            f"load_weights: {path} is of a pruned model, and its queries are left out; cropr.save writes files that "
            "keep them",
            stacklevel=2,
        )
    given: dict[str, Any] = {"num_classes": num_classes_of(state) if num_classes is None else num_classes}
    name = arch or find_architecture(state, Path(path), lambda name: _build(name, given))
    model = _build(name, given | ({} if img_size is None else {"img_size": img_size}) | options)
    load_state(model, state, Path(path), name, resize=img_size is not None)
    return model.eval(), {"name": name, **metadata}


def _build(name: str, options: dict[str, Any]) -> Any:
    """A model by the name of its architecture, with random weights."""
    if name not in PRESETS and name not in TORCHVISION and kind_of(name) != "timm":
        raise ValueError(f"arch must be a preset of cropr_kernels, a model of timm or of torchvision, got {name!r}")
    return create_model(name, **options)
