"""Folders that all processes of a test run share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def written_once(factory: pytest.TempPathFactory, name: str, write: Callable[[Path], None]) -> Path:
    """Return a folder of this run that `write` fills in the process that asks first; others wait
    for it."""
    run = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder in that of the run
        run = run.parent
    folder = run / name
    with FileLock(run / f"{name}.lock"):
        if not folder.exists():
            partial = factory.mktemp(name)
            write(partial)
            partial.rename(folder)
    return folder
