"""The definition of every op by its name."""

from . import ragged_reference, reference
from .extension import NAMES

DEFINITIONS = {
    name: getattr(reference if hasattr(reference, name) else ragged_reference, name)
    for name in NAMES
}
