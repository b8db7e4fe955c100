"""Pruned models of transformers that come back as they were saved."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..models.factory import is_transformers_folder
from ..utils.io import load_safetensors
from ..utils.optional import need
from .api import apply
from .merging import Merge


def from_pretrained(name: str | Path, **options: Any) -> Any:
    """A pruned model as `save_pretrained` of transformers wrote it: weights, schedule and queries, in eval mode.

    What was pruned may be a part of what was saved, such as the vision tower of a LLaVA. A deployed model comes back
    not deployed.

    Args:
        name: a folder, or a model of the Hub.
        options: of from_pretrained of the model's class, such as dtype.

    Raises:
        ValueError: nothing in it was pruned when it was saved.
        ImportError: transformers is not installed.
    """
    transformers = need("transformers", "transformers", "cropr.from_pretrained")
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(
            need("transformers.utils.hub", "transformers", "cropr.from_pretrained").snapshot_download(str(name))
        )
    [kind] = transformers.AutoConfig.from_pretrained(folder).architectures
    model = getattr(transformers, kind).from_pretrained(folder, **options)
    parts = (part for part in model.modules() if getattr(getattr(part, "config", None), "cropr", None))
    part: Any = next(parts, None)
    if part is None:
        raise ValueError(f"cropr.from_pretrained: nothing in {name} was pruned when it was saved")
    about = {**part.config.cropr}
    apply(part, **about | {"merge": Merge(**about["merge"]) if about["merge"] else False})
    part.cropr.load_state_dict(_saved_modules(folder))
    return model.eval()


def was_pruned(name: str | Path) -> bool:
    """Whether there is a folder of a model of transformers that was pruned when it was saved."""
    return is_transformers_folder(name) and "cropr" in json.loads((Path(name) / "config.json").read_text())


def _saved_modules(folder: Path) -> dict[str, Tensor]:
    """The state of the Cropr modules among the weights in a folder, wherever in the model they were."""
    state: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_safetensors(path, "cropr.")[0].items():
            own = name.partition("cropr.")[2]
            layer, _, kind = own.partition(".")
            state |= {f"{layer}.queries": tensor[None]} if kind == "folded" else {own: tensor}  # of a deployed model
    return state
