"""Optional libraries, imported where they are used."""

import importlib.util
from typing import Any

_DISTRIBUTIONS = {
    "PIL": "pillow",
    "faster_coco_eval": "faster-coco-eval",
    "sklearn": "scikit-learn",
}


def distribution(module: str) -> str:
    """Name of the distribution that installs a module."""
    library = module.split(".")[0]
    return _DISTRIBUTIONS.get(library, library)


def is_installed(module: str) -> bool:
    """Return true if a library is installed."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # sys.modules holds None for it, so that nobody imports it
        return False


def import_optional(module: str, extra: str, feature: str) -> Any:
    """Import a module, such as "PIL.Image", of a library that only `feature` needs.

    Raises ImportError if the library, or one that it needs, is not installed; the error names it,
    and the extra of this package that includes it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None:
            raise
        library = distribution(module)
        missing = distribution(error.name)
        via = "" if missing == library else f"{library}, which needs "
        raise ImportError(
            f"{feature} needs {via}{missing}: pip install {missing} (or the extra [{extra}] of "
            "cropr_kernels)",
            name=error.name,
        ) from error
