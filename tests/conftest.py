"""Backends, data and devices the tests run on.

Every op test runs once per backend: the plain PyTorch definition, the C++ kernels, these while the
Triton kernels are compiled for a GPU and looked at, CUDA where there is a GPU, and in a process of
its own (TRITON_INTERPRET=1) the Triton kernels interpreted on CPU tensors.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import INTERPRETED
from helpers.selection import choose_combinations

from cropr_kernels.ops.cuda import FILES  # importing the package registers the ops
from cropr_kernels.ops.definitions import DEFINITIONS

if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    # No verdict depends on how busy the machine is, or on what is drawn first; in CI the same cases
    # run every time.
    settings.register_profile(
        "cropr",
        deadline=None,
        derandomize="CI" in os.environ,
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("cropr")

# Or convolutions of a GPU differ enough that near-ties flip
torch.backends.cudnn.allow_tf32 = False
SEED = int(os.environ.get("CROPR_SEED", 0))  # of what tests draw: every seed must do


@dataclass(frozen=True)
class Backend:
    name: str
    device: str
    ops: dict[str, Callable[..., Any]]

    def __getattr__(self, op: str) -> Callable[..., Any]:
        try:
            return self.ops[op]
        except KeyError:
            raise AttributeError(op) from None

    @property
    def interpreted(self) -> bool:
        return self.name == "triton"


def make_backend(name: str) -> Backend:
    if name == "reference":
        return Backend(name, "cpu", DEFINITIONS)
    if name == "triton":
        modules = {
            file: importlib.import_module(f"cropr_kernels.ops.triton.{file}")
            for file in FILES.values()
        }
        return Backend(name, "cpu", {op: getattr(modules[file], op) for op, file in FILES.items()})
    if name == "compiled":
        pytest.importorskip("triton", reason="Triton is not installed")
        compiled = importlib.import_module("helpers.compiled")
        return Backend(name, "cpu", {op: compiled.compiled_op(op) for op in FILES})
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if name == "cuda":
        return Backend(name, "cuda", {op: _twice(getattr(torch.ops.cropr, op)) for op in FILES})
    return Backend(name, "cpu", {op: getattr(torch.ops.cropr, op) for op in FILES})


def _twice(op: Callable[..., Any]) -> Callable[..., Any]:
    """Through Triton on copies, and then from the launches that this records, which is what models
    run."""

    def call(*args: Any, **kwargs: Any) -> Any:
        op(*map(_copy, args), **{name: _copy(value) for name, value in kwargs.items()})
        return op(*args, **kwargs)

    return call


def _copy(value: Any) -> Any:
    """A tensor with strides and alignment of its own storage, so that both calls are alike."""
    if not isinstance(value, torch.Tensor):
        return value
    empty = torch.empty(0, dtype=value.dtype, device=value.device)
    return empty.set_(
        value.untyped_storage().clone(), value.storage_offset(), value.shape, value.stride()
    )


@pytest.fixture(params=["triton"] if INTERPRETED else ["reference", "cpp", "compiled", "cuda"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    selected = make_backend(request.param)
    if selected.interpreted:
        poison_empty(monkeypatch)
    return selected


@pytest.fixture(params=["triton"] if INTERPRETED else ["cpp", "compiled", "cuda"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A backend with kernels of its own: everything but the definition."""
    selected = make_backend(request.param)
    if selected.interpreted:
        poison_empty(monkeypatch)
    return selected


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what launchers allocate with NaN (or an impossible index), so that an unwritten element
    shows."""
    plain = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = plain(self, *args, **kwargs)
        return out.fill_(
            float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min // 2
        )

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data that CROPR_DATA names."""
    folder = os.environ.get("CROPR_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real data: set CROPR_DATA to its folder")
    return Path(folder)


def _lateness(item: pytest.Item) -> int:
    slow = item.get_closest_marker("slow")
    return 2 if slow is None else 0 if slow.kwargs.get("waits") else 1


@pytest.hookimpl(tryfirst=True)  # before -m and -k deselect
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Of several processes that share the tests
    shard, _, shards = os.environ.get("CROPR_SHARD", "0/1").partition("/")
    items[:] = items[int(shard) :: int(shards)]
    # Processes are done at the same time if tests that take long come first, and before them those
    # that wait for other processes: they leave the cores to others.
    items.sort(key=_lateness)
    left_out = choose_combinations(items)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
