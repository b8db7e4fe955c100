"""Files of COCO annotations; what does not fit is named with its file and its annotation."""

import json
import math
import reprlib
from collections.abc import Container
from pathlib import Path
from typing import Any, TypeGuard

from ..utils.optional import import_optional

Entry = dict[str, Any]  # an image, a category or an annotation, as COCO writes it
_FIELDS = {
    "images": ("id", "file_name"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}


def read_coco(path: Path, *, masks: bool) -> Any:
    """Read a file of annotations as a COCO object of faster_coco_eval.

    Annotations of images that the file does not list are left alone.

    Args:
        path: the JSON file.
        masks: annotations need a segmentation, and images their height and width.

    Raises:
        ValueError: the file is not JSON, or holds no images or no categories; an entry lacks a
            field, has the id of another, or an annotation has a box, category or segmentation that
            does not fit.
        ImportError: faster_coco_eval is not installed.
    """
    coco = import_optional("faster_coco_eval", "train", "cropr train").COCO
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
        for section, fields in _FIELDS.items():
            _check_fields(
                content.get(section, []),
                section,
                (*fields, *("height", "width") * (masks and section == "images")),
            )
        read = coco(content, print_function=lambda *_: None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"detection: {path} is not a file of COCO annotations: {error}") from error
    if not read.imgs or not read.cats:
        counts = f"{len(read.imgs)} images and {len(read.cats)} categories"
        raise ValueError(f"detection: {path} must hold images and categories, holds {counts}")
    for entry in read.anns.values():
        image = read.imgs.get(entry["image_id"])
        fault = image and _fault(
            entry, read.cats, [image["height"], image["width"]] if masks else None
        )
        if fault:
            raise ValueError(f"detection: {path}, annotation {entry['id']}: {fault}")
    return read


def _check_fields(entries: list[Entry], section: str, fields: tuple[str, ...]) -> None:
    """Raise ValueError for an entry that lacks a field, or has the id of another."""
    ids = set()
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise TypeError(f"{section}[{index}] is {reprlib.repr(entry)}")
        missing = [field for field in fields if entry.get(field) is None]
        if missing:
            raise ValueError(f"{section}[{index}], of id {entry.get('id')}, has no {missing[0]}")
        if entry["id"] in ids:
            raise ValueError(f"several {section} have the id {entry['id']}")
        ids.add(entry["id"])


def _fault(entry: Entry, categories: Container[object], size: list[int] | None) -> str | None:
    """Return what is wrong with an annotation, and with its segmentation of an image of `size`, if
    that is given."""
    box = entry["bbox"]
    if not _are_numbers(box) or len(box) != 4:
        return f"bbox must be 4 finite numbers, x, y, width and height, got {reprlib.repr(box)}"
    if entry["category_id"] not in categories:
        return f"category_id must be that of a category in the file, got {entry['category_id']!r}"
    if size is None:
        return None
    shape = entry.get("segmentation")
    if isinstance(shape, dict):
        if shape.get("size") != size:
            return (
                f"size of its run-length encoding must be that of its image, {size}, got "
                f"{shape.get('size')!r}"
            )
        counts = shape.get("counts")
        if isinstance(counts, str) or (
            _are_numbers(counts) and min(counts) >= 0 and sum(counts) == math.prod(size)
        ):
            return None
        return (
            f"counts of its run-length encoding must add up to {math.prod(size)} pixels, got "
            f"{reprlib.repr(counts)}"
        )
    if isinstance(shape, list) and shape and all(_is_polygon(part) for part in shape):
        return None
    return (
        "segmentation must be polygons of 3 points or more, or a run-length encoding, got "
        f"{reprlib.repr(shape)}"
    )


def _is_polygon(part: object) -> bool:
    return _are_numbers(part) and len(part) >= 6 and len(part) % 2 == 0


def _are_numbers(values: object) -> TypeGuard[list[float]]:
    try:
        return isinstance(values, list) and bool(values) and math.isfinite(sum(values))
    except TypeError:
        return False
