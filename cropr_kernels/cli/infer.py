"""`cropr infer`: a pruned model over a folder of photos or WebDataset shards, by one process or many, into Parquet.

The work falls into units, a shard or a few thousand photos of a folder, and each unit makes one file that is whole or
not there. Processes share the units and do not communicate; a run that was stopped resumes with the units that have no
file, with any number of processes.
"""

import argparse
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.adapters import find_spec
from ..models.outputs import outputs_of, remove_classifier
from ..models.pixels import Pixels
from ..pruning.api import deploy
from ..utils.images import PHOTO_SUFFIXES, find_photos, shown, told
from ..utils.io import atomic_write, require_launcher, write_text
from ..utils.optional import need
from ..utils.progress import Progress
from .common import load_with_queries, place_of
from .outputs import check_folder

_DONE, _SETTINGS = "_SUCCESS", "_settings.json"  # readers of Parquet folders pass over names that begin like this


class Unit(NamedTuple):
    """Photos whose results make one file: of a folder, or those in a shard."""

    name: str
    photos: tuple[Path, ...]  # empty for a shard
    root: Path  # names are relative to it; of a shard, the file


def find_units(sources: Sequence[Path], unit: int, skipped: Counter[str]) -> list[Unit]:
    """The units of folders and shards, in an order that depends on their names only; errors name what is none."""
    units: list[Unit] = []
    for source in sources:
        if source.is_dir():
            units += [Unit(str(shard.relative_to(source)), (), shard) for shard in sorted(source.rglob("*.tar"))]
            photos = find_photos(source, skipped)
            for first in range(0, len(photos), unit):
                units.append(Unit(f"{source.name}/{first}", tuple(photos[first : first + unit]), source))
        elif not source.exists():
            raise FileNotFoundError(f"there is no folder or shard {source}")
        elif source.suffix == ".tar":
            units.append(Unit(source.name, (), source))
        else:
            raise ValueError(f"a source must be a folder or a WebDataset shard (.tar), got {source}")
    if not units:
        raise ValueError(f"no photos and no shards in {', '.join(map(str, sources))}")
    return units


