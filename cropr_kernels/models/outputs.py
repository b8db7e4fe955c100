"""Outputs of models: logits or features, as a tensor or in a Hugging Face output."""

from torch import Tensor, nn

_CLASSIFIERS = ("head", "classifier", "heads")


def outputs_of(output: object) -> Tensor:
    """Return the logits (B, classes) of an output, or the features (B, D) of images; ValueError if
    it has neither."""
    if isinstance(output, Tensor):
        return output
    names = ("logits", "image_embeds", "pooler_output")
    for name in names:
        value = getattr(output, name, None)
        if value is not None:
            return value
    raise ValueError(
        f"the output of a model must be a tensor or hold {', '.join(names)}, got "
        f"{type(output).__name__}"
    )


def num_classes_of(model: nn.Module, default: int) -> int:
    """Count the outputs of a model's classifier, which may have been replaced; default: of one that
    is not linear."""
    for name in _CLASSIFIERS:
        layers = [
            layer
            for layer in getattr(model, name, nn.Identity()).modules()
            if isinstance(layer, nn.Linear)
        ]
        if layers:
            return layers[-1].out_features
    return default


def remove_classifier(model: nn.Module) -> None:
    """Make a model return the features (B, D) that its classifier reads, in place; TypeError if it
    has none."""
    for name in _CLASSIFIERS:
        if isinstance(getattr(model, name, None), nn.Module):
            setattr(model, name, nn.Identity())
            return
    raise TypeError(
        f"{type(model).__name__} must have a classifier named head, classifier or heads, has none"
    )
