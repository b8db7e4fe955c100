"""The folder of a run: its lock, its dataset and its log."""

import contextlib
import errno
import json
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .data import Data


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Create and lock a folder; raises RuntimeError, with the other process, if it is locked.

    The lock is released however this process ends. Unlike flock, it is not inherited by forked
    processes.
    """
    import fcntl  # POSIX only

    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # locked, or a file system without locks
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = file.read() or "another process"
                raise RuntimeError(
                    f"train: {out} is in use by {holder}; wait for it, or use another folder"
                ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def require_same(
    out: Path, data: Data, classes: Sequence[str], samples: Sequence[int] = ()
) -> None:
    """Raise ValueError if the classes or the numbers of samples differ from those of the run."""
    properties: list[tuple[str, object, object]] = [
        ("number of classes", len(classes), len(data.classes))
    ]
    properties += [
        (f"classes[{index}]", *pair) for index, pair in enumerate(zip(classes, data.classes))
    ]
    names = "number of training samples", "number of validation samples"
    properties += zip(names, samples, (len(data.train), len(data.val)))
    changed = [
        f"{name} was {saved!r}, is {current!r}"
        for name, saved, current in properties
        if saved != current
    ]
    if changed:
        raise ValueError(f"train: {out} holds a run on other data: {'; '.join(changed[:3])}")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, empty without a file; warns of lines that a crash has damaged."""
    lines = []
    num_damaged = 0
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            lines.append(line | {"step": int(line["step"])})
        except (ValueError, TypeError, KeyError):
            num_damaged += 1
    if num_damaged:
        warnings.warn(f"{path}: {num_damaged} line(s) cannot be read and are skipped", stacklevel=2)
    return lines
