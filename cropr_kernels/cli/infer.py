"""`cropr infer`: run a pruned model over photos or WebDataset shards, and write Parquet.

Work is split into units, a shard or a few thousand photos of a folder; each unit makes one file,
written atomically. Processes share the units without communication; an interrupted run resumes with
the units that have no file, with any number of processes.
"""

import argparse
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models.adapters import find_spec
from ..models.outputs import outputs_of, remove_classifier
from ..models.pixels import Pixels
from ..pruning.api import deploy
from ..pruning.model import CroprModules
from ..utils.images import PHOTO_SUFFIXES, describe_skipped, find_photos, printable
from ..utils.io import atomic_write, require_launcher, write_text
from ..utils.optional import import_optional
from ..utils.progress import Progress
from .common import device_and_dtype, load_with_queries
from .outputs import check_folder

# Readers of Parquet folders ignore names that begin with an underscore.
_DONE = "_SUCCESS"
_SETTINGS = "_settings.json"


_Content = Path | IO[bytes] | None  # of a sample; None without a photo
# A row with source, name and error, and the pixels if there is no error
Read = tuple[dict[str, Any], Tensor | None]


class Unit(NamedTuple):
    """Photos whose results make one file: some of a folder, or those in a shard."""

    source: Path  # folder of the photos, or the shard
    photos: tuple[Path, ...] = ()  # of the folder


def find_units(sources: Sequence[Path], unit: int, skipped: Counter[str]) -> list[Unit]:
    """Find the units of folders and shards, each once, in an order that depends on their names
    only.

    Raises FileNotFoundError or ValueError for a source that is neither.
    """
    units: list[Unit] = []
    for source in sources:
        if source.is_dir():
            units += [Unit(shard) for shard in sorted(source.rglob("*.tar"))]
            photos = find_photos(source, skipped)
            for first in range(0, len(photos), unit):
                units.append(Unit(source, tuple(photos[first : first + unit])))
        elif not source.exists():
            raise FileNotFoundError(f"there is no folder or shard {source}")
        elif source.suffix == ".tar":
            units.append(Unit(source))
        else:
            raise ValueError(
                f"a source must be a folder or a WebDataset shard (.tar), got {source}"
            )
    if not units:
        raise ValueError(f"no photos and no shards in {', '.join(map(str, sources))}")
    return list(dict.fromkeys(units))


