"""Pictures of a comparison: tiles, and the colors of features.

All raise ImportError if Pillow is not installed.
"""

import base64
import io
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.optional import import_optional
from ..utils.viz import tile_colors

SIDE = 224  # pixels of the longer side of a picture, about; browsers enlarge it
_FADED = 0.12  # share of the photo in dropped patches; the rest is white


def _scaled(image: Tensor, grid: tuple[int, int]) -> tuple[Tensor, int]:
    """Scale (C, h, w) to whole pixels a patch of the grid; return it and the side of a patch."""
    side = max(SIDE // max(grid), 4)
    size = (grid[0] * side, grid[1] * side)
    if image.shape[1:] == grid:
        return image.repeat_interleave(side, 1).repeat_interleave(side, 2), side
    if image.shape[1:] != size:
        image = F.interpolate(image.unsqueeze(0).float(), size, mode="bicubic")[0]
    return image, side


def picture(image: Tensor) -> Any:
    """Convert an image (1 or 3, H, W) in [0, 1] to one of Pillow."""
    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = levels.expand(3, -1, -1).permute(1, 2, 0).contiguous()
    Image = import_optional("PIL.Image", "view", "a picture")
    return Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), pixels.numpy().tobytes())


def draw_tiles(image: Tensor, token_map: Tensor) -> Any:
    """Draw the tokens of a photo: each is a tile in its mean color, with a white edge.

    Dropped patches are faded. The image is (1 or 3, H, W) in [0, 1]; token_map (grid height, grid
    width) numbers the tokens, -1 for dropped patches.
    """
    height, width = token_map.shape
    tiles, side = _scaled(tile_colors(image, token_map), (height, width))
    labels = token_map.repeat_interleave(side, 0).repeat_interleave(side, 1)
    if (labels < 0).any():
        faded = _FADED * _scaled(image, (height, width))[0] + (1 - _FADED)
        tiles = torch.where(labels < 0, faded, tiles)
    is_edge = torch.zeros_like(labels, dtype=torch.bool)
    is_edge[1:] |= labels[1:] != labels[:-1]
    is_edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    return picture(tiles.masked_fill(is_edge, 1.0))


def draw_colors(colors: Tensor, grid: tuple[int, int]) -> Any:
    """Draw colors (patches, 3) in [0, 1], each as a square."""
    return picture(_scaled(colors.T.unflatten(1, grid), grid)[0])


def data_uri(image: Any) -> str:
    """Encode an image of Pillow as the address of an <img>: nothing is written to disk."""
    content = io.BytesIO()
    image.save(content, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
