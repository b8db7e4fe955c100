"""Checks before the work: what a command writes can be written, and a model can prune at all rates."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..schedule import Schedule
from ..tuning import default_rates


def check_folder(path: Path, what: str = "--out") -> None:
    """Raise OSError where no file could be written to a folder; it is made when there is something to write."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"{what} must be in a folder, but {place} is a file: name another")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OSError(f"{what} {path} cannot be written, {place} takes no files ({reason}): name another") from error


def check_file(path: Path, suffix: str, what: str = "--out") -> None:
    """Raise ValueError or OSError where a file, which must have this suffix, could not be written."""
    if path.suffix != suffix:
        raise ValueError(f"{what} must end in {suffix}, got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{what} must be a file, but {path} is a folder: name a file in it")
    check_folder(path.parent, what)


def checked_rates(model: Any, rates: list[int] | None) -> list[int]:
    """These rates, or four of the model's own; ValueError where it has too few tokens for one of them."""
    rates, stack = list(dict.fromkeys(rates or default_rates(model))), model.cropr
    tokens = stack.spec.num_prefix + stack.config.grid[0] * stack.config.grid[1]
    for rate in rates:
        config = replace(stack.config, schedule=Schedule(rate=rate))
        config.counts(tokens, len(stack.spec.blocks), stack.spec.num_prefix)
    return rates
