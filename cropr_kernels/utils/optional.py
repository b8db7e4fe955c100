"""Libraries that only some features need, imported where they are used."""

import importlib.util
from typing import Any

_DISTRIBUTIONS = {"PIL": "pillow", "faster_coco_eval": "faster-coco-eval", "sklearn": "scikit-learn"}


def distribution(module: str) -> str:
    """The name by which a module's library is installed."""
    library = module.split(".")[0]
    return _DISTRIBUTIONS.get(library, library)


def is_there(module: str) -> bool:
    """Whether a library is installed."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # somebody has put None in its place
        return False


def need(module: str, extra: str, what: str) -> Any:
    """Import a module, such as "PIL.Image", of a library that only `what` needs; if it is not there, name its extra."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        message = f"{what} needs {distribution(module)}: pip install 'cropr_kernels[{extra}]'"
        raise ImportError(message) from error
