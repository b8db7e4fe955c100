"""Python processes that start with the libraries loaded: forked from a server, which has imported them once."""

import contextlib
import functools
import multiprocessing
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

PRELOAD = ["torch", "cropr_kernels.cli.infer", "cropr_kernels.cli.train", "timm", "torchvision", "torchmetrics"]


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
    """Run code as `python -c` does, in a session of its own, and wait for it; `folder` takes what it prints."""
    folder.mkdir(parents=True, exist_ok=True)
    process = _server().Process(target=_execute, args=(code, arguments, folder, environment))
    process.start()
    process.join()
    printed = [(folder / name).read_text() for name in ("stdout", "stderr")]
    return Ended(process.pid, process.exitcode, *printed)


def running_in_session(session: int) -> list[str]:
    """Names of the processes of a session that have not ended; one whose parent has not asked yet has."""
    running = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ends just now
            name, _, fields = path.read_text().rpartition(")")
            state, _, _, own_session, *_ = fields.split()
            if int(own_session) == session and state not in "ZX":
                running.append(name)
    return running


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
