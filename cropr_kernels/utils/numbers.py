"""Checks of numbers that callers give; those of NumPy become Python's, which JSON can hold."""

from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import TypeGuard


def _is_integer(value: object, minimum: int) -> TypeGuard[Integral]:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= minimum


def integer(name: str, value: object, minimum: int) -> int:
    """Return an integer; raises ValueError, with the name, for any other value, such as 3.5, True
    or "8"."""
    if not _is_integer(value, minimum):
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")
    return int(value)


def integers(name: str, values: object, minimum: int) -> tuple[int, ...]:
    """Return several integers; raises ValueError, with the name, for any other value, and for one
    alone."""
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ValueError(f"{name} must be integers >= {minimum}, got {values!r}")
    listed = [*values]
    for index, value in enumerate(listed):
        if not _is_integer(value, minimum):
            raise ValueError(
                f"{name} must be integers >= {minimum}, got {value!r} at index {index}"
            )
    return tuple(map(int, listed))


def number(name: str, value: object, allowed: str, holds: Callable[[float], bool]) -> float:
    """Return a number that `holds`; raises ValueError, with the name and what is allowed, for any
    other value."""
    if isinstance(value, bool) or not isinstance(value, Real) or not holds(float(value)):
        raise ValueError(f"{name} must be a number {allowed}, got {value!r}")
    return float(value)
