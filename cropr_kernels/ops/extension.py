"""The C++ extension: importing it registers the CPU kernels."""

from pathlib import Path

try:
    from .._C import build_info as build_info
    from .._C import forget_launches as forget_launches
    from .._C import keep_launches as keep_launches
    from .._C import load_driver as load_driver
    from .._C import ops as table
    from .._C import replayed as replayed
except ImportError as error:
    raise ImportError(
        "cropr_kernels: the C++ extension cropr_kernels._C is missing or does not load "
        f"({error}). Build it with 'pip install --no-build-isolation .' or, in the source tree, "
        "'python setup.py build_ext --inplace'."
    ) from error

NAMES: tuple[str, ...] = tuple(schema.partition("(")[0] for schema, *_ in table)


def cpp_library() -> Path | None:
    """Path of the library with the ops and CPU kernels for C++ programs; None if it was not
    built."""
    return next(Path(__file__).parents[1].glob("libcropr_ops.*"), None)
