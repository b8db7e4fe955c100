"""What dense tasks take from a backbone: the features of all patches, normalised."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from ..patch import Pruned


class Features(NamedTuple):
    """Tokens of all patches (B, patches, D), and the auxiliary predictions (B, patches, outputs), one per module."""

    tokens: Tensor
    aux: list[Tensor]


def patch_features(backbone: Any, images: Tensor, *, predict: bool) -> Features:
    """Features of a backbone that is not pruned, or pruned with Last Layer Fusion."""
    if not isinstance(backbone, Pruned):
        return Features(backbone.forward_features(images)[:, backbone.num_prefix_tokens :], [])
    x, aux = backbone.cropr_features(images, predict=predict)
    return Features(x if backbone.cropr.windows is not None else x[:, backbone.num_prefix_tokens :], aux)


def missing_norm(backbone: Any) -> nn.Module:
    """The norm that features still need: models that average over patches have theirs behind the average."""
    if isinstance(backbone.norm, nn.LayerNorm):
        return nn.Identity()
    return nn.LayerNorm(backbone.embed_dim, eps=1e-6)
