"""Parts, the Parquet files of results: each of a unit, complete or absent, whatever engine writes
it."""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ..utils.images import printable
from ..utils.optional import import_optional
from ..utils.storage import Location, StorageError, names_in, size_of, write_complete
from .predictor import Predictor
from .units import Unit, samples

# Readers of Parquet folders ignore names that begin with an underscore.
_DONE = "_SUCCESS"
_SETTINGS = "_settings.json"


class Outcome(NamedTuple):
    """The work on one unit."""

    photos: int = 0
    unreadable: int = 0
    failure: str = ""  # why there is no part
    # 10^9 multiply-adds of each photo, if photos keep different numbers of tokens
    gflops: Sequence[float] = ()


class Run(NamedTuple):
    """Units, and the folder of their parts."""

    units: Sequence[Unit]
    out: Location

    def part(self, index: int) -> Location:
        return self.out / f"part-{index:05d}.parquet"

    def missing(self, indices: Sequence[int]) -> list[int]:
        """Return those of the units that have no part."""
        written = names_in(self.out)
        return [index for index in indices if self.part(index).name not in written]

    def finish(self) -> bool:
        """Write _SUCCESS if all parts are there, and return whether they are."""
        complete = not self.missing(range(len(self.units)))
        if complete:
            write_complete(self.out / _DONE, b"")
        return complete

    def claim(self, settings: dict[str, Any]) -> None:
        """Write the settings of the model and the photos; raises ValueError if the folder holds
        another run."""
        names = "\n".join(
            f"{unit.source} {list(map(str, unit.photos)) or size_of(unit.source)}"
            for unit in self.units
        )
        digest = hashlib.sha256(os.fsencode(names)).hexdigest()[:16]
        settings = settings | {"units": len(self.units), "names": digest}
        path = self.out / _SETTINGS
        if not path.exists():
            write_complete(path, f"{json.dumps(settings, indent=1)}\n".encode())
            return
        try:
            saved = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged: {error}; start again in another folder"
            ) from error
        changed = changes(saved, settings)
        if changed:
            raise ValueError(f"{self.out} holds the results of another run: {changed}")


def changes(saved: dict[str, Any], settings: dict[str, Any]) -> str:
    """Describe the settings that differ from those saved; empty if none does."""
    differing = [name for name, value in settings.items() if saved.get(name) != value]
    return "; ".join(f"{name} was {saved.get(name)}, is {settings[name]}" for name in differing)


def write_part(
    predictor: Predictor, unit: Unit, part: Location, update: Callable[[int], None] = lambda _: None
) -> Outcome:
    """Run the model over a unit and write its part; the outcome tells a unit that is damaged, or
    whose connection failed.

    `update` is called with the number of photos of each batch.
    """
    names: list[str] = []

    def contents() -> Iterator[Any]:
        for name, content in samples(unit):
            names.append(name)
            yield content

    results: list[dict[str, Any]] = []
    try:
        for batch in predictor.stream(contents()):
            results.append(batch)
            update(len(batch["error"]))
    except (OSError, ValueError, tarfile.TarError) as error:
        return Outcome(failure=f"{printable(str(unit.source))}: {error}")
    table = _table(results, predictor.columns, str(unit.source), names)
    buffer = import_optional("pyarrow", "infer", "cropr infer").BufferOutputStream()
    import_optional("pyarrow.parquet", "infer", "cropr infer").write_table(table, buffer)
    try:
        write_complete(part, buffer.getvalue().to_pybytes())
    except StorageError as error:
        return Outcome(failure=str(error))
    gflops = [value for batch in results for value in batch.get("gflops", []) if value == value]
    return Outcome(len(table), len(table) - table["error"].null_count, gflops=gflops)


def _table(
    results: list[dict[str, Any]], columns: Sequence[str], source: str, names: list[str]
) -> Any:
    """Return an Arrow table with a row per photo; lists are null in rows with an error."""
    numpy, pyarrow = (
        import_optional(name, "infer", "cropr infer") for name in ("numpy", "pyarrow")
    )
    errors = numpy.concatenate([batch["error"] for batch in results] or [[]])
    bad = ~numpy.equal(errors, None).astype(bool)
    text = pyarrow.string()
    table = {
        "source": pyarrow.array([printable(source)] * len(names), text),
        "name": pyarrow.array(names, text),
        "error": pyarrow.array(errors.tolist(), text),
    }
    for column in columns:
        value_type = pyarrow.int32() if column == "classes" else pyarrow.float32()
        rows = [row for batch in results for row in batch[column]]
        lists = [None if is_bad else row for row, is_bad in zip(rows, bad)]
        table[column] = pyarrow.array(lists, pyarrow.list_(value_type))
    return pyarrow.table(table)
