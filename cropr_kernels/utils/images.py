"""Photos: where they are, and their pixels."""

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .optional import import_optional

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
_LONGEST = 8  # sides of a photo: of a longer one the middle is looked at


def find_photos(folder: Path, skipped: Counter[str] | None = None) -> list[Path]:
    """Photos in a folder and all folders below it, linked ones too, by their suffix, sorted.

    `skipped` counts the other files by their suffix.
    """
    found, seen, others = [], set(), Counter[str]() if skipped is None else skipped
    for path, folders, names in os.walk(folder, onerror=lambda _: others.update(["unreadable"]), followlinks=True):
        place = os.stat(path)
        if (place.st_dev, place.st_ino) in seen:  # a link to a folder that has been here
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        for file in (Path(path, name) for name in names):
            if file.suffix.lower() in PHOTO_SUFFIXES and file.is_file():
                found.append(file)
            else:
                others[file.suffix.lower() or "no suffix"] += 1
    return sorted(found)


def find_named_photos(paths: Sequence[Path], skipped: Counter[str] | None = None) -> list[Path]:
    """The photos among these paths, and those of the folders among them; ValueError if there is none at all.

    `skipped` counts the other files in the folders.
    """
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is no photo or folder {path}")
    found = [photo for path in paths for photo in (find_photos(path, skipped) if path.is_dir() else [path])]
    if not found:
        raise ValueError(f"no photos ({', '.join(sorted(PHOTO_SUFFIXES))}) in {', '.join(map(str, paths))}")
    return found


def shown(name: str | Path) -> str:
    """A name as valid text: bytes that are not UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def told(skipped: Counter[str]) -> str:
    """What was skipped, as text: " (skipped 3 files: 2 .heic, 1 .txt)", or nothing."""
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common())
    return f" (skipped {skipped.total()} files: {kinds})" if skipped else ""


def open_photo(file: Any, *, upright: bool = True) -> Any:
    """A photo as an RGB image of Pillow, turned as its EXIF data say, 16-bit and floating-point pixels scaled.

    `file` is a path, or a binary file object. Whatever is wrong with it is an OSError: it does not exist, is no image,
    is damaged, or has more pixels than Pillow allows (2 * PIL.Image.MAX_IMAGE_PIXELS, about 179 million). Raises
    ImportError where Pillow is not installed.
    """
    Image, ImageOps = (import_optional(f"PIL.{name}", "viz", "reading photos") for name in ("Image", "ImageOps"))
    if isinstance(file, str | os.PathLike) and Path(file).exists() and not Path(file).is_file():
        raise OSError(f"{shown(Path(file))} is no file")
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened) if upright else opened
            if image.mode == "F" or image.mode.startswith("I"):
                image = _to_8_bits(image)
            return image.convert("RGB")
    except Exception as error:  # Pillow raises whatever its decoders meet
        raise OSError(str(error) or type(error).__name__) from error


def _to_8_bits(image: Any) -> Any:
    """Grey pixels of 16 bits, or floating-point ones in [0, 1], [0, 255] or [0, 65535]."""
    exact = image.mode == "F"
    image = image.convert("F")
    low, high = image.getextrema()
    tops = (1, 255, 65535) if exact else (65535,)
    top = next((top for top in tops if low >= 0 and high <= top), None)
    if top is None:
        raise ValueError(f"pixels must be in one of {', '.join(f'[0, {top}]' for top in tops)}, are in [{low}, {high}]")
    return image.point(lambda value: value * (255 / top) + 0.5).convert("L")


def load_photo(
    file: Any,
    size: int | tuple[int, int] = 224,
    *,
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
    squash: bool = False,
) -> Tensor:
    """Read a photo as models look at it in evaluation: (3, height, width) float32 in [0, 1].

    It is resized so that its shorter side is the size over crop_pct, and its centre is cropped, bit for bit as timm
    does it; of a photo more than 8 times as long as wide the middle is taken first. Errors are those of `open_photo`.

    Args:
        file: a path, or a binary file object.
        size: height and width in pixels.
        crop_pct: share of the resized photo's side that the crop takes.
        interpolation: "bicubic", "bilinear", "lanczos" or another of Pillow's filters.
        squash: resize both sides to the size over crop_pct, whatever the photo's shape.
    """
    image, sides = open_photo(file), (size, size) if isinstance(size, int) else size
    shorter = min(image.size)
    if not squash and max(image.size) > _LONGEST * shorter:
        image = _centre(image, *(min(side, _LONGEST * shorter) for side in reversed(image.size)))
    height, width = (math.floor(side / crop_pct) for side in sides)
    if not squash:
        scale = max(height / image.height, width / image.width)
        height, width = max(height, int(image.height * scale)), max(width, int(image.width * scale))
    resampling = getattr(import_optional("PIL.Image", "viz", "reading photos").Resampling, interpolation.upper())
    if image.size != (width, height):
        image = image.resize((width, height), resampling)
    image = _centre(image, *sides)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*sides, 3)
    return pixels.permute(2, 0, 1).float() / 255


def _centre(image: Any, height: int, width: int) -> Any:
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def readable(paths: Iterable[Path], load: Any, unreadable: list[str]) -> Iterable[tuple[Path, Tensor]]:
    """Paths with their photos; those that cannot be read go to a list, with the reason."""
    for path in paths:
        try:
            yield path, load(path)
        except OSError as error:
            unreadable.append(f"{shown(path)}: {error}")
