"""Checks of numbers that callers give; those of NumPy become Python's, which JSON can hold."""

from collections.abc import Callable, Iterable
from numbers import Integral, Real


def integer(name: str, value: object, minimum: int) -> int:
    """Return an integer; raises ValueError, with the name, for any other value, such as 3.5, True or "8"."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")
    return int(value)


def integers(name: str, values: object, minimum: int) -> tuple[int, ...]:
    """Return several integers; raises the error of `integer` for one that is none, and for a value alone."""
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ValueError(f"{name} must be a list of integers >= {minimum}, got {values!r}")
    return tuple(integer(f"{name}[{index}]", value, minimum) for index, value in enumerate(values))


def number(name: str, value: object, allowed: str, holds: Callable[[float], bool]) -> float:
    """Return a number that `holds`; raises ValueError, with the name and what is allowed, for any other value."""
    if isinstance(value, bool) or not isinstance(value, Real) or not holds(float(value)):
        raise ValueError(f"{name} must be a number {allowed}, got {value!r}")
    return float(value)
