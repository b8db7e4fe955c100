"""Models by name: presets of this package, timm, torchvision, weight files and folders of transformers."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..utils.io import load_tensors
from ..utils.optional import need
from .adapters import find_spec
from .vit import PRESETS, ViT, create_vit

WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin")
_TORCHVISION = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")
_HUBS = ("hf-hub:", "hf_hub:", "local-dir:")  # prefixes of names that timm looks up elsewhere
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class Pixels(NamedTuple):
    """How a model's images are prepared: height and width, and the mean and standard deviation of each channel."""

    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

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


def kind_of(
    name: str, *, pretrained: bool = False
) -> Literal["weight file", "transformers", "preset", "torchvision", "timm"]:
    """What a name means; a preset with pretrained=True is timm's model of the same name.

    Raises:
        ValueError: it means nothing.
        ImportError: it may be a model of timm, and timm is not installed.
    """
    if Path(name).suffix in WEIGHT_FILES:
        return "weight file"
    if is_transformers_folder(name):
        return "transformers"
    if name in PRESETS and not pretrained:
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
    kind = kind_of(name, pretrained=pretrained)
    if kind == "weight file":
        model: Any = load_weights(name, **options)[0]
    elif kind == "preset":
        model = create_vit(name, **options)
    elif kind == "transformers":
        model = _load_folder(name, options)
    elif kind == "torchvision":
        models = need("torchvision.models", "train", f"model {name!r}")
        model = models.get_model(name, weights="DEFAULT" if pretrained else None, **options)
    else:
        model = need("timm", "timm", f"model {name!r}").create_model(name, pretrained=pretrained, **options)
    return model.eval()


def _load_folder(folder: str, options: dict[str, Any]) -> Any:
    transformers = need("transformers", "transformers", f"model {folder!r}")
    names = transformers.AutoConfig.from_pretrained(folder).architectures or []
    own = [name for name in names if name.endswith(("ForImageClassification", "WithProjection"))]
    family = getattr(transformers, own[0]) if own else transformers.AutoModel
    model = family.from_pretrained(folder, dtype=torch.float32, **options)
    return model.vision_model if hasattr(model, "text_model") else model


def pixels_of(model: Any, name: str) -> Pixels:
    """How the images of a model are prepared: as its own configuration says, mean and std 0.5 where nothing does.

    Args:
        model: of `create_model`.
        name: what it was created from: a folder of transformers may hold the configuration of a preprocessor.

    Raises:
        TypeError: its family is not known.
    """
    known = find_spec(model)
    size = known.grid[0] * known.patch_size[0], known.grid[1] * known.patch_size[1]
    if not isinstance(model, ViT):
        if hasattr(model, "pretrained_cfg"):
            about = need("timm.data", "timm", f"model {name!r}").resolve_model_data_config(model)
            return Pixels(size, tuple(about["mean"]), tuple(about["std"]))
        if not hasattr(model, "config"):
            return Pixels(size, *_IMAGENET)
        if (Path(name) / "preprocessor_config.json").is_file():
            processor = need("transformers", "transformers", f"model {name!r}").AutoImageProcessor.from_pretrained(name)
            if not processor.do_normalize:
                return Pixels(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
            return Pixels(size, tuple(processor.image_mean), tuple(processor.image_std))
    return Pixels(size, *_HALF)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix == ".safetensors":
        safetensors = need("safetensors", "demo", f"weight file {path}")
        try:
            with safetensors.safe_open(path, "pt") as file:
                names = list(file.keys())
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    state = load_tensors(path)
    for key in ("model", "state_dict", "model_ema"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"load_weights: {path} must hold a state dict of tensors")
    return state, {}


def _match(state: dict[str, Tensor]) -> tuple[str, int]:
    """The preset whose parameters have these names and shapes, and the number of classes."""
    shapes = {name: tensor.shape for name, tensor in state.items() if not name.startswith("head.")}
    head = state.get("head.weight")
    classes = 0 if head is None else head.shape[0]
    for name in PRESETS:
        with torch.device("meta"):
            candidate = create_vit(name, num_classes=classes).state_dict()
        if {key: value.shape for key, value in candidate.items() if not key.startswith("head.")} == shapes:
            return name, classes
    raise ValueError(f"load_weights: no architecture has these {len(state)} tensors; known are {', '.join(PRESETS)}")


def load_weights(path: str | Path, **overrides: Any) -> tuple[ViT, dict[str, str]]:
    """Build the reference ViT that a weight file was made for, and load it.

    Args:
        path: a .safetensors file, or a PyTorch state dict (timm's names).
        overrides: fields of ``ViTConfig`` to change. With another num_classes the head is a new one.

    Returns:
        The model in eval mode, float32, and the file's metadata (empty for PyTorch files).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or no known architecture has its tensors.
        ImportError: the file is .safetensors and safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_weights: no weight file at {path}")
    state, metadata = _read(path)
    name, classes = _match(state)
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