def samples(unit: Unit) -> Iterator[tuple[str, _Content]]:
    """Yield name and content of each photo of a unit: a path, a file, or None for a sample without
    photo.

    Names in a shard are those of its members, unchecked as paths. Raises ValueError if a shard does
    not end like a tar file: photos after the damage would be lost.
    """
    if unit.photos:
        yield from ((printable(path.relative_to(unit.source)), path) for path in unit.photos)
        return
    has_photo: dict[str, bool] = {}  # by key of the sample
    with open(unit.source, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as shard:
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


def _read(source: str, name: str, content: _Content, pixels: Pixels) -> Read:
    row = {"source": source, "name": name, "error": None}
    try:
        if content is None:
            raise OSError("no image in this sample")
        return row, pixels.load(content)
    except OSError as error:
        return row | {"error": str(error)}, None


def batches(
    unit: Unit, pixels: Pixels, batch: int, threads: ThreadPoolExecutor
) -> Iterator[list[Read]]:
    """Yield photos of a unit in order, in batches; the next batch is read ahead."""
    source = printable(unit.source)
    pending = samples(unit)

    def start() -> list[Future[Read]]:
        return [threads.submit(_read, source, *sample, pixels) for sample in islice(pending, batch)]

    next_batch = start()
    while next_batch:
        current = next_batch
        next_batch = start()
        yield [future.result() for future in current]


@torch.inference_mode()
def results(
    model: nn.Module,
    pixels: Pixels,
    reads: list[Read],
    top: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    """Return a row per photo: source, name, error, and top classes with probabilities, or features
    for top 0."""
    rows = [row for row, _ in reads]
    photos = [photo for _, photo in reads if photo is not None]
    if not photos:
        return rows
    output = (
        outputs_of(model(pixels.normalize(torch.stack(photos)).to(device, dtype))).float().cpu()
    )
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
    pyarrow, parquet, _ = (
        import_optional(name, "infer", "cropr infer")
        for name in ("pyarrow", "pyarrow.parquet", "PIL.Image")
    )
    check_folder(options.out)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device, dtype = device_and_dtype(options)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    skipped: Counter[str] = Counter()
    units = find_units(options.source, options.unit, skipped)
    del skipped[".tar"]
    model, pixels, _ = load_with_queries(options)
    classifies = find_spec(model).num_classes > 0
    top = options.top if classifies and not options.features else 0
    if options.features and classifies:
        remove_classifier(model)
    prunes = model.cropr.config.schedule.rate != 0  # unpruned, the functional ops are bit-exact
    fast = deploy(model.to(device, dtype), engine=prunes)
    if rank == 0:
        print(f"photos: {pixels}{describe_skipped(skipped)}")
    settings = {"model": options.model, **_settings(model, units)}
    settings |= {"pixels": str(tuple(pixels)), "top": top, "dtype": str(dtype)}
    _claim_folder(options.out / _SETTINGS, settings)
    parts = [options.out / f"part-{index:05d}.parquet" for index in range(len(units))]
    assigned = list(zip(units, parts))[rank::world]
    pending = [(unit, part) for unit, part in assigned if not part.exists()]
    parent = os.getppid()
    texts = pyarrow.string()
    floats = pyarrow.list_(pyarrow.float32())
    columns = (
        {"classes": pyarrow.list_(pyarrow.int32()), "probabilities": floats}
        if top
        else {"features": floats}
    )
    schema = pyarrow.schema({"source": texts, "name": texts, "error": texts} | columns)
    num_photos = 0
    unreadable = 0
    damaged: list[str] = []
    total = (
        sum(len(unit.photos) for unit, _ in pending)
        if all(unit.photos for unit, _ in pending)
        else None
    )
    progress = Progress("photos", total, show=not options.quiet and rank == 0)
    with ThreadPoolExecutor(options.workers) as threads, progress:
        for unit, part in pending:
            require_launcher(parent, "infer")
            rows: list[dict[str, Any]] = []
            try:
                for reads in batches(unit, pixels, options.batch, threads):
                    rows += results(fast, pixels, reads, top, device, dtype)
                    progress.update(len(reads))
            except (OSError, ValueError, tarfile.TarError) as error:
                damaged.append(f"{printable(unit.source)}: {error}")
                continue
            with atomic_write(part) as temporary:
                parquet.write_table(pyarrow.Table.from_pylist(rows, schema), temporary)
            num_photos += len(rows)
            unreadable += sum(row["error"] is not None for row in rows)
    resumed = f", {len(assigned) - len(pending)} were there" if len(pending) < len(assigned) else ""
    prefix = f"process {rank} of {world}: " if world > 1 else ""
    print(
        f"{prefix}{len(pending) - len(damaged)} units{resumed}; {num_photos} photos, {unreadable} "
        "of them unreadable"
    )
    if damaged:
        raise RuntimeError(
            f"{prefix}{len(damaged)} units are damaged, all others are done: {'; '.join(damaged)}"
        )
    if all(part.exists() for part in parts):
        write_text(options.out / _DONE, "")
        print(f"{prefix}all {len(parts)} units are there: {options.out}")


def _settings(model: nn.Module, units: Sequence[Unit]) -> dict[str, Any]:
    """Settings of weights, pruning and photos that the content of the files depends on."""
    modules: CroprModules = model.cropr  # type: ignore[assignment]
    prunes = modules.config.schedule.rate != 0
    weights = [value for name, value in model.state_dict().items() if not name.startswith("cropr.")]
    names = "\n".join(
        f"{unit.source} {list(map(str, unit.photos)) or unit.source.stat().st_size}"
        for unit in units
    )
    return {
        "weights": _digest(weights),
        "schedule": str(modules.config.schedule),
        "llf": str(modules.config.llf),
        "merge": str(modules.config.merge),
        "queries": _digest(
            modules.scorer(layer).query() for layer in range(len(modules) if prunes else 0)
        ),
        "units": len(units),
        "names": hashlib.sha256(os.fsencode(names)).hexdigest()[:16],
    }


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _claim_folder(path: Path, settings: dict[str, object]) -> None:
    """Write the settings of a run; raises ValueError if the folder holds another run."""
    if not path.exists():
        write_text(path, json.dumps(settings, indent=1) + "\n")
        return
    try:
        saved = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}; start again in another folder") from error
    differing = [name for name, value in settings.items() if saved.get(name) != value]
    changed = [f"{name} was {saved.get(name)}, is {settings[name]}" for name in differing]
    if changed:
        raise ValueError(f"{path.parent} holds the results of another run: {'; '.join(changed)}")
