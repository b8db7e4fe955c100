"""`cropr doctor`: whether every device of this machine computes what the ops mean."""

import argparse
import ctypes
import multiprocessing
import textwrap
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.vit import create_vit
from ..ops import NAMES, build_info, reference
from ..ops.calls import DTYPES, bare_call, legal_call
from ..ops.validation import OPS
from ..pruning.api import apply, deployed_copy
from ..utils.progress import Progress
from .common import place_of
from .info import versions

# As of a small network: several programs an image, rows of several blocks.
SIZES = {"B": 2, "N": 197, "D": 192, "K": 120, "R": 77, "M": 3, "S": 110, "C": 87, "F": 64, "P": 196, "H": 3}
NETWORKS: dict[str, dict[str, Any]] = {
    "network": {"rate": 8},
    "network with Last Layer Fusion": {"rate": 8, "llf": "track_parent"},
    "network that merges": {"rate": 8, "merge": True, "llf": "track_parent"},
}
# How far a result may be from what it should be; and a network's logits, over their norm: in 16 bits rounding may
# prune another of two tokens.
NEAR = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
LOGITS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}
SECONDS = 60.0  # that one check may take, its kernels' compilation and the start of CUDA included


class Check(NamedTuple):
    """One op, or a network of NETWORKS."""

    what: str
    dtype: torch.dtype
    plain: bool  # an op without its optional tensors; a network without CUDA graphs

    def __str__(self) -> str:
        if self.what in NETWORKS:
            how = "" if self.plain else ", CUDA graphs"
        else:
            how = f", without {', '.join(OPS[self.what].optional)}" if self.plain else ""
        return f"{self.what}, {str(self.dtype).removeprefix('torch.')}{how}"


def checks(device: torch.device) -> list[Check]:
    """All that is checked on a device."""
    ways = (True, False) if device.type == "cuda" else (True,)
    return [
        *(Check(op, dtype, plain) for op in NAMES for dtype in DTYPES for plain in {False, bool(OPS[op].optional)}),
        *(Check(name, dtype, plain) for name in NETWORKS for dtype in DTYPES for plain in ways),
    ]


