"""What models give: logits or features, as a tensor or in an output of transformers."""

from typing import Any

from torch import Tensor, nn


def outputs_of(output: Any) -> Tensor:
    """The logits (B, classes) of an output, or the features (B, D) of whole images; ValueError if it has neither."""
    if isinstance(output, Tensor):
        return output
    names = ("logits", "image_embeds", "pooler_output")
    for name in names:
        if (found := getattr(output, name, None)) is not None:
            return found
    raise ValueError(f"the output of a model must be a tensor or hold {', '.join(names)}, got {type(output).__name__}")


def remove_classifier(model: Any) -> None:
    """Let a model end in the features (B, D) that its classifier reads, in place; TypeError if no name fits."""
    for name in ("head", "classifier", "heads"):
        if isinstance(getattr(model, name, None), nn.Module):
            setattr(model, name, nn.Identity())
            return
    raise TypeError(f"{type(model).__name__} must have a classifier named head, classifier or heads, has none")
