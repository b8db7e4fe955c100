"""Text that people read, and files of it."""

import os
from collections.abc import Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as aligned text, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = (
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths)))
        for line in (head, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
