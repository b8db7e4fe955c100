"""Photos: where they are, and their pixels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .optional import need

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def find_photos(folder: Path) -> list[Path]:
    """Photos in a folder and all folders below it, by their suffix, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES)


def find_named_photos(paths: Sequence[Path]) -> list[Path]:
    """The photos among these paths, and those of the folders among them.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: there is no photo at all.
    """
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is no photo or folder {path}")
    found = [photo for path in paths for photo in (find_photos(path) if path.is_dir() else [path])]
    if not found:
        raise ValueError(f"no photos ({', '.join(sorted(PHOTO_SUFFIXES))}) in {', '.join(map(str, paths))}")
    return found


def load_photo(file: Any, size: int | tuple[int, int] = 224) -> Tensor:
    """Read a photo, resize it to cover 8/7 of `size`, crop the centre: (3, height, width) float32 in [0, 1].

    Args:
        file: a path, or a binary file object.
        size: height and width, or both in one.

    Raises:
        ImportError: Pillow is not installed.
        OSError: the file does not exist, is no image, is damaged, or has more pixels than Pillow allows.
    """
    Image = need("PIL.Image", "viz", "reading photos")
    height, width = (size, size) if isinstance(size, int) else size
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(str(error) or type(error).__name__) from error
    scale = max(round(height * 8 / 7) / image.height, round(width * 8 / 7) / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return pixels.permute(2, 0, 1).float() / 255
