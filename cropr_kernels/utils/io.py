"""Files that are whole or not there, and tables as text."""

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, once all of it is on the disk; it must be on the same file system."""
    with open(temporary, "r+b") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary file to write to, with the same suffix, which becomes `path` where the block ends without an error.

    Until then, and after an error, what was there before stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")  # processes of several machines may share pids
    try:
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def load_tensors(path: str | Path) -> Any:
    """What torch.save wrote to a file, on the CPU: tensors and plain values only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler meets
        raise ValueError(f"{path} cannot be read: {error}") from error


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Cells as aligned text, the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = (
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in (head, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)
