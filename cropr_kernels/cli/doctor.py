"""`cropr doctor`: check ops and small networks on every device of this machine."""

import argparse
import contextlib
import ctypes
import itertools
import multiprocessing
import textwrap
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inference.loading import device_and_dtype
from ..models.vit import create_vit
from ..ops import NAMES, build_info
from ..ops.definitions import DEFINITIONS
from ..ops.sample_inputs import DTYPES, bare_call, legal_call
from ..ops.validation import OPS
from ..pruning.api import apply
from ..pruning.deployment import deployed_copy
from ..utils.progress import Progress
from .info import versions

# Sizes of a small network: several programs per image, several blocks per row.
SIZES = {
    "B": 2,
    "N": 197,
    "D": 192,
    "K": 120,
    "R": 77,
    "M": 3,
    "T": 110,
    "C": 87,
    "F": 64,
    "P": 196,
    "H": 3,
}
NETWORKS: dict[str, dict[str, Any]] = {
    "network": {"rate": 8},
    "network with Last Layer Fusion": {"rate": 8, "llf": "track_parent"},
    "network that merges": {"rate": 8, "merge": True, "llf": "track_parent"},
}
# Tolerances of results, relative and absolute; and of a network's logits, over their norm: in 16
# bits rounding may change which token is pruned.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
LOGITS_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.bfloat16: 0.3,
    torch.float16: 0.1,
}
SECONDS = 60.0  # limit of one check, with the compilation of its kernels and the start of CUDA


class Check(NamedTuple):
    """An op, or a network of NETWORKS, in one dtype."""

    name: str
    dtype: torch.dtype
    plain: bool  # an op without its optional tensors; a network without CUDA graphs

    def __str__(self) -> str:
        if self.name in NETWORKS:
            variant = "" if self.plain else ", CUDA graphs"
        else:
            variant = f", without {', '.join(OPS[self.name].optional)}" if self.plain else ""
        return f"{self.name}, {str(self.dtype).removeprefix('torch.')}{variant}"


def checks(device: torch.device) -> list[Check]:
    """List the checks of a device."""
    plain_options = {name: {False, bool(OPS[name].optional)} for name in NAMES}
    graph_options = {True, False} if device.type == "cuda" else {True}
    plain_options |= dict.fromkeys(NETWORKS, graph_options)
    return [
        Check(name, dtype, plain)
        for name, dtype in itertools.product(plain_options, DTYPES)
        for plain in plain_options[name]
    ]


