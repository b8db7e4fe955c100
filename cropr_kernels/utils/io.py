"""Atomic files, checked reading, and tables as text."""

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
    """Rename a finished file on its file system, durably: sync its data, rename, sync the
    folder."""
    with open(temporary, "r+b") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    with contextlib.suppress(OSError):  # not every file system can sync folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file with the same suffix that becomes `path` if the block ends without an
    error.

    Creates the folder. Until then, and after an error, the previous file stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of several machines may share pids
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        with disk_errors(path):
            yield temporary
            publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise one OSError if a path cannot be written: libraries report a full disk as `unexpected
    pos`."""
    try:
        yield
    except Exception as error:
        cause = error if isinstance(error, OSError) else error.__context__
        of_rust = re.search(r"I/O error: (.+?) \(os error", str(error))  # safetensors
        reason = of_rust[1] if of_rust else cause.strerror if isinstance(cause, OSError) else None
        if (
            isinstance(cause, OSError)
            and cause.filename
            and Path(cause.filename).parent != path.parent
        ):
            raise  # of a file that was read
        if (
            reason is None
            and path.parent.is_dir()
            and shutil.disk_usage(path.parent).free < 1 << 16
        ):
            reason = "No space left on device"
        if reason is None and "inline_container" in str(error):  # of torch.save, for any cause
            reason = "only a part fits: a limit of file sizes, or of the disk"
        if reason is None:
            raise
        error_type = type(error) if isinstance(error, OSError) else OSError
        raise error_type(
            f"{path} cannot be written: {reason}; fix this or choose another path"
        ) from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def load_tensors(path: str | Path, classes: Sequence[type] = ()) -> Any:
    """Load a file of torch.save on the CPU: tensors and plain values.

    `classes` are allowed besides. Raises FileNotFoundError, or ValueError if the file is damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        if zipfile.is_zipfile(path):  # torch.load does not verify checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(
                    f"{path} cannot be read: the checksum of {damaged} does not match; copy it "
                    "again"
                )
        with torch.serialization.safe_globals([*classes]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises errors of every type, with long advice
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} cannot be read: {_unreadable(Path(path), str(error))}") from error


def _unreadable(path: Path, error: str) -> str:
    """Explain why torch.load cannot read a file, and how to fix it."""
    unsafe = re.search(r"GLOBAL (\S+)", error)
    if unsafe:
        return (
            f"it holds objects of {unsafe[1]}, and only tensors are read; "
            "torch.save(model.state_dict(), FILE)"
        )
    with open(path, "rb") as file:
        header = file.read(24)
    return (
        f"it is damaged, or not a file of torch.save: it begins with {header!r}; copy or download "
        "it again"
    )


def load_safetensors(
    path: str | Path, substring: str = ""
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load the tensors with `substring` in their names, and the metadata.

    Raises FileNotFoundError, or ValueError if the file cannot be read.
    """
    safetensors = import_optional("safetensors", "demo", f"file {path}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = [name for name in file.keys() if substring in name]  # noqa: SIM118  (not a dict)
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}; copy or download it again") from error


def require_launcher(parent: int, command: str) -> None:
    """Raise RuntimeError if torchrun started this process from `parent` and is gone: others may end
    too."""
    if os.getppid() != parent and "TORCHELASTIC_RUN_ID" in os.environ:
        raise RuntimeError(
            f"{command}: torchrun, which started this process, is gone; the same command resumes "
            "the run"
        )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left_aligned: int = 1) -> str:
    """Format cells as aligned text: the first `left_aligned` columns to the left, all others to the
    right."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    sides = ["<"] * left_aligned + [">"] * (len(head) - left_aligned)
    lines = [
        [f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths)]
        for line in (head, *rows)
    ]
    return "\n".join("  ".join(cells).rstrip() for cells in lines)
