"""The choice of what `make test` runs: each value of every parameter, in few combinations."""

from collections import Counter
from typing import Any

import pytest


def each_choice(combinations: list[dict[str, Any]]) -> set[int]:
    """Indices of few combinations in which every value of every parameter occurs (each-choice
    coverage)."""
    parameters = [
        {(name, repr(value)) for name, value in values.items()} for values in combinations
    ]
    uses = Counter({value: 0 for values in parameters for value in values})
    chosen: set[int] = set()

    def gain(index: int) -> tuple[int, int]:
        counts = [uses[value] for value in parameters[index]]
        return counts.count(0), -sum(counts)

    while not all(uses.values()):
        best = max((index for index in range(len(parameters)) if index not in chosen), key=gain)
        chosen.add(best)
        uses.update(parameters[best])
    return chosen


def mark_other_combinations_slow(items: list[pytest.Item]) -> None:
    """Leave the full product of parameters to `make test-all`, where a test is marked `each_choice`
    or compiles or interprets Triton kernels, whose code has no branch on a pair of parameters; of
    these also two shapes of three."""
    groups: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in [item for item in items if hasattr(item, "callspec")]:
        parameters = item.callspec.params
        backend = parameters.get("backend", parameters.get("kernels"))
        if backend in ("compiled", "triton") or item.get_closest_marker("each_choice"):
            groups.setdefault((item.nodeid.partition("[")[0], str(backend)), []).append(item)
    for (_, backend), group in groups.items():
        shapes = [*dict.fromkeys(str(item.callspec.params.get("shape")) for item in group)]
        if backend in ("compiled", "triton") and len(shapes) > 4:  # each of them takes seconds
            shapes = shapes[1::3]
        quick = [item for item in group if not item.get_closest_marker("slow")]
        candidates = [item for item in quick if str(item.callspec.params.get("shape")) in shapes]
        chosen = [
            candidates[index]
            for index in each_choice([item.callspec.params for item in candidates])
        ]
        for item in group:
            if item not in chosen:
                item.add_marker("slow")
