"""Libraries that only training needs, imported where they are used."""

import importlib
from typing import Any


def need(module: str) -> Any:
    """Import a module of the `train` extra.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise ImportError(f"training needs {error.name}: pip install 'cropr_kernels[train]'") from error