def perform(check: Check, device: torch.device, sizes: dict[str, int] = SIZES) -> str:
    """Run a check; return its failure as text, or an empty string."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _network(check, device) if check.name in NETWORKS else _op(check, device, sizes)
    except Exception as error:  # a check may fail in any way; the others go on
        return f"{type(error).__name__}: {error}"


def _op(check: Check, device: torch.device, sizes: dict[str, int]) -> str:
    if check.name == "rotate_":  # C is the even width of a head
        sizes = sizes | {"C": sizes["F"] & ~1}
    reference_args = (bare_call if check.plain else legal_call)(check.name, check.dtype, **sizes)
    calls = [
        {name: _copy(value, device) for name, value in reference_args.items()} for _ in range(2)
    ]  # compiled, replayed
    expected = _named_parts(DEFINITIONS[check.name](*reference_args.values())) | reference_args
    for i, args in enumerate(calls):
        # Arguments are compared as well: ops change some in place, and no others.
        actual = _named_parts(getattr(torch.ops.cropr, check.name)(*args.values())) | args
        for name, part in actual.items():
            # Computed from rows of that dtype
            rounded = check.dtype if name == "cost_scale" else None
            failure = (
                _difference(name, part, expected[name], rounded) if isinstance(part, Tensor) else ""
            )
            if failure:
                return f"{'the second call: ' if i else ''}{failure}"
    return ""


def _copy(value: object, device: torch.device) -> object:
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def _named_parts(result: object) -> dict[str, Any]:
    parts = () if result is None else result if isinstance(result, tuple) else (result,)
    return {f"result {i}": part for i, part in enumerate(parts)}


def _difference(
    name: str, actual: Tensor, expected: Tensor, rounded: torch.dtype | None = None
) -> str:
    """Describe the first wrong element, at the tolerance of its dtype and of the dtype it was
    `rounded` to."""
    actual = actual.cpu()
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        return (
            f"{name} is {actual.dtype} {tuple(actual.shape)}, not {expected.dtype} "
            f"{tuple(expected.shape)}"
        )
    tolerance = max(TOLERANCE.get(actual.dtype, 0.0), TOLERANCE.get(rounded or actual.dtype, 0.0))
    is_wrong = ~torch.isclose(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)
    if not is_wrong.any():
        return ""
    index = is_wrong.nonzero()[0].tolist()
    values = (f"{tensor[tuple(index)].item():.7g}" for tensor in (actual, expected))
    return (
        f"{name}{index} is {', not '.join(values)} ({int(is_wrong.sum())} of {is_wrong.numel()} "
        "are wrong)"
    )


def _network(check: Check, device: torch.device) -> str:
    model = create_vit("vit_tiny_patch16_224", img_size=96, depth=4, num_classes=10)
    apply(model.eval(), **NETWORKS[check.name], num_outputs=0)
    exact = deployed_copy(model.double(), engine=False)
    fast = deployed_copy(model, cuda_graphs=0 if check.plain else 1).to(device, check.dtype)
    for _ in range(2):  # the second is replayed
        images = torch.randn(2, 3, 96, 96)
        expected = exact(images.double())
        actual = fast(images.to(device, check.dtype)).double().cpu()
        error = ((actual - expected).norm() / expected.norm()).item()
        allowed = LOGITS_TOLERANCE[check.dtype]
        if not error <= allowed:
            return (
                f"logits differ by {error:.1e} of their norm from the definition's; {allowed} is "
                "allowed"
            )
    return ""


def outcomes(device: torch.device) -> Iterator[tuple[Check, str]]:
    """Yield every check of a device with its failure.

    GPU checks run in another process, which is replaced if it ends, hangs or loses the GPU.
    """
    pending = checks(device)
    if device.type == "cpu":
        yield from ((check, perform(check, device)) for check in pending)
        return
    while pending:
        for check, failure in in_process(pending, device, SECONDS):
            yield check, failure
            pending = pending[1:]


def in_process(
    pending: list[Check],
    device: torch.device,
    seconds: float,
    perform: Callable[..., str] = perform,
) -> Iterator[tuple[Check, str]]:
    """Run checks in a new process, up to the first that leaves it unusable."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    process = context.Process(target=_serve, args=(sender, pending, device, perform), daemon=True)
    process.start()
    sender.close()
    try:
        with contextlib.suppress(EOFError):  # reported with the first check
            receiver.recv()  # the process has started, however long that takes
        for check in pending:
            if not receiver.poll(seconds):
                yield check, f"no answer in {seconds:.0f} s"
                return
            try:
                failure, usable = receiver.recv()
            except EOFError:
                process.join()
                yield check, f"the process ended, with exit code {process.exitcode}"
                return
            yield check, failure
            if not usable:
                return
    finally:
        process.kill()
        process.join()


def _serve(
    connection: Connection, pending: list[Check], device: torch.device, perform: Callable[..., str]
) -> None:
    torch.backends.cudnn.allow_tf32 = False  # full float32
    connection.send("started")
    for check in pending:
        failure = perform(check, device)
        usable = True
        if failure:
            try:
                torch.cuda.synchronize(device)
            except Exception:  # such as an illegal address, after which no kernel runs
                usable = False
        connection.send((failure, usable))


def run(options: argparse.Namespace) -> None:
    gpus = (
        [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    devices = (
        [torch.device("cpu"), *gpus] if options.device is None else [device_and_dtype(options)[0]]
    )
    print(
        ", ".join(
            f"{name} {value}"
            for name, value in {**versions(), **build_info()}.items()
            if name != "device"
        )
    )
    failed, total = 0, 0
    for device in devices:
        name = _describe(device)
        num_failed = 0
        with Progress(str(device), len(checks(device)), show=not options.quiet) as progress:
            for check, failure in outcomes(device):
                progress.update(note=str(check))
                total += 1
                if failure:
                    num_failed += 1
                    print(
                        f"{device}: {check}:\n{textwrap.indent(failure.strip(), '    ')}",
                        flush=True,
                    )
        failed += num_failed
        result = (
            f"{num_failed} of {progress.done} checks failed"
            if num_failed
            else f"{progress.done} checks passed"
        )
        print(f"{name}: {result}")
    if failed:
        raise RuntimeError(f"{failed} of {total} checks failed")


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    gpu = torch.cuda.get_device_properties(device)
    cuda = f"CUDA {torch.version.cuda}, driver for CUDA {_driver()}"
    return f"{device}, {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory >> 30} GB, {cuda}"


def _driver() -> str:
    """Return the newest version of CUDA that the driver supports."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return "unknown"
    return f"{version.value // 1000}.{version.value % 1000 // 10}"
