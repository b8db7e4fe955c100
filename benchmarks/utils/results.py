"""Results: JSON files of rows, and the environment in which they were measured."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from cropr_kernels.utils.io import write_text

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
Row = dict[str, Any]  # column -> value


class Results:
    """Rows of one JSON file, rewritten after every change: an interrupted run loses nothing.

    Args:
        path: the file.
        environment: hardware and versions with which the rows are measured.
        keys: the columns that identify a cell. With keys the rows of an existing file stay, and a
            run resumes; without keys it starts afresh.
    """

    def __init__(self, path: Path, environment: dict[str, Any], keys: Sequence[str] = ()):
        self.path = path
        self.environment = environment
        self.keys = tuple(keys)
        self.rows: list[Row] = (
            json.loads(path.read_text())["rows"] if keys and path.exists() else []
        )

    def remaining(
        self, cells: Iterable[tuple[Any, ...]], minutes: float = float("inf")
    ) -> Iterator[tuple[Any, ...]]:
        """Yield the cells without a row, until the minutes are over.

        A cell is a value for each key, and more may follow. A row without the column of a key has
        the value None.
        """
        measured = {tuple(hashable(row.get(key)) for key in self.keys) for row in self.rows}
        deadline = time.monotonic() + 60 * minutes
        for cell in cells:
            if cell[: len(self.keys)] in measured:
                continue
            if time.monotonic() > deadline:
                print("out of minutes: start again to go on")
                return
            yield cell

    def add(self, *rows: Row) -> None:
        self.replace([*self.rows, *rows])

    def replace(self, rows: list[Row]) -> None:
        """Replace all rows, and write the file."""
        self.rows = rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(
            self.path, json.dumps({"environment": self.environment, "rows": rows}, indent=1) + "\n"
        )


def hashable(value: Any) -> Any:
    """Turn a list back into a tuple, which JSON does not have."""
    return tuple(value) if isinstance(value, list) else value


def load(name: str) -> tuple[dict[str, Any], list[Row]] | None:
    """Environment and rows of benchmarks/results/<name>.json; None if there is no such file."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return None
    data = json.loads(path.read_text())
    return data["environment"], data["rows"]


def environment(device: str) -> dict[str, Any]:
    """Hardware, versions, commit and date of a measurement."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        state = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
        revision = commit.stdout.strip() + ("+changes" if state.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        revision = os.environ.get("CROPR_COMMIT", "unknown")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": revision,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
