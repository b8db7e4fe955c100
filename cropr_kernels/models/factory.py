"""Models by name: presets of this package, timm, torchvision, weight files and Hugging Face
folders."""

import difflib
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..utils.optional import import_optional
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


def is_transformers_folder(path: str | Path) -> bool:
    """Tell whether this is a folder with a config.json of transformers."""
    try:
        return "model_type" in json.loads((Path(path) / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def model_source(name: str, *, pretrained: bool = False) -> str:
    """Return "weight file", "transformers", "preset", "torchvision" or "timm" for a name; errors as
    `create_model`."""
    if is_weight_file(name):
        return "weight file"
    if is_transformers_folder(name):
        return "transformers"
    if name in PRESETS and not pretrained:  # timm has weights for the same names
        return "preset"
    if name in TORCHVISION:
        return "torchvision"
    timm = import_optional("timm", "timm", f"model {name!r}, which is no preset of cropr_kernels,")
    if name.startswith(_HUBS) or timm.is_model(name.split(".")[0]):
        return "timm"
    similar = difflib.get_close_matches(name, {*PRESETS, *TORCHVISION, *timm.list_models()}, 3)
    raise ValueError(
        "a model must be a preset of cropr_kernels, a model of timm or torchvision, "
        "hf-hub:OWNER/NAME of timm, a "
        f"weight file ({', '.join(WEIGHT_FILES)}) or a folder of transformers, cropr.save or "
        f"cropr train, got {name!r}" + (f"; similar names: {', '.join(similar)}" if similar else "")
    )


def create_model(name: str, *, pretrained: bool = False, arch: str = "", **options: Any) -> Any:
    """Create a model in eval mode.

    Args:
        name: a preset of this package; a timm model, "hf-hub:..." included; a vit_* of torchvision;
            a weight file (`load_weights`); a folder that transformers saved. Of a model of images
            and text, the image tower.
        pretrained: download the weights of a name; otherwise they are random. Files and folders
            hold their own.
        arch: the architecture of a weight file; see `load_weights`.
        options: of the model's constructor: of `ViTConfig`, timm, torchvision or the configuration
            of transformers. img_size (torchvision: image_size) and num_classes are known by these
            names everywhere.

    Raises:
        ValueError: the name or an option is not known, or a file cannot be read.
        FileNotFoundError: there is no such file.
        ImportError: the library of the model is not installed.
    """
    source = model_source(name, pretrained=pretrained)
    purpose = f"model {name!r}"
    if arch and source != "weight file":
        raise ValueError(
            f"arch (--arch) names the architecture of a weight file, got {arch!r} for {purpose}"
        )
    if source == "weight file":
        return load_weights(name, arch=arch, **options)[0]
    if source == "transformers":
        return _from_folder(name, options).eval()
    create: Any = partial(create_vit, name)
    if source == "torchvision":
        get_model = import_optional("torchvision.models", "train", purpose).get_model
        create = partial(get_model, name, weights="DEFAULT" if pretrained else None)
        options = {
            "image_size" if key == "img_size" else key: value for key, value in options.items()
        }
    elif source == "timm":
        create = partial(
            import_optional("timm", "timm", purpose).create_model, name, pretrained=pretrained
        )
    try:
        return create(**options).eval()
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(f"{purpose} takes no such option: {error}") from error


def _from_folder(name: str, options: dict[str, Any]) -> Any:
    """Load a model that transformers saved; of one of images and text, the image tower."""
    for option in ("img_size", "num_classes"):
        if option in options:
            raise ValueError(f"{name} fixes its {option}: leave out --{option.replace('_', '-')}")
    transformers = import_optional("transformers", "transformers", f"model {name!r}")
    architectures = transformers.AutoConfig.from_pretrained(name).architectures or []
    heads = ("ForImageClassification", "WithProjection")
    class_name = next(
        (architecture for architecture in architectures if architecture.endswith(heads)),
        "AutoModel",
    )
    model = getattr(transformers, class_name).from_pretrained(name, dtype=torch.float32, **options)
    return model.vision_model if hasattr(model, "text_model") else model


def require_pretrained_head(name: str, model: nn.Module, num_classes: int) -> None:
    """Raise ValueError if the file or timm has no weights for a head of num_classes."""
    pretrained = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    if is_weight_file(name):
        pretrained = num_classes_of(split_queries(read_weights(name)[0])[0])
    if pretrained and num_classes not in (0, pretrained):
        raise ValueError(
            f"num_classes (--num-classes) must be {pretrained}, those of {name}, or 0 for "
            f"features, got {num_classes}: "
            "another head would be random; cropr train makes and trains one"
        )


def load_weights(
    path: str | Path,
    *,
    arch: str = "",
    img_size: int | None = None,
    num_classes: int | None = None,
    **options: Any,
) -> tuple[Any, dict[str, str]]:
    """Build the model that a weight file was made for, and load it.

    Args:
        path: a .safetensors file, or a state dict of PyTorch, plain or in a checkpoint, with the
            names of timm or torchvision; prefixes of DataParallel, torch.compile and Lightning are
            removed, and so are the Cropr modules of a pruned model, with a warning.
        arch: the architecture: a preset of this package, a model of timm or of torchvision;
            default: the preset, or the torchvision model, that has these tensors.
        img_size: side of the images to run it with, in pixels; default that of the file. Positions
            are resized.
        num_classes: default those of the file. With another number the head is new.
        options: further options of the model's constructor.

    Returns:
        The model in eval mode, float32, and the file's metadata with the architecture's name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or does not fit the architecture, or no known one has
            its tensors.
        ImportError: the file is .safetensors and safetensors is not installed, or the library of
            arch is not.
    """
    state, metadata = read_weights(path)
    state, queries = split_queries(state)
    if queries:
        warnings.warn(
            f"load_weights: {path} is of a pruned model, and its queries are left out; cropr.save "
            "writes files that "
            "keep them",
            stacklevel=2,
        )
    head: dict[str, Any] = {
        "num_classes": num_classes_of(state) if num_classes is None else num_classes
    }
    name = arch or find_architecture(state, Path(path), lambda name: _build(name, head))
    model = _build(name, head | ({} if img_size is None else {"img_size": img_size}) | options)
    load_state(model, state, Path(path), name, resize=img_size is not None)
    return model.eval(), {"name": name, **metadata}


def _build(name: str, options: dict[str, Any]) -> Any:
    """Build a model by the name of its architecture, with random weights."""
    if name not in PRESETS and name not in TORCHVISION and model_source(name) != "timm":
        raise ValueError(
            "arch must be a preset of cropr_kernels, a model of timm or of torchvision, got "
            f"{name!r}"
        )
    return create_model(name, **options)
