"""`model.cropr_image_tokens`: how image tokens are chosen."""

import threading
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .choice import Keep
from .dense import PrunedTower
from .features import VisionLanguageModel
from .prompts import KeptColumns
from .towers import GroupTower

ATTRIBUTE = "cropr_image_tokens"
CALLER = "cropr.prune_image_tokens"


class _Probe(threading.local):
    """Of this thread: whether it asks for positions only, the columns of its prompt, and the
    features that forwards of transformers before 5.18 compute."""

    active = False
    columns: KeptColumns | None = None
    outputs: dict[str, Any] | None = None  # of each modality
    prompt: Tensor | None = None  # (B, L), that they are for
    generates = False


class ImageTokens(nn.Module):
    """`model.cropr_image_tokens`: how image tokens are chosen.

    Args:
        keep: tokens an image (or tile) keeps, or their share; 1.0: all that leave the tower.
        query: (D,), D the width of the language model; None: evenly spaced tokens.
        tower: pruning inside the tower, if there is any.
    """

    query: Tensor | None

    def __init__(self, keep: Keep, query: Tensor | None, tower: GroupTower | None = None):
        super().__init__()
        self.keep = keep
        self.tower = tower
        self.dense: PrunedTower | None = None
        self.register_buffer("query", query, persistent=False)
        self.hooks: list[RemovableHandle] = []
        self.probe = _Probe()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "probe": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "probe": _Probe()})

    def extra_repr(self) -> str:
        chosen = "evenly spaced" if self.query is None else "by a query"
        return f"keep={self.keep}, {chosen}"


def require_image_tokens(model: nn.Module | VisionLanguageModel, caller: str) -> ImageTokens:
    """Return the choice of a model; raise TypeError, which names the caller, for any other."""
    tokens = getattr(model, ATTRIBUTE, None)
    if not isinstance(tokens, ImageTokens):
        raise TypeError(
            f"{caller}: image tokens are not pruned; call {CALLER}(model, keep=...) first"
        )
    return tokens
