"""Python processes that start with the libraries loaded: forked from a server, which has imported
them once."""

import contextlib
import functools
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PRELOAD = [
    "torch",
    "cropr_kernels.cli.infer",
    "cropr_kernels.cli.train",
    "timm",
    "torchvision",
    "torchmetrics",
]


@dataclass(frozen=True)
class Ended:
    """A process that has ended; negative return codes are signals."""

    pid: int
    returncode: int
    stdout: str
    stderr: str


@functools.cache
def _server() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run_forked(code: str, arguments: list[str], folder: Path, **environment: str) -> Ended:
    """Run code as `python -c` does, in a session of its own, and wait for it; `folder` takes what
    it prints."""
    folder.mkdir(parents=True, exist_ok=True)
    process = _server().Process(target=_execute, args=(code, arguments, folder, environment))
    process.start()
    process.join()
    printed = [(folder / name).read_text() for name in ("stdout", "stderr")]
    return Ended(process.pid, process.exitcode, *printed)


def left_in_session(session: int, patience: float = 60) -> list[str]:
    """Command lines of processes that outlive their session; those that are killed already may take
    their time."""
    for _ in range(int(10 * patience)):
        commands = [*_commands_of(session)]
        if not commands:
            break
        time.sleep(0.1)
    return commands


def _commands_of(session: int) -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ends just now
            _, _, fields = (path / "stat").read_text().rpartition(")")
            command = (path / "cmdline").read_text()  # empty while a process exits, and after it
            if command and int(fields.split()[3]) == session:
                yield command


def _execute(code: str, arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)
    tempfile.tempdir = None  # TMPDIR may be another
    warnings.simplefilter("ignore")
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        with open(folder / name, "wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})
