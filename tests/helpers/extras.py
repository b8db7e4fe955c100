"""Libraries that tests need, looked up without loading them: collection imports nothing heavier
than torch."""

from importlib.util import find_spec

import pytest


def require(*libraries: str) -> None:
    """Skip the calling test module unless all libraries are installed."""
    for library in libraries:
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed", allow_module_level=True)
