"""What models give: logits or features, as a tensor or in an output of transformers."""

from typing import Any

from torch import Tensor, nn


def outputs_of(output: Any) -> Tensor:
    """The logits (B, classes) of an output, or the features (B, D) that it gives of whole images.

    Raises:
        ValueError: it holds neither.
    """
    if isinstance(output, Tensor):
        return output
    names = ("logits", "image_embeds", "pooler_output")
    found = next((value for name in names if (value := getattr(output, name, None)) is not None), None)
    if found is None:
        raise ValueError(
            f"the output of a model must be a tensor or hold {', '.join(names)}, got {type(output).__name__}"
        )
    return found


def remove_classifier(model: Any) -> None:
    """Let a model end in the features (B, D) that its classifier reads, in place.

    Raises:
        TypeError: it has no classifier where those of timm, transformers and torchvision are.
    """
    names = [name for name in ("head", "classifier", "heads") if isinstance(getattr(model, name, None), nn.Module)]
    if not names:
        raise TypeError(f"{type(model).__name__} must have a classifier named head, classifier or heads, has none")
    setattr(model, names[0], nn.Identity())
