"""The combinations of parameters that `make test` and `make test-all` run."""

import itertools
from collections import Counter
from typing import Any

import pytest


def covering(combinations: list[dict[str, Any]], strength: int = 1) -> set[int]:
    """Indices of few combinations in which every value of every parameter occurs (each-choice
    coverage, strength 1), or every pair of values that occurs in any (pairwise, strength 2)."""
    parts = [
        set(itertools.combinations([(name, repr(value)) for name, value in values.items()], width))
        for values in combinations
        for width in [min(strength, len(values))]
    ]
    uses = Counter({part: 0 for combination in parts for part in combination})
    chosen: set[int] = set()

    def gain(index: int) -> tuple[int, int]:
        counts = [uses[part] for part in parts[index]]
        return counts.count(0), -sum(counts)

    while not all(uses.values()):
        best = max((index for index in range(len(parts)) if index not in chosen), key=gain)
        chosen.add(best)
        uses.update(parts[best])
    return chosen


def choose_combinations(items: list[pytest.Item]) -> set[pytest.Item]:
    """Choose combinations of the tests that are marked `each_choice`, or are parametrized by a
    backend: code has few branches on a pair of parameters, and none on three.

    Definitions, and kernels that are compiled only, run each choice, C++ kernels all pairs. Others
    run each choice in `make test`, and all pairs in `make test-all`, in the first shape if they are
    interpreted. Of kernels that are compiled or interpreted `make test` takes every third
    shape: other tests compile them for all known widths. Marks the difference slow and returns the
    tests that neither runs.
    """
    groups: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in [item for item in items if hasattr(item, "callspec")]:
        parameters = item.callspec.params
        backend = parameters.get("backend", parameters.get("kernels"))
        if backend or item.get_closest_marker("each_choice"):
            groups.setdefault((item.nodeid.partition("[")[0], str(backend)), []).append(item)
    left_out: set[pytest.Item] = set()
    for (_, backend), group in groups.items():
        quick = [item for item in group if not item.get_closest_marker("slow")]
        if backend in ("compiled", "triton"):  # each of them takes seconds
            quick = _with_shapes(quick, slice(1, None, 3))
        chosen = _covering_items(quick, 2 if backend in ("cpp", "cuda") else 1)
        for item in group:
            if item not in chosen:
                item.add_marker("slow")
        chosen |= _covering_items(group, 1 if backend in ("reference", "compiled", "triton") else 2)
        if backend == "triton":
            chosen |= _covering_items(_with_shapes(group, slice(1)), 2)
        left_out |= {*group} - chosen
    return left_out


def _with_shapes(group: list[pytest.Item], part: slice) -> list[pytest.Item]:
    """Return the tests that take part of the shapes, or all if these are four at most."""
    shapes = [str(item.callspec.params.get("shape")) for item in group]  # type: ignore[attr-defined]
    different = [*dict.fromkeys(shapes)]
    taken = different[part] if len(different) > 4 else different
    return [item for item, shape in zip(group, shapes) if shape in taken]


def _covering_items(items: list[pytest.Item], strength: int) -> set[pytest.Item]:
    parameters = [item.callspec.params for item in items]  # type: ignore[attr-defined]
    return {items[index] for index in covering(parameters, strength)}
