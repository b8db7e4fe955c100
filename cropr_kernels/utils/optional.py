"""Libraries that only some features need, imported where they are used."""

import importlib.util
from typing import Any

_DISTRIBUTIONS = {"PIL": "pillow", "faster_coco_eval": "faster-coco-eval", "sklearn": "scikit-learn"}


def distribution(module: str) -> str:
    """The name by which a module's library is installed."""
    library = module.split(".")[0]
    return _DISTRIBUTIONS.get(library, library)


def is_installed(module: str) -> bool:
    """Whether a library is installed."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # somebody has put None in its place
        return False


def import_optional(module: str, extra: str, what: str) -> Any:
    """Import a module, such as "PIL.Image", of a library that only `what` needs.

    Raises ImportError where that library, or one that it needs itself, is not installed: it names the library, and the
    extra of this package that installs it with all others of its kind.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None:
            raise
        library, missing = distribution(module), distribution(error.name)
        through = "" if missing == library else f"{library}, which needs "
        raise ImportError(
            f"{what} needs {through}{missing}: pip install {missing} (all of its kind: the extra [{extra}] of "
            "cropr_kernels)",
            name=error.name,
        ) from error
