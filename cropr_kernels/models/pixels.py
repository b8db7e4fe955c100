"""The preparation of a model's images."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..utils.images import PhotoFile, load_photo
from ..utils.optional import import_optional
from .adapters import find_spec
from .vit import PRESETS, ViT, ViTConfig
from .weights import TORCHVISION

_HALF = ((0.5,) * 3, (0.5,) * 3)  # mean and standard deviation of each channel
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# Of presets, by the prefix of their names.
_OF_PRESETS = {"deit": _IMAGENET, "eva02": _CLIP, "vit_small_patch14_reg4_dinov2": _IMAGENET}


class Pixels(NamedTuple):
    """The preparation of a model's images; `load_photo` describes the last three."""

    img_size: tuple[int, int]  # height and width
    mean: tuple[float, ...]  # of each channel
    std: tuple[float, ...]
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    squash: bool = False

    def __str__(self) -> str:
        mean = " ".join(f"{value:.3g}" for value in self.mean)
        std = " ".join(f"{value:.3g}" for value in self.std)
        resize = (
            f"{'squashed, ' if self.squash else ''}crop_pct {self.crop_pct:.3g}, "
            f"{self.interpolation}"
        )
        return f"{self.img_size[0]} x {self.img_size[1]} px, {resize}, mean {mean}, std {std}"

    @classmethod
    def of(cls, saved: dict[str, Any]) -> "Pixels":
        """Restore the values of `_asdict` from JSON, whose lists become tuples."""
        values: dict[str, Any] = {
            k: tuple(value) if isinstance(value, list) else value for k, value in saved.items()
        }
        return cls(**values)

    def load(self, file: PhotoFile) -> Tensor:
        """Read a photo as the model takes it, (3, height, width) in [0, 1]; errors are those of
        `load_photo`."""
        return load_photo(
            file,
            self.img_size,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
            squash=self.squash,
        )

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize images (..., C, H, W) in [0, 1] by mean and standard deviation."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (images - mean) / std


def pixels_of(model: nn.Module, name: str) -> Pixels:
    """Find the preparation of images of `create_model(name)`, in the model's own configuration or
    preprocessor.

    name may also be that of its architecture. Without either: mean and standard deviation 0.5, and
    the defaults of `Pixels`. Raises TypeError if the family is not known.
    """
    spec = find_spec(model)
    pixels = Pixels(spec.img_size, *_HALF)
    purpose = f"model {name!r}"
    if getattr(model, "pretrained_cfg", None):
        return _pixels_of_timm(model, pixels, purpose)
    if isinstance(model, ViT):
        preset = name if name in PRESETS else _preset_of(model)
        mean, std = next(
            (_OF_PRESETS[prefix] for prefix in _OF_PRESETS if preset.startswith(prefix)), _HALF
        )
        return pixels._replace(mean=mean, std=std)
    if hasattr(model, "conv_proj"):
        return _pixels_of_torchvision(name, pixels, purpose)
    if (Path(name) / "preprocessor_config.json").is_file():
        return _pixels_of_transformers(name, pixels, purpose)
    return pixels


def _pixels_of_timm(model: nn.Module, pixels: Pixels, purpose: str) -> Pixels:
    config = import_optional("timm.data", "timm", purpose).resolve_model_data_config(model)
    return pixels._replace(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        crop_pct=config["crop_pct"],
        interpolation=config["interpolation"],
        squash=config["crop_mode"] == "squash",
    )


def _pixels_of_torchvision(name: str, pixels: Pixels, purpose: str) -> Pixels:
    weights = import_optional("torchvision.models", "train", purpose).get_model_weights(
        name if name in TORCHVISION else "vit_b_16"
    )
    transforms = weights.DEFAULT.transforms()
    return pixels._replace(
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        crop_pct=transforms.crop_size[0] / transforms.resize_size[0],
        interpolation=transforms.interpolation.value,
    )


def _pixels_of_transformers(name: str, pixels: Pixels, purpose: str) -> Pixels:
    processor = import_optional(
        "transformers", "transformers", purpose
    ).AutoImageProcessor.from_pretrained(name)
    mean, std = (
        (processor.image_mean, processor.image_std)
        if processor.do_normalize
        else ((0.0,) * 3, (1.0,) * 3)
    )
    filters = import_optional("PIL.Image", "viz", purpose).Resampling
    shortest = processor.size.get("shortest_edge")
    crop_pct = 1.0
    if getattr(processor, "do_center_crop", False):
        crop_pct = processor.crop_size["height"] / (shortest or processor.size["height"])
    return pixels._replace(
        mean=tuple(mean),
        std=tuple(std),
        crop_pct=crop_pct,
        interpolation=filters(int(processor.resample)).name.lower(),
        squash=shortest is None,
    )


def _preset_of(model: ViT) -> str:
    """Return the first preset of this architecture, whatever its image size and classes; "" if
    there is none."""
    config = asdict(model.config)
    free = {name: config[name] for name in ("img_size", "num_classes", "drop_path_rate")}
    return next(
        (
            name
            for name, options in PRESETS.items()
            if config == asdict(ViTConfig(**options)) | free
        ),
        "",
    )
