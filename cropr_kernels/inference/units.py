"""Units of work: photos of a folder, a WebDataset shard or a Parquet file, by path or by URL."""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..utils.images import PHOTO_SUFFIXES, find_photos, printable
from ..utils.optional import import_optional
from ..utils.storage import Location, RemotePath, open_binary

_FILES = (".tar", ".parquet")  # of which each is a unit
Content = Path | RemotePath | IO[bytes] | None  # of a sample; None without a photo


class Unit(NamedTuple):
    """Photos whose results make one file: some of a folder, or those in a shard or Parquet file."""

    source: Location  # folder of the photos, the shard, or the Parquet file
    photos: tuple[Location, ...] = ()  # of the folder


def find_units(sources: Sequence[Location], unit: int, skipped: Counter[str]) -> list[Unit]:
    """Find the units of folders, shards and Parquet files, each once, in an order that depends on
    their names only.

    A URL may contain *. Parquet files are named, not searched: results may be in the same folder.
    Raises FileNotFoundError or ValueError for a source that is none of these.
    """
    units: list[Unit] = []
    for source in _expand(sources):
        if source.suffix in _FILES and (isinstance(source, RemotePath) or source.is_file()):
            units.append(Unit(source))
            continue
        shards, photos = _search(source, skipped)
        units += map(Unit, shards)
        for first in range(0, len(photos), unit):
            units.append(Unit(source, tuple(photos[first : first + unit])))
    if not units:
        raise ValueError(f"no photos and no shards in {', '.join(map(str, sources))}")
    return list(dict.fromkeys(units))


def _expand(sources: Sequence[Location]) -> Iterator[Location]:
    for source in sources:
        if isinstance(source, RemotePath) and "*" in source.url:
            yield from source.glob()
        elif isinstance(source, RemotePath) or source.exists():
            yield source
        else:
            raise FileNotFoundError(f"there is no folder or shard {source}")


def _search(
    folder: Location, skipped: Counter[str]
) -> tuple[Sequence[Location], Sequence[Location]]:
    """Return the shards and the photos below a folder; `skipped` counts its other files."""
    if isinstance(folder, Path):
        if not folder.is_dir():
            raise ValueError(
                "a source must be a folder, a WebDataset shard (.tar) or a .parquet file, got "
                f"{folder}"
            )
        photos = find_photos(folder, skipped)
        del skipped[".tar"]
        return sorted(folder.rglob("*.tar")), photos
    files = folder.find()
    shards = [file for file in files if file.suffix == ".tar"]
    remote_photos = [file for file in files if file.suffix.lower() in PHOTO_SUFFIXES]
    skipped.update(
        file.suffix.lower() or "no suffix"
        for file in files
        if file.suffix.lower() not in {*PHOTO_SUFFIXES, ".tar"}
    )
    return shards, remote_photos


def samples(unit: Unit) -> Iterator[tuple[str, Content]]:
    """Yield name and content of each photo of a unit: a path, a file, or None for a sample without
    photo.

    Names in a shard are those of its members, unchecked as paths. Raises ValueError if a shard does
    not end like a tar file: photos after the damage would be lost.
    """
    if unit.photos:
        for path in unit.photos:
            yield printable(path.relative_to(unit.source)), path  # type: ignore[arg-type]
    elif unit.source.suffix == ".parquet":
        yield from _rows(unit)
    else:
        yield from _members(unit)


def _members(unit: Unit) -> Iterator[tuple[str, Content]]:
    has_photo: dict[str, bool] = {}  # by key of the sample
    with (
        open_binary(unit.source) as stream,
        tarfile.open(fileobj=stream, mode="r:") as shard,
    ):
        for member in shard:
            folder, slash, base = printable(member.name).rpartition("/")
            key, dot, _ = base.partition(".")
            if member.isfile() and key and dot:
                is_photo = os.path.splitext(base)[1].lower() in PHOTO_SUFFIXES
                has_photo[folder + slash + key] = (
                    has_photo.get(folder + slash + key, False) or is_photo
                )
                if is_photo:
                    yield folder + slash + base, io.BytesIO(shard.extractfile(member).read())  # type: ignore[union-attr]
        stream.seek(shard.offset)  # tarfile takes a damaged header for the end
        tail = stream.read(1024)
        if tail != bytes(1024) or any(
            chunk.strip(b"\0") for chunk in iter(lambda: stream.read(1 << 20), b"")
        ):
            raise ValueError(f"the shard is damaged at byte {shard.offset}")
    yield from ((key, None) for key, is_photo in has_photo.items() if not is_photo)


def _rows(unit: Unit) -> Iterator[tuple[str, Content]]:
    """Yield the photos in a Parquet file; the name is the `path` beside its bytes, or its row."""
    parquet = import_optional("pyarrow.parquet", "infer", "cropr infer")
    with open_binary(unit.source) as stream, parquet.ParquetFile(stream) as file:
        column = _photo_column(file.schema_arrow)
        row = 0
        for batch in file.iter_batches(batch_size=64, columns=[column]):
            for value in batch.column(0).to_pylist():
                fields = value if isinstance(value, dict) else {"bytes": value}
                content = fields["bytes"]
                name = printable(fields.get("path") or str(row))
                yield name, None if content is None else io.BytesIO(content)
                row += 1


def _photo_column(schema: Any) -> str:
    """Name the column of photos: the only one of binary values, or of structs with `bytes`, as
    Hugging Face datasets writes; raises ValueError if there is not exactly one."""
    types = import_optional("pyarrow.types", "infer", "cropr infer")

    def holds_bytes(value_type: Any) -> bool:
        if types.is_struct(value_type):
            index = value_type.get_field_index("bytes")
            return index >= 0 and holds_bytes(value_type.field(index).type)
        return types.is_binary(value_type) or types.is_large_binary(value_type)

    names = [field.name for field in schema if holds_bytes(field.type)]
    if len(names) != 1:
        raise ValueError(
            "a Parquet file of photos must have one column of bytes, or of structs with bytes, has "
            f"{', '.join(names) or 'none'}"
        )
    return names[0]
