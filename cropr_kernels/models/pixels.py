"""How the images of a model are prepared."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..utils.images import load_photo
from ..utils.optional import import_optional
from .adapters import find_spec
from .vit import PRESETS, ViT, ViTConfig
from .weights import TORCHVISION

_HALF = ((0.5,) * 3, (0.5,) * 3)  # mean and standard deviation of each channel
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_OF_PRESETS = {"deit": _IMAGENET, "eva02": _CLIP, "vit_small_patch14_reg4_dinov2": _IMAGENET}  # by how names begin


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

    @classmethod
    def of(cls, saved: dict[str, Any]) -> "Pixels":
        """What `_asdict` gave, lists of JSON as tuples."""
        values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in saved.items()}
        return cls(**values)

    def load(self, file: Any) -> Tensor:
        """A photo as the model looks at it, (3, height, width) in [0, 1]; errors are those of `load_photo`."""
        how = {"crop_pct": self.crop_pct, "interpolation": self.interpolation, "squash": self.squash}
        return load_photo(file, self.img_size, **how)  # type: ignore[arg-type]

    def normalise(self, images: Tensor) -> Tensor:
        """Images (..., 3, H, W) in [0, 1] as the model takes them."""
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


def pixels_of(model: Any, name: str) -> Pixels:
    """How the images of a model of `create_model(name)` are prepared, by its own configuration or preprocessor.

    name may also be that of its architecture. Where nothing says it: mean and standard deviation 0.5, and the defaults
    of `Pixels`. Raises TypeError where the family is not known.
    """
    known, what = find_spec(model), f"model {name!r}"
    pixels = Pixels((known.grid[0] * known.patch_size[0], known.grid[1] * known.patch_size[1]), *_HALF)
    if getattr(model, "pretrained_cfg", None):
        about = import_optional("timm.data", "timm", what).resolve_model_data_config(model)
        squash = about.pop("crop_mode") == "squash"
        pixels = pixels._replace(mean=tuple(about["mean"]), std=tuple(about["std"]), squash=squash)
        return pixels._replace(crop_pct=about["crop_pct"], interpolation=about["interpolation"])
    if isinstance(model, ViT):
        begins = [one for one in _OF_PRESETS if (name if name in PRESETS else _preset_of(model)).startswith(one)]
        mean, std = _OF_PRESETS[begins[0]] if begins else _HALF
        return pixels._replace(mean=mean, std=std)
    if hasattr(model, "conv_proj"):
        about = import_optional("torchvision.models", "train", what).get_model_weights(
            name if name in TORCHVISION else "vit_b_16"
        )
        about = about.DEFAULT.transforms()
        pixels = pixels._replace(mean=tuple(about.mean), std=tuple(about.std), interpolation=about.interpolation.value)
        return pixels._replace(crop_pct=about.crop_size[0] / about.resize_size[0])
    if not (Path(name) / "preprocessor_config.json").is_file():
        return pixels
    about = import_optional("transformers", "transformers", what).AutoImageProcessor.from_pretrained(name)
    mean, std = (about.image_mean, about.image_std) if about.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    filters = import_optional("PIL.Image", "viz", what).Resampling
    pixels = pixels._replace(mean=tuple(mean), std=tuple(std), interpolation=filters(int(about.resample)).name.lower())
    shortest = about.size.get("shortest_edge")
    crops = getattr(about, "do_center_crop", False)
    crop = about.crop_size["height"] / (shortest or about.size["height"]) if crops else 1.0
    return pixels._replace(crop_pct=crop, squash=shortest is None)


def _preset_of(model: ViT) -> str:
    """The first preset that such a ViT is of, whatever its size of images and classes, or nothing."""
    own, free = asdict(model.config), ("img_size", "num_classes", "drop_path_rate")
    same = (name for name, one in PRESETS.items() if own == asdict(ViTConfig(**one)) | {key: own[key] for key in free})
    return next(same, "")
