"""Colors of features: three principal components."""

import torch
from torch import Tensor


class ColorScale:
    """Projection on the first three principal components of some features, as colors.

    Args:
        features: (patches, D), which span the range of the colors but for 2 % at each end.
    """

    def __init__(self, features: Tensor):
        self.mean = features.mean(0)
        centered = features - self.mean
        vectors = torch.linalg.eigh(centered.T @ centered).eigenvectors
        self.components = vectors[:, -3:].flip(1)
        low, high = (centered @ self.components).quantile(torch.tensor([0.02, 0.98]), dim=0)
        self.low = low
        self.span = (high - low).clamp_min(1e-12)

    def colors(self, features: Tensor) -> Tensor:
        """Colors (patches, 3) in [0, 1] of features (patches, D)."""
        values = (features - self.mean) @ self.components
        return ((values - self.low) / self.span).clamp(0, 1)
