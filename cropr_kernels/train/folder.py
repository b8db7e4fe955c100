"""The folder of a run: one run at a time, on one dataset, with a log that may be damaged."""

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
    """Hold a folder, made if it is not there; RuntimeError names the process that holds it.

    The lock goes with this process, however it ends; processes that it forks do not keep it, as they would by flock.
    """
    import fcntl  # not everywhere

    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # another holds it, or the file system has no locks
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = file.read() or "another process"
                raise RuntimeError(f"train: {out} is in use by {holder}; wait for it, or use another folder") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def require_same(out: Path, data: Data, classes: Sequence[str], samples: Sequence[int] = ()) -> None:
    """Raise ValueError where data has other classes, or numbers of training and validation samples, than a run."""
    facts: list[tuple[str, Any, Any]] = [("number of classes", len(classes), len(data.classes))]
    facts += [(f"classes[{index}]", *pair) for index, pair in enumerate(zip(classes, data.classes))]
    names = "number of training samples", "number of validation samples"
    facts += zip(names, samples, (len(data.train), len(data.val)))
    changed = [f"{name} was {was!r}, is {now!r}" for name, was, now in facts if was != now]
    if changed:
        raise ValueError(f"train: {out} holds a run on other data: {'; '.join(changed[:3])}")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, none without a file; a warning counts those that a crash has damaged."""
    lines, damaged = [], 0
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            lines.append(line | {"step": int(line["step"])})
        except (ValueError, TypeError, KeyError):
            damaged += 1
    if damaged:
        warnings.warn(f"{path}: {damaged} line(s) cannot be read and are left out", stacklevel=2)
    return lines
