"""Early checks of commands: outputs can be written, and a model can prune at all rates."""

import tempfile
from dataclasses import replace
from pathlib import Path

from torch import nn

from ..pruning.model import CroprModules
from ..schedule import Schedule
from ..tuning import default_rates


def check_folder(path: Path, option: str = "--out") -> None:
    """Raise OSError if files cannot be written to a folder, which is created later."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(
            f"{option} must be in a folder, but {existing} is a file: choose another path"
        )
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OSError(
            f"{option} {path} cannot be written: no file can be created in {existing} ({reason}): "
            "choose another path"
        ) from error


def check_file(path: Path, suffix: str, option: str = "--out") -> None:
    """Raise ValueError or OSError if a file cannot be written, or lacks this suffix."""
    if path.suffix != suffix:
        raise ValueError(f"{option} must end in {suffix}, got {path}")
    if path.is_dir():
        raise IsADirectoryError(
            f"{option} must be a file, but {path} is a folder: choose a file in it"
        )
    check_folder(path.parent, option)


def checked_rates(model: nn.Module, rates: list[int] | None) -> list[int]:
    """Return these rates, or four defaults of the model; raises ValueError for too few tokens."""
    rates = list(dict.fromkeys(rates or default_rates(model)))
    modules: CroprModules = model.cropr  # type: ignore[assignment]
    tokens = modules.spec.num_scheduled(modules.config.grid)
    for rate in rates:
        config = replace(modules.config, schedule=Schedule(rate=rate))
        config.counts(tokens, len(modules.spec.blocks), modules.spec.num_prefix)
    return rates
