"""Models by their names."""

from typing import Any

from .vit import PRESETS, create_vit


def create_model(name: str) -> Any:
    """A model with random weights by name: a preset of this package, else timm's.

    Raises:
        ValueError: neither knows the name.
        ImportError: the name is not a preset, and timm is not installed.
    """
    if name in PRESETS:
        return create_vit(name)
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"{name} is not a preset of cropr_kernels; for timm's models: pip install cropr_kernels[timm]"
        ) from error
    if not timm.is_model(name):
        raise ValueError(f"{name} is neither a preset of cropr_kernels nor a model of timm")
    return timm.create_model(name)
