"""Files that are whole or not there, and tables as text."""

import contextlib
import os
import re
import shutil
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .optional import import_optional


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, once all of it is on the disk, then the name; on the same file system only."""
    with open(temporary, "r+b") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    with contextlib.suppress(OSError):  # not every file system takes folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary file to write to, with the same suffix, which becomes `path` where the block ends without an error.

    Its folder is made where there is none.

    Until then, and after an error, what was there before stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")  # processes of several machines may share pids
    try:
        with disk_errors(path):
            yield temporary
            publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """One OSError for a path that cannot be written: libraries say `unexpected pos 896 vs 854` of a full disk."""
    try:
        yield
    except Exception as error:
        cause = error if isinstance(error, OSError) else error.__context__
        of_rust = re.search(r"I/O error: (.+?) \(os error", str(error))  # safetensors
        reason = of_rust[1] if of_rust else cause.strerror if isinstance(cause, OSError) else None
        if isinstance(cause, OSError) and cause.filename and Path(cause.filename).parent != path.parent:
            raise  # of a file that was read
        if reason is None and path.parent.is_dir() and shutil.disk_usage(path.parent).free < 1 << 16:
            reason = "No space left on device"
        if reason is None and "inline_container" in str(error):  # of torch.save, whatever stopped it
            reason = "only a part fits: a limit of file sizes, or of the disk"
        if reason is None:
            raise
        kind = type(error) if isinstance(error, OSError) else OSError
        raise kind(f"{path} cannot be written: {reason}; mend that or name another place") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def load_tensors(path: str | Path, safe: Sequence[Any] = ()) -> Any:
    """Tensors and plain values that torch.save wrote, on the CPU; FileNotFoundError, or ValueError if damaged.

    `safe` are classes that the file may hold beside them.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{path} cannot be read: the checksum of {damaged} does not match; copy it again")
        with torch.serialization.safe_globals([*safe]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler meets, and long advice
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} cannot be read: {_unreadable(Path(path), str(error))}") from error


def _unreadable(path: Path, error: str) -> str:
    """Why torch.load cannot read a file, and what to do."""
    found = re.search(r"GLOBAL (\S+)", error)
    if found:
        return f"it holds objects of {found[1]}, and only tensors are read; torch.save(model.state_dict(), FILE)"
    with open(path, "rb") as file:
        begins = file.read(24)
    return f"it is damaged, or no file of torch.save: it begins with {begins!r}; copy or download it again"


def load_safetensors(path: str | Path, part: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, of those with `part` in their names, and metadata; FileNotFoundError, or ValueError if unreadable."""
    safetensors = import_optional("safetensors", "demo", f"file {path}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = [name for name in file.keys() if part in name]  # noqa: SIM118  (it is no dict)
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}; copy or download it again") from error


def require_launcher(parent: int, what: str) -> None:
    """Raise RuntimeError where torchrun started this process, then by this parent, and is gone: others may follow."""
    if os.getppid() != parent and "TORCHELASTIC_RUN_ID" in os.environ:
        raise RuntimeError(f"{what}: torchrun, which started this process, is gone; the same command resumes the run")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Cells as aligned text, the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    sides = ["<"] * left + [">"] * (len(head) - left)
    lines = [[f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths)] for line in (head, *rows)]
    return "\n".join("  ".join(cells).rstrip() for cells in lines)
