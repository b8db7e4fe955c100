"""Finding and reading photos."""

import contextlib
import io
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .optional import import_optional

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
# A path, or the photo: a file object, its bytes, an image of Pillow, an array (height, width, 3)
PhotoFile = str | os.PathLike[str] | IO[bytes] | bytes | Any
_MAX_ASPECT = 8  # longer photos are cropped to their center first


def find_photos(folder: Path, skipped: Counter[str] | None = None) -> list[Path]:
    """Find photos by suffix in a folder and all folders below it, also linked ones; sorted.

    `skipped` counts the other files by suffix.
    """
    photos = []
    visited = set()
    skipped = Counter() if skipped is None else skipped
    for path, folders, names in os.walk(
        folder, onerror=lambda _: skipped.update(["unreadable"]), followlinks=True
    ):
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in visited:  # a link to a visited folder
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        for file in (Path(path, name) for name in names):
            if file.suffix.lower() in PHOTO_SUFFIXES and file.is_file():
                photos.append(file)
            else:
                skipped[file.suffix.lower() or "no suffix"] += 1
    return sorted(photos)


def find_named_photos(paths: Sequence[Path], skipped: Counter[str] | None = None) -> list[Path]:
    """Find the photos among these paths and in the folders among them.

    `skipped` counts the other files in the folders. Raises FileNotFoundError for a missing path,
    and ValueError if there is no photo at all.
    """
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is no photo or folder {path}")
    photos: list[Path] = []
    for path in paths:
        photos += find_photos(path, skipped) if path.is_dir() else [path]
    if not photos:
        raise ValueError(
            f"no photos ({', '.join(sorted(PHOTO_SUFFIXES))}) in {', '.join(map(str, paths))}"
        )
    return photos


def printable(name: str | Path) -> str:
    """Return a name as valid text, with bytes that are not UTF-8 escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def describe_skipped(skipped: Counter[str]) -> str:
    """Format counts as " (skipped 3 files: 2 .heic, 1 .txt)", or as nothing."""
    counts = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common())
    return f" (skipped {skipped.total()} files: {counts})" if skipped else ""


def open_photo(file: PhotoFile, *, upright: bool = True) -> Any:
    """Open a photo as an RGB image of Pillow, rotated by its EXIF data, pixels scaled to 8 bits.

    Takes a path, a file object, the bytes of a file, an image of Pillow, or an array that
    `PIL.Image.fromarray` takes, such as (height, width, 3) uint8.

    Raises OSError for every problem of the file: it does not exist, is not an image, is damaged, or
    has more pixels than Pillow allows (2 * PIL.Image.MAX_IMAGE_PIXELS, about 179 million). Raises
    ImportError if Pillow is not installed.
    """
    Image = import_optional("PIL.Image", "viz", "reading photos")
    ImageOps = import_optional("PIL.ImageOps", "viz", "reading photos")
    if isinstance(file, str | os.PathLike) and Path(file).exists() and not Path(file).is_file():
        raise OSError(f"{printable(Path(file))} is not a file")
    try:
        with _open_image(file, Image) as opened:
            if 0 in opened.size:
                raise ValueError(f"a photo must have pixels, its size is {opened.size}")
            image = ImageOps.exif_transpose(opened) if upright else opened
            if image.mode == "F" or image.mode.startswith("I"):
                image = _to_8_bits(image)
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise errors of every type
        reason = re.sub(r" <_io\.\w+ object at \w+>", "", str(error))  # or no two runs are alike
        raise OSError(reason or type(error).__name__) from error


def _open_image(file: PhotoFile, Image: Any) -> contextlib.AbstractContextManager[Any]:
    if isinstance(file, bytes | bytearray | memoryview):
        file = io.BytesIO(file)
    if hasattr(file, "__array_interface__") and not isinstance(file, Image.Image):
        file = Image.fromarray(file)
    if not isinstance(file, str | os.PathLike | Image.Image) and not hasattr(file, "read"):
        raise TypeError(
            "a photo must be bytes, an array, an image, a file or a path, got "
            f"{type(file).__name__}"
        )
    return contextlib.nullcontext(file) if isinstance(file, Image.Image) else Image.open(file)


def _to_8_bits(image: Any) -> Any:
    """Scale gray pixels of 16 bits, or floating-point ones in [0, 1], [0, 255] or [0, 65535]."""
    is_float = image.mode == "F"
    image = image.convert("F")
    low, high = image.getextrema()
    tops = (1, 255, 65535) if is_float else (65535,)
    top = next((top for top in tops if low >= 0 and high <= top), None)
    if top is None:
        raise ValueError(
            f"pixels must be in one of {', '.join(f'[0, {top}]' for top in tops)}, are in [{low}, "
            f"{high}]"
        )
    return image.point(lambda value: value * (255 / top) + 0.5).convert("L")


def load_photo(
    file: PhotoFile,
    size: int | tuple[int, int] = 224,
    *,
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
    squash: bool = False,
) -> Tensor:
    """Read a photo for evaluation: (3, height, width) float32 in [0, 1], contiguous.

    Resizes it so that its shorter side is size / crop_pct, and crops the center, bit for bit as
    timm does; photos more than 8 times as long as wide are cropped first. Raises the errors of
    `open_photo`.

    Args:
        file: a path, or a photo as `open_photo` takes it.
        size: height and width in pixels.
        crop_pct: side of the crop over that of the resized photo.
        interpolation: "bicubic", "bilinear", "lanczos" or another of Pillow's filters.
        squash: resize both sides to size / crop_pct, ignoring the aspect ratio.
    """
    image = open_photo(file)
    sides = (size, size) if isinstance(size, int) else size
    shorter = min(image.size)
    if not squash and max(image.size) > _MAX_ASPECT * shorter:
        image = _crop_center(
            image, *(min(side, _MAX_ASPECT * shorter) for side in reversed(image.size))
        )
    height, width = (math.floor(side / crop_pct) for side in sides)
    if not squash:
        scale = max(height / image.height, width / image.width)
        height = max(height, int(image.height * scale))
        width = max(width, int(image.width * scale))
    resampling = getattr(
        import_optional("PIL.Image", "viz", "reading photos").Resampling, interpolation.upper()
    )
    if image.size != (width, height):
        image = image.resize((width, height), resampling)
    image = _crop_center(image, *sides)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*sides, 3)
    return pixels.permute(2, 0, 1).contiguous().float() / 255


def _crop_center(image: Any, height: int, width: int) -> Any:
    top = round((image.height - height) / 2)
    left = round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def read_photos(
    paths: Iterable[Path], load: Callable[[Path], Tensor], unreadable: list[str]
) -> Iterable[tuple[Path, Tensor]]:
    """Yield paths with their photos; collect photos that cannot be read, with the reason."""
    for path in paths:
        try:
            yield path, load(path)
        except OSError as error:
            unreadable.append(f"{printable(path)}: {error}")