def samples(unit: Unit) -> Iterator[tuple[str, Any]]:
    """Name and content (a path, or a file) of each photo of a unit; None where a sample of a shard has none.

    A name in a shard is that of its member without the suffix, as it stands there: nobody has checked it as a path.
    Raises ValueError where a shard does not end as tar files do: what is behind the damage would be lost.
    """
    if unit.photos:
        yield from ((shown(path.relative_to(unit.root)), path) for path in unit.photos)
        return
    keys: dict[str, bool] = {}  # of samples, and whether they have a photo
    with open(unit.root, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as shard:
        for member in shard:
            folder, slash, base = shown(member.name).rpartition("/")
            key, dot, _ = base.partition(".")
            if member.isfile() and key and dot:
                stem, suffix = os.path.splitext(base)
                is_photo = suffix.lower() in PHOTO_SUFFIXES
                keys[folder + slash + key] = keys.get(folder + slash + key, False) or is_photo
                if is_photo:
                    yield folder + slash + stem, io.BytesIO(shard.extractfile(member).read())  # type: ignore[union-attr]
        stream.seek(shard.offset)  # tarfile takes a damaged header for the end
        tail = stream.read(1024)
        if tail != bytes(1024) or any(more.strip(b"\0") for more in iter(lambda: stream.read(1 << 20), b"")):
            raise ValueError(f"the shard is damaged at byte {shard.offset}")
    yield from ((key, None) for key, has_photo in keys.items() if not has_photo)


Read = tuple[dict[str, Any], Tensor | None]  # a row with name and error, and the pixels where there is no error


def _read(name: str, content: Any, pixels: Pixels) -> Read:
    try:
        if content is None:
            raise OSError("no image in this sample")
        return {"name": name, "error": None}, pixels.load(content)
    except OSError as error:
        return {"name": name, "error": str(error)}, None


def batches(unit: Unit, pixels: Pixels, batch: int, threads: ThreadPoolExecutor) -> Iterator[list[Read]]:
    """Photos of a unit in their order, so many at a time; the next ones are read while the model runs on these."""
    source = samples(unit)

    def start() -> list[Any]:
        return [threads.submit(_read, *sample, pixels) for sample in islice(source, batch)]

    waiting = start()
    while waiting:
        ready, waiting = waiting, start()
        yield [future.result() for future in ready]


@torch.inference_mode()
def results(fast: Any, pixels: Pixels, reads: list[Read], top: int, place: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per photo: name, error, and classes with their probabilities, or features where top is 0."""
    rows = [row for row, _ in reads]
    photos = [photo for _, photo in reads if photo is not None]
    if not photos:
        return rows
    output = outputs_of(fast(pixels.normalize(torch.stack(photos)).to(**place))).float().cpu()
    readable = [row for row in rows if row["error"] is None]
    for row, values in zip(readable, output):
        if not values.isfinite().all():
            row["error"] = "the model's output is not finite"
        elif top:
            best = values.softmax(0).topk(min(top, len(values)))
            row |= {"classes": best.indices.tolist(), "probabilities": best.values.tolist()}
        else:
            row["features"] = values.tolist()
    return rows


def run(options: argparse.Namespace) -> None:
    pyarrow, parquet, _ = (need(name, "infer", "cropr infer") for name in ("pyarrow", "pyarrow.parquet", "PIL.Image"))
    check_folder(options.out)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    place = place_of(options)
    if place["device"].type == "cuda" and "LOCAL_RANK" in os.environ:
        place["device"] = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    skipped: Counter[str] = Counter()
    units = find_units(options.source, options.unit, skipped)
    del skipped[".tar"]
    model, pixels, _ = load_with_queries(options)
    classifies = find_spec(model).num_classes > 0
    top = options.top if classifies and not options.features else 0
    if options.features and classifies:
        remove_classifier(model)
    prunes = model.cropr.config.schedule.rate != 0  # unpruned, the functional ops give the model's own bits
    fast = deploy(model.to(**place), engine=prunes)
    if rank == 0:
        print(f"photos: {pixels}{told(skipped)}")
    facts = {"pixels": str(tuple(pixels)), "top": top, "dtype": str(place["dtype"])}
    _settle(options.out / _SETTINGS, {"model": options.model, **_settings(model.cropr, units), **facts})
    parts = [options.out / f"part-{index:05d}.parquet" for index in range(len(units))]
    mine = list(zip(units, parts))[rank::world]
    todo = [(unit, part) for unit, part in mine if not part.exists()]
    parent = os.getppid()
    texts, floats = pyarrow.string(), pyarrow.list_(pyarrow.float32())
    columns = {"classes": pyarrow.list_(pyarrow.int32()), "probabilities": floats} if top else {"features": floats}
    schema = pyarrow.schema({"name": texts, "error": texts} | columns)
    done, unreadable, damaged = 0, 0, list[str]()
    total = sum(len(unit.photos) for unit, _ in todo) if all(unit.photos for unit, _ in todo) else None
    progress = Progress("photos", total, show=not options.quiet and rank == 0)
    with ThreadPoolExecutor(options.workers) as threads, progress:
        for unit, part in todo:
            require_launcher(parent, "infer")
            rows: list[dict[str, Any]] = []
            try:
                for reads in batches(unit, pixels, options.batch, threads):
                    rows += results(fast, pixels, reads, top, place)
                    progress.update(len(reads))
            except (OSError, ValueError, tarfile.TarError) as error:
                damaged.append(f"{shown(unit.root)}: {error}")
                continue
            with atomic_write(part) as temporary:
                parquet.write_table(pyarrow.Table.from_pylist(rows, schema), temporary)
            done += len(rows)
            unreadable += sum(row["error"] is not None for row in rows)
    before = f", {len(mine) - len(todo)} were there" if len(todo) < len(mine) else ""
    who = f"process {rank} of {world}: " if world > 1 else ""
    print(f"{who}{len(todo) - len(damaged)} units{before}; {done} photos, {unreadable} of them unreadable")
    if damaged:
        raise RuntimeError(f"{who}{len(damaged)} units are damaged, all others are done: {'; '.join(damaged)}")
    if all(part.exists() for part in parts):
        write_text(options.out / _DONE, "")
        print(f"{who}all {len(parts)} units are there: {options.out}")


def _settings(stack: Any, units: Sequence[Unit]) -> dict[str, Any]:
    """What the content of the files depends on, of the pruning and of the photos."""
    prunes = stack.config.schedule.rate != 0
    queries = torch.stack([module.query().float().cpu() for module in stack]) if prunes else torch.empty(0)
    names = "\n".join(f"{unit.name} {list(map(str, unit.photos)) or unit.root.stat().st_size}" for unit in units)
    return {
        "schedule": str(stack.config.schedule),
        "llf": str(stack.config.llf),
        "merge": str(stack.config.merge),
        "queries": hashlib.sha256(queries.numpy().tobytes()).hexdigest()[:16],
        "units": len(units),
        "names": hashlib.sha256(os.fsencode(names)).hexdigest()[:16],
    }


def _settle(path: Path, settings: dict[str, Any]) -> None:
    """Write what a run is; ValueError where the folder holds another run."""
    if not path.exists():
        write_text(path, json.dumps(settings, indent=1) + "\n")
        return
    try:
        before = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}; begin anew in another folder") from error
    changed = [f"{name} was {before.get(name)}, is {now}" for name, now in settings.items() if before.get(name) != now]
    if changed:
        raise ValueError(f"{path.parent} holds the results of another run: {'; '.join(changed)}")
