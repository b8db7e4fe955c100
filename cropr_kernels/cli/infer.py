"""`cropr infer`: a pruned model over a folder of photos or WebDataset shards, by one process or many, into Parquet.

The work falls into units, a shard or a few thousand photos of a folder, and each unit makes one file that is whole or
not there. Processes share the units and need no word from each other; a run that was stopped goes on with the units it
has no file of, however many processes it then has.
"""

import argparse
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.adapters import find_spec
from ..pruning.api import deploy
from ..utils.io import write_text
from ..utils.viz import PHOTO_SUFFIXES, find_photos, load_photo
from .common import Loaded, add_model_arguments, load_pruned

_DONE, _SETTINGS = "_SUCCESS", "_settings.json"  # readers of Parquet folders pass over names that begin like this


class Unit(NamedTuple):
    """Photos whose results make one file: of a folder, or those in a shard."""

    name: str
    photos: tuple[Path, ...]  # empty for a shard
    root: Path  # names are relative to it; of a shard, the file


def add_parser(commands: Any) -> None:
    """The command's arguments."""
    parser = commands.add_parser(
        "infer",
        help="classify or embed a folder of photos or WebDataset shards, into Parquet",
        description="Run a pruned model over photos. OUT receives part-00000.parquet and so on; the same command goes "
        "on where it was stopped. Under torchrun all processes share the work.",
    )
    add_model_arguments(parser)
    parser.add_argument("source", type=Path, nargs="+", help="folders of photos, or WebDataset shards (.tar)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--features", action="store_true", help="features in place of classes")
    parser.add_argument("--top", type=int, default=5, help="classes of each photo (default: 5)")
    parser.add_argument("--batch", type=int, default=32, help="images at a time (default: 32)")
    parser.add_argument("--unit", type=int, default=2048, help="photos of a folder in one file (default: 2048)")
    parser.add_argument("--workers", type=int, default=4, help="threads that read photos (default: 4)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on cuda")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def find_units(sources: Sequence[Path], unit: int) -> list[Unit]:
    """The units of some folders and shards, in an order that depends on nothing but their names.

    Raises:
        FileNotFoundError: a source is not there.
        ValueError: one is neither a folder nor a .tar file, or there is nothing in any.
    """
    units: list[Unit] = []
    for source in sources:
        if source.is_dir():
            shards, photos = sorted(source.rglob("*.tar")), find_photos(source)
            units += [Unit(str(shard.relative_to(source)), (), shard) for shard in shards]
            for first in range(0, len(photos), unit):
                part = tuple(photos[first : first + unit])
                units.append(Unit(f"{source.name}/{first}", part, source))
        elif not source.exists():
            raise FileNotFoundError(f"there is no folder or shard {source}")
        elif source.suffix == ".tar":
            units.append(Unit(source.name, (), source))
        else:
            raise ValueError(f"{source} is neither a folder nor a WebDataset shard (.tar)")
    if not units:
        raise ValueError(f"no photos and no shards in {', '.join(map(str, sources))}")
    return units


def samples(unit: Unit) -> Iterator[tuple[str, Any]]:
    """Name and content (a path, or bytes) of each photo of a unit; None where a sample of a shard has none.

    Raises:
        OSError, tarfile.TarError: the shard is damaged.
    """
    if unit.photos:
        yield from ((str(path.relative_to(unit.root)), path) for path in unit.photos)
        return
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with open(unit.root, "rb") as stream:
        for sample in group_by_keys(tar_file_expander([{"url": str(unit.root), "stream": stream}])):
            content = next((value for key, value in sample.items() if f".{key.lower()}" in PHOTO_SUFFIXES), None)
            yield sample["__key__"], content


class Read(NamedTuple):
    """A photo as it was read: pixels, or why there are none."""

    name: str
    pixels: Tensor | None
    error: str | None


def _read(sample: tuple[str, Any], size: int) -> Read:
    name, content = sample
    if content is None:
        return Read(name, None, "no image in this sample")
    try:
        return Read(name, load_photo(io.BytesIO(content) if isinstance(content, bytes) else content, size), None)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for files that are broken or no image
        return Read(name, None, str(error) or type(error).__name__)


def batches(unit: Unit, size: int, batch: int, threads: ThreadPoolExecutor) -> Iterator[list[Read]]:
    """Photos of a unit in their order, so many at a time; the next ones are read while these are with the model."""
    source = samples(unit)

    def start() -> list[Any]:
        return [threads.submit(_read, sample, size) for sample in islice(source, batch)]

    waiting = start()
    while waiting:
        following = start()
        yield [future.result() for future in waiting]
        waiting = following


