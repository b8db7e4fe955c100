"""Normalized features of all patches, for dense tasks."""

from torch import Tensor, nn

from ..pruning.model import features, is_pruned
from .backbone import Backbone


def token_norm(backbone: Backbone) -> nn.Module:
    """Return the last norm of the tokens; models that average over patches have it after the
    average."""
    return (
        getattr(backbone, "fc_norm", backbone.norm)
        if isinstance(backbone.norm, nn.Identity)
        else backbone.norm
    )


def patch_features(
    backbone: Backbone, images: Tensor, *, predict: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return tokens of all patches (B, patches, D), and auxiliary predictions (B, patches, outputs)
    per module.

    Raises ValueError if the backbone is pruned without Last Layer Fusion: its map is not full.
    """
    aux: list[Tensor] = []
    prefix = backbone.num_prefix_tokens
    if is_pruned(backbone):
        if not backbone.cropr.config.llf:
            raise ValueError("cropr: dense tasks need the full map: cropr.apply(..., llf=True)")
        x, aux = features(backbone, images, predict=predict)
        prefix = 0 if backbone.cropr.config.windows is not None else prefix
    else:
        x = backbone.forward_features(images)
    tokens = x[:, prefix:]
    norm = token_norm(backbone)
    return tokens if norm is backbone.norm else norm(tokens), aux
