"""C++ ops that also compile the kernels they would launch on CUDA, and lint them."""

import os
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.kernels.launches import compile_launches, launcher, recording
from benchmarks.kernels.lint import problems, resources

ARCHITECTURE = int(os.environ.get("CROPR_ARCHITECTURE", 90))
STACK = 72  # bytes of a thread, in kernels that no model launches
_checked: set[str] = set()


def compiled_op(name: str) -> Callable[..., Any]:
    """Return the C++ op, preceded by the lint of each kernel that CUDA would launch for its
    arguments."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with recording() as launches:
            launcher(name)(*args, **kwargs)
        for launch, compiled in compile_launches(launches, ARCHITECTURE):
            if compiled.hash not in _checked:
                faults = problems(launch, compiled)
                assert not faults, f"{launch}: {faults}"
                assert resources(compiled)["STACK"] <= STACK, f"{launch}: {resources(compiled)}"
                _checked.add(compiled.hash)
        return getattr(torch.ops.cropr, name)(*args, **kwargs)

    return call
