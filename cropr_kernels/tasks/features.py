"""What dense tasks take from a backbone: the features of all patches, normalised."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from ..pruning.model import features, is_pruned


class Features(NamedTuple):
    """Tokens of all patches (B, patches, D), and the auxiliary predictions (B, patches, outputs), one per module."""

    tokens: Tensor
    aux: list[Tensor]


def token_norm(backbone: Any) -> Any:
    """The last norm of the tokens: models that average over patches have it behind the average."""
    behind = getattr(backbone, "fc_norm", None)
    return behind if isinstance(behind, nn.LayerNorm) and not isinstance(backbone.norm, nn.LayerNorm) else backbone.norm


def patch_features(backbone: Any, images: Tensor, *, predict: bool) -> Features:
    """Features of a backbone that is not pruned, or pruned with Last Layer Fusion.

    Raises:
        ValueError: it is pruned without: the map is not whole.
    """
    aux: list[Tensor] = []
    prefix = backbone.num_prefix_tokens
    if is_pruned(backbone):
        if not backbone.cropr.config.llf:
            raise ValueError("cropr: dense tasks need the whole map: cropr.apply(..., llf=True)")
        x, aux = features(backbone, images, predict=predict)
        prefix = 0 if backbone.cropr.config.windows is not None else prefix
    else:
        x = backbone.forward_features(images)
    tokens = x[:, prefix:]
    norm = token_norm(backbone)
    return Features(tokens if norm is backbone.norm else norm(tokens), aux)
