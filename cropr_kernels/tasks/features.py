"""What dense tasks take from a backbone: the features of all patches, normalised."""

from typing import Any

from torch import Tensor, nn

from ..pruning.model import features, is_pruned


def token_norm(backbone: Any) -> Any:
    """The last norm of the tokens: models that average over the patches first have it behind the average."""
    behind = getattr(backbone, "fc_norm", None)
    return behind if isinstance(behind, nn.LayerNorm) and not isinstance(backbone.norm, nn.LayerNorm) else backbone.norm


def patch_features(backbone: Any, images: Tensor, *, predict: bool) -> tuple[Tensor, list[Tensor]]:
    """Tokens of all patches (B, patches, D), and auxiliary predictions (B, patches, outputs), one per module.

    Raises ValueError where the backbone is pruned without Last Layer Fusion: the map is not whole.
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
    tokens, norm = x[:, prefix:], token_norm(backbone)
    return tokens if norm is backbone.norm else norm(tokens), aux