def perform(check: Check, device: torch.device, sizes: dict[str, int] = SIZES) -> str:
    """What is wrong, or nothing."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _network(check, device) if check.what in NETWORKS else _op(check, device, sizes)
    except Exception as error:  # whatever it is, the other checks go on
        return f"{type(error).__name__}: {error}"


def _op(check: Check, device: torch.device, sizes: dict[str, int]) -> str:
    if check.what == "rotate_":  # C is the width of a head there, and even
        sizes = sizes | {"C": sizes["F"] & ~1}
    theirs = (bare_call if check.plain else legal_call)(check.what, check.dtype, **sizes)
    calls = [{name: _copy(value, device) for name, value in theirs.items()} for _ in range(2)]  # compiled, replayed
    expected = _named_parts(getattr(reference, check.what)(*theirs.values())) | theirs
    for call, ours in enumerate(calls):
        got = _named_parts(getattr(torch.ops.cropr, check.what)(*ours.values())) | ours  # what must not change, too
        for name, part in got.items():
            rounded = check.dtype if name == "costs" else None  # they follow from rows that were rounded to it
            wrong = _difference(name, part, expected[name], rounded) if isinstance(part, Tensor) else ""
            if wrong:
                return f"{'the second call: ' if call else ''}{wrong}"
    return ""


def _copy(value: Any, device: torch.device) -> Any:
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def _named_parts(result: Any) -> dict[str, Any]:
    parts = () if result is None else result if isinstance(result, tuple) else (result,)
    return {f"result {i}": part for i, part in enumerate(parts)}


def _difference(name: str, got: Tensor, expected: Tensor, rounded: torch.dtype | None = None) -> str:
    """The first element that is not as it should be, as precisely as its dtype and what it was `rounded` to allow."""
    got = got.cpu()
    if (got.dtype, got.shape) != (expected.dtype, expected.shape):
        return f"{name} is {got.dtype} {tuple(got.shape)}, not {expected.dtype} {tuple(expected.shape)}"
    near = max(NEAR.get(got.dtype, 0.0), NEAR.get(rounded or got.dtype, 0.0))
    wrong = ~torch.isclose(got.double(), expected.double(), rtol=near, atol=near)
    if not wrong.any():
        return ""
    at = wrong.nonzero()[0].tolist()
    values = (f"{one[tuple(at)].item():.7g}" for one in (got, expected))
    return f"{name}{at} is {', not '.join(values)} ({int(wrong.sum())} of {wrong.numel()} are wrong)"


def _network(check: Check, device: torch.device) -> str:
    model = create_vit("vit_tiny_patch16_224", img_size=96, depth=4, num_classes=10)
    apply(model.eval(), **NETWORKS[check.what])
    exact = deployed_copy(model.double(), engine=False)
    fast = deployed_copy(model, cuda_graphs=0 if check.plain else 1).to(device, check.dtype)
    for _ in range(2):  # the second one is replayed
        images = torch.randn(2, 3, 96, 96)
        expected, got = exact(images.double()), fast(images.to(device, check.dtype)).double().cpu()
        error = ((got - expected).norm() / expected.norm()).item()
        if not error <= LOGITS[check.dtype]:
            return f"logits differ by {error:.1e} of their norm from the definition's; {LOGITS[check.dtype]} is allowed"
    return ""


def outcomes(device: torch.device) -> Iterator[tuple[Check, str]]:
    """Every check of a device and what is wrong. On a GPU in a process of its own: one that a check ends, hangs or
    leaves without its GPU is replaced, and the next check goes on there."""
    todo = checks(device)
    if device.type == "cpu":
        yield from ((check, perform(check, device)) for check in todo)
        return
    while todo:
        for check, wrong in in_process(todo, device, SECONDS):
            yield check, wrong
            todo = todo[1:]


def in_process(
    todo: list[Check], device: torch.device, seconds: float, perform: Callable[..., str] = perform
) -> Iterator[tuple[Check, str]]:
    """Checks in a new process, up to the first after which it is of no use."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_serve, args=(its, todo, device, perform), daemon=True)
    process.start()
    its.close()
    try:
        for check in todo:
            if not ours.poll(seconds):
                yield check, f"no answer in {seconds:.0f} s"
                return
            try:
                wrong, usable = ours.recv()
            except EOFError:
                process.join()
                yield check, f"the process ended, with exit code {process.exitcode}"
                return
            yield check, wrong
            if not usable:
                return
    finally:
        process.kill()
        process.join()


def _serve(connection: Connection, todo: list[Check], device: torch.device, perform: Callable[..., str]) -> None:
    torch.backends.cudnn.allow_tf32 = False  # float32 is meant
    for check in todo:
        wrong, usable = perform(check, device), True
        if wrong:
            try:
                torch.cuda.synchronize(device)
            except Exception:  # an address that is none, for example: nothing runs after it
                usable = False
        connection.send((wrong, usable))


def run(options: argparse.Namespace) -> None:
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    devices = [torch.device("cpu"), *gpus] if options.device is None else [place_of(options)["device"]]
    print(", ".join(f"{name} {value}" for name, value in {**versions(), **build_info()}.items() if name != "device"))
    failed, total = 0, 0
    for device in devices:
        name, wrongs = _named(device), 0
        with Progress(str(device), len(checks(device)), show=not options.quiet) as progress:
            for check, wrong in outcomes(device):
                progress.update(note=str(check))
                total += 1
                if wrong:
                    wrongs += 1
                    print(f"{device}: {check}:\n{textwrap.indent(wrong.strip(), '    ')}", flush=True)
        failed += wrongs
        print(f"{name}: {f'{wrongs} of ' if wrongs else ''}{progress.done} checks {'failed' if wrongs else 'passed'}")
    if failed:
        raise RuntimeError(f"{failed} of {total} checks failed")


def _named(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    gpu = torch.cuda.get_device_properties(device)
    cuda = f"CUDA {torch.version.cuda}, driver for CUDA {_driver()}"
    return f"{device}, {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory >> 30} GB, {cuda}"


def _driver() -> str:
    """The newest CUDA that the driver knows."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return "unknown"
    return f"{version.value // 1000}.{version.value % 1000 // 10}"
