"""Norms over the width, as the ops take them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class NormParameters(NamedTuple):
    """The last arguments of `gather_norm` and `add_norm_`."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool


def norm_parameters(norm: nn.Module, dtype: torch.dtype) -> NormParameters:
    """Return the parameters of a norm over the width, a LayerNorm or any RMSNorm, for tokens of
    this dtype."""
    if isinstance(norm, nn.LayerNorm):
        return NormParameters(norm.weight, norm.bias, norm.eps, rms=False)
    eps: float | None = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if eps is None:  # PyTorch takes that of the dtype it computes in
        eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return NormParameters(getattr(norm, "weight", None), None, eps, rms=True)
