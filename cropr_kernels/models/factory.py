"""Models by name: presets of this package, timm, torchvision, weight files and folders of transformers."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..utils.images import load_photo
from ..utils.io import load_safetensors, load_tensors
from ..utils.optional import need
from .adapters import find_spec
from .vit import PRESETS, ViT, create_vit

WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin")
_TORCHVISION = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")
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
    if Path(name).suffix in WEIGHT_FILES:
        return "weight file"
    if is_transformers_folder(name):
        return "transformers"
    if name in PRESETS and not pretrained:  # timm has weights for the same names
        return "preset"
    if name in _TORCHVISION:
        return "torchvision"
    timm = need("timm", "timm", f"model {name!r}, which is no preset of cropr_kernels,")
    if not name.startswith(_HUBS) and not timm.is_model(name.split(".")[0]):
        raise ValueError(
            "a model must be a preset of cropr_kernels, a model of timm or torchvision, a weight file "
            f"({', '.join(WEIGHT_FILES)}) or a folder of transformers, got {name!r}"
        )
    return "timm"


def create_model(name: str, *, pretrained: bool = False, **options: Any) -> Any:
    """A model in eval mode.

    Args:
        name: a preset of this package; a model of timm, "hf-hub:..." included; a vit_* of torchvision; a weight file
            (`load_weights`); a folder that transformers saved. Of a model of images and text it is the image tower.
        pretrained: download the weights of a name; otherwise they are random. Files and folders hold their own.
        options: of the model's constructor: of `ViTConfig`, timm, torchvision or the configuration of transformers.

    Raises:
        ValueError: the name means nothing, or a file cannot be read.
        FileNotFoundError: there is no such file.
        ImportError: the library of the model is not installed.
    """
    kind, what = kind_of(name, pretrained=pretrained), f"model {name!r}"
    if kind == "weight file":
        model: Any = load_weights(name, **options)[0]
    elif kind == "preset":
        model = create_vit(name, **options)
    elif kind == "torchvision":
        weights = "DEFAULT" if pretrained else None
        model = need("torchvision.models", "train", what).get_model(name, weights=weights, **options)
    elif kind == "timm":
        model = need("timm", "timm", what).create_model(name, pretrained=pretrained, **options)
    else:
        transformers = need("transformers", "transformers", what)
        architectures = transformers.AutoConfig.from_pretrained(name).architectures or []
        own = [one for one in architectures if one.endswith(("ForImageClassification", "WithProjection"))]
        family = getattr(transformers, own[0]) if own else transformers.AutoModel
        model = family.from_pretrained(name, dtype=torch.float32, **options)
        model = model.vision_model if hasattr(model, "text_model") else model
    return model.eval()


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
    if name in _TORCHVISION:
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


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    state = load_tensors(path)
    for key in ("model", "state_dict", "model_ema"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"load_weights: {path} must hold a state dict of tensors")
    return state, {}


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items() if not name.startswith("head.")}


def _match(state: dict[str, Tensor], classes: int) -> str:
    """The preset whose parameters have these names and shapes, apart from those of the head."""
    for name in PRESETS:
        with torch.device("meta"):
            candidate = create_vit(name, num_classes=classes)
        if _shapes(candidate.state_dict()) == _shapes(state):
            return name
    raise ValueError(f"load_weights: no architecture has these {len(state)} tensors; known are {', '.join(PRESETS)}")


def load_weights(path: str | Path, **overrides: Any) -> tuple[ViT, dict[str, str]]:
    """Build the reference ViT that a weight file was made for, and load it.

    Args:
        path: a .safetensors file, or a PyTorch state dict (timm's names).
        overrides: fields of ``ViTConfig`` to change. With another num_classes the head is a new one.

    Returns:
        The model in eval mode, float32, and the file's metadata with the preset's name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or no known architecture has its tensors.
        ImportError: the file is .safetensors and safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_weights: no weight file at {path}")
    state, metadata = _read(path)
    classes = state["head.weight"].shape[0] if "head.weight" in state else 0
    name = _match(state, classes)
    model = create_vit(name, **{"num_classes": classes, **overrides})
    if model.num_classes != classes:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
        if model.num_classes:  # a new head starts small: the features it reads are not small
            torch.nn.init.trunc_normal_(model.get_parameter("head.weight"), std=0.02)
        state |= {key: value for key, value in model.state_dict().items() if key.startswith("head.")}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"load_weights: {path} does not fit {name} with {overrides}: {error}") from error
    return model.eval(), {"name": name, **metadata}
