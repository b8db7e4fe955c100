"""Image features of a vision-language model, and a choice among them."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# Fields of an output that have no row for each image token
_INNER_FIELDS = ("last_hidden_state", "hidden_states", "attentions")


class VisionLanguageModel(Protocol):
    """A vision-language model of transformers, or its base: an nn.Module whose attributes are not
    those of nn.Module alone."""

    def __getattr__(self, name: str) -> Any: ...


def entries_of(features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The rows (N, D) of each image, from a tensor (images, N, D) or a sequence; a tensor (N, D) is
    one entry."""
    if isinstance(features, Tensor) and features.ndim == 2:
        return [features]
    return [entry.reshape(-1, entry.shape[-1]) for entry in features]


def select_features(output: Any, kept: Tensor) -> Any:
    """Copy an output of get_image_features with the kept rows alone, (total rows,) bool.

    Raises:
        ValueError: images are one tensor, and their counts differ.
    """
    return changed(output, lambda value: _select(value, kept))


def changed(output: Any, change: Callable[[Any], Any]) -> Any:
    """Copy an output of get_image_features with all fields changed but those of the tower."""
    fields = dict(output.items())
    copied = type(output)(**fields)
    # Some models of transformers before 5.18 set pooler_output on outputs without such a field
    for name, value in (vars(output) | fields).items():
        if name not in _INNER_FIELDS:
            setattr(copied, name, change(value))
    return copied


def _select(features: object, kept: Tensor) -> object:
    """Select rows in features (images, N, D), a sequence of (N, D), or of such features; other
    values pass."""
    if isinstance(features, Tensor):
        if features.ndim == 2 and len(features) == len(kept):
            return features[kept]
        if features.ndim != 3 or features.shape[0] * features.shape[1] != len(kept):
            return features
        counts = kept.unflatten(0, features.shape[:2]).sum(1)
        if bool((counts != counts[0]).any()):
            raise ValueError(
                f"cropr: images of this model must keep equally many tokens, got {counts.tolist()}"
            )
        return features.flatten(0, 1)[kept].unflatten(0, (len(features), -1))
    if not isinstance(features, tuple | list):
        return features
    if all(isinstance(entry, Tensor) and entry.ndim == 2 for entry in features):
        lengths = [len(entry) for entry in features]
        if sum(lengths) == len(kept):
            return [entry[rows] for entry, rows in zip(features, kept.split(lengths))]
    return type(features)(_select(entry, kept) for entry in features)


def language_model(model: nn.Module) -> nn.Module:
    """The decoder of the prompt inside a vision-language model."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = None if get_decoder is None else get_decoder()
    if not isinstance(decoder, nn.Module) or decoder is model:
        raise TypeError(
            f"cropr.prune_image_tokens: {type(model).__name__} cannot be pruned: it has no "
            "language model of its own"
        )
    return decoder


def total_rows(entries: Sequence[Tensor]) -> int:
    return sum(len(entry) for entry in entries)


def finite_rows(entries: Sequence[Tensor]) -> Tensor:
    """Tell of each row whether it has no NaN, (total rows,) bool: NaN marks what a pruned tower
    has left out."""
    return ~torch.cat([entry.detach().isnan().any(-1) for entry in entries])