@torch.inference_mode()
def infer_unit(fast: Any, loaded: Loaded, reads: Iterator[list[Read]], top: int, how: Any, progress: Any) -> Any:
    """A table of the results: name, error, and classes with their probabilities, or features."""
    import pyarrow

    columns: dict[str, list[Any]] = {"name": [], "error": []}
    values: dict[str, list[Any]] = {"classes": [], "probabilities": []} if top else {"features": []}
    for batch in reads:
        columns["name"] += [read.name for read in batch]
        columns["error"] += [read.error for read in batch]
        found: dict[str, Iterator[Any]] = {name: iter(()) for name in values}
        pixels = [read.pixels for read in batch if read.pixels is not None]
        if pixels:
            output = fast(loaded.normalise(torch.stack(pixels)).to(**how)).float()
            if top:
                best = output.softmax(1).topk(min(top, output.shape[1]))
                found = {"classes": iter(best.indices.tolist()), "probabilities": iter(best.values.tolist())}
            else:
                found = {"features": iter(output.tolist())}
        for name, column in values.items():
            column += [None if read.pixels is None else next(found[name]) for read in batch]
        progress.update(len(batch))
    kinds = {"classes": pyarrow.int32(), "probabilities": pyarrow.float32(), "features": pyarrow.float32()}
    arrays = {name: pyarrow.array(column, pyarrow.string()) for name, column in columns.items()}
    arrays |= {name: pyarrow.array(column, pyarrow.list_(kinds[name])) for name, column in values.items()}
    return pyarrow.table(arrays)


def run(options: argparse.Namespace) -> None:
    for name, module in (("pyarrow", "pyarrow"), ("webdataset", "webdataset"), ("tqdm", "tqdm")):
        try:
            __import__(module)
        except ImportError as error:
            raise ImportError(f"cropr infer needs {name}: pip install 'cropr_kernels[infer]'") from error
    from pyarrow import parquet
    from tqdm import tqdm

    for name in ("batch", "unit", "workers", "top"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be >= 1, got {getattr(options, name)}")
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(options.device)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    units = find_units(options.source, options.unit)
    loaded = load_pruned(options)
    if options.features and find_spec(loaded.model).num_classes:
        loaded.model.head = torch.nn.Identity()
    top = 0 if options.features or not find_spec(loaded.model).num_classes else options.top
    fast = deploy(loaded.model.to(device, dtype))
    options.out.mkdir(parents=True, exist_ok=True)
    _settle(options.out / _SETTINGS, _settings(options, loaded, units, top, str(dtype)))
    parts = [options.out / f"part-{index:05d}.parquet" for index in range(len(units))]
    mine = [(unit, part) for index, (unit, part) in enumerate(zip(units, parts)) if index % world == rank]
    todo = [(unit, part) for unit, part in mine if not part.exists()]
    done = unreadable = 0
    bar = tqdm(desc="photos", unit="", disable=options.quiet or rank > 0, mininterval=1)
    with ThreadPoolExecutor(options.workers) as threads, bar:
        for unit, part in todo:
            reads = batches(unit, loaded.img_size, options.batch, threads)
            try:
                table = infer_unit(fast, loaded, reads, top, {"device": device, "dtype": dtype}, bar)
            except (OSError, ValueError, tarfile.TarError) as error:
                raise RuntimeError(f"{unit.root}: {error}; {len(mine) - len(todo)} units were done before") from error
            temporary = part.with_name(f".{part.name}.{rank}.tmp")
            parquet.write_table(table, temporary)
            temporary.replace(part)
            done += table.num_rows
            unreadable += table.num_rows - table.column("error").null_count
    before = f", {len(mine) - len(todo)} were there" if len(todo) < len(mine) else ""
    who = f"process {rank} of {world}: " if world > 1 else ""
    print(f"{who}{len(todo)} units{before}; {done} photos, {unreadable} of them unreadable")
    if all(part.exists() for part in parts):
        write_text(options.out / _DONE, "")
        print(f"{who}all {len(parts)} units are there: {options.out}")


def _settings(
    options: argparse.Namespace, loaded: Loaded, units: Sequence[Unit], top: int, dtype: str
) -> dict[str, Any]:
    """All that decides what the files hold."""
    stack = loaded.model.cropr
    queries = torch.stack([module.query().float().cpu() for module in stack]) if len(stack) else torch.empty(0)
    names = "\n".join(f"{unit.name} {list(map(str, unit.photos)) or unit.root.stat().st_size}" for unit in units)
    return {
        "model": options.model,
        "schedule": str(stack.config.schedule),
        "llf": stack.config.llf,
        "merge": str(stack.config.merge),
        "queries": hashlib.sha256(queries.numpy().tobytes()).hexdigest()[:16],
        "mean": list(loaded.mean),
        "std": list(loaded.std),
        "top": top,
        "dtype": dtype,
        "units": len(units),
        "names": hashlib.sha256(names.encode()).hexdigest()[:16],
    }


def _settle(path: Path, settings: dict[str, Any]) -> None:
    """Write down what a run is, or make sure that it is the run that the folder holds.

    Raises:
        ValueError: it is another one.
    """
    if not path.exists():
        write_text(path, json.dumps(settings, indent=1) + "\n")
        return
    before = json.loads(path.read_text())
    changed = [f"{name} was {before.get(name)}, is {now}" for name, now in settings.items() if before.get(name) != now]
    if changed:
        raise ValueError(f"{path.parent} holds the results of another run: {'; '.join(changed)}")
