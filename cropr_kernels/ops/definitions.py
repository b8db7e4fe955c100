"""The definition of each op by name: the oracle of the tests."""

from collections.abc import Callable
from typing import Any

from . import ragged_reference, reference
from .extension import NAMES

DEFINITIONS: dict[str, Callable[..., Any]] = {
    op: getattr(module, op)
    for module in (reference, ragged_reference)
    for op in NAMES
    if hasattr(module, op)
}
