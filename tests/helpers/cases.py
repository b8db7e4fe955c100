"""One table of inputs for all op tests."""

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# (B, N, D, K, P)
SHAPES = [
    (1, 1, 1, 1, 0),
    (1, 2, 3, 1, 1),
    (2, 5, 8, 3, 1),
    (3, 17, 33, 9, 2),
    (2, 50, 96, 25, 5),
    (2, 65, 48, 52, 1),
    (4, 37, 100, 36, 0),
    (1, 197, 192, 188, 1),
    (2, 40, 64, 5, 5),  # K = P
    (2, 40, 64, 40, 1),  # K = N
    (2, 40, 64, 0, 0),  # K = 0
    (0, 10, 16, 5, 1),  # B = 0
]


def tokens(batch: int, n: int, dim: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(batch, n, dim, device=device).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal element for element, NaN payloads and signs of zero included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def odd_layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in every layout a caller may pass."""
    batch, n, dim = x.shape
    offset = torch.empty(batch * n * dim + 3, dtype=x.dtype, device=x.device)[3:].view(batch, n, dim)
    wide = torch.empty(batch, n, 2 * dim, dtype=x.dtype, device=x.device)
    padded = torch.empty(batch, n + 4, dim, dtype=x.dtype, device=x.device)
    return {
        "transposed": x.transpose(1, 2).contiguous().transpose(1, 2),
        "batch inside": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every other column": wide[:, :, ::2].copy_(x),
        "left half of wider rows": wide.clone()[:, :, :dim].copy_(x),
        "part of a longer sequence": padded[:, 2 : n + 2].copy_(x),
        "odd storage offset": offset.copy_(x),
    }
