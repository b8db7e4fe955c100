"""Names of the classes of a model."""

import json
from typing import Any

from torch import nn

from ..utils.optional import import_optional, is_installed
from .weights import TORCHVISION, is_weight_file, read_weights


def class_names(model: nn.Module, name: str, num_classes: int) -> list[str] | None:
    """Find the names of the classes of `create_model(name)`, in order; None if nothing names them.

    They are those of the configuration (Hugging Face), of torchvision's weights, of timm for its
    pretrained models, or of a weight file that lists `classes` in its metadata: in JSON, or as
    words. With timm, WordNet IDs become words.
    """
    if is_weight_file(name):
        labels = _listed(read_weights(name)[1].get("classes", ""))
    elif name in TORCHVISION:
        library = import_optional("torchvision.models", "train", f"model {name!r}")
        labels = list(library.get_model_weights(name).DEFAULT.meta["categories"])
    elif hasattr(model, "pretrained_cfg"):
        labels = _labels_of_timm(model)
    else:
        by_index: dict[int, str] = getattr(getattr(model, "config", None), "id2label", None) or {}
        labels = [str(by_index[index]) for index in sorted(by_index)]
    if len(labels) != num_classes or labels[:1] == ["LABEL_0"]:  # transformers' default
        return None
    return _words(labels)


def _listed(text: str) -> list[str]:
    return [str(label) for label in json.loads(text)] if text.startswith("[") else text.split()


def _labels_of_timm(model: nn.Module) -> list[str]:
    data = import_optional("timm.data", "timm", "names of classes")
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    if config.get("label_names"):
        return list(config["label_names"])
    subset = data.infer_imagenet_subset(config)
    return [] if subset is None else data.ImageNetInfo(subset).label_names()


def _words(labels: list[str]) -> list[str]:
    """Replace WordNet IDs by their first lemma, and keep any other label up to a comma."""
    lemmas: dict[str, str] = {}
    if is_installed("timm") and any(_is_wordnet(label) for label in labels):
        info = import_optional("timm.data", "timm", "names of classes").ImageNetInfo("imagenet-22k")
        known = set(info.label_names())
        lemmas = {
            label: info.label_name_to_description(label) for label in labels if label in known
        }
    return [lemmas.get(label, label).split(",")[0] for label in labels]


def _is_wordnet(label: str) -> bool:
    return len(label) == 9 and label[0] == "n" and label[1:].isdecimal()
