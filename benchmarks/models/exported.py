"""Time networks on a CPU, pruned and not, in PyTorch and as exported files in other runtimes.

python -m benchmarks.models.exported [--models M...] [--rates R...] [--runtimes ...] [--minutes M]
    [--out FILE] -> benchmarks/results/exported.json

Needs the extra `openvino`, and onnxruntime. Weights are random, and queries calibrated on random
images. Files take any batch, and stay in the folder `--files`: a run that is interrupted goes on.
A process for each runtime and batch, so that none pays for the threads and memory of another,
checks every output against eager PyTorch, and times the unpruned and all pruned networks
interleaved. torch.compile takes merging at R = 8 only. The share is the speed-up over the FLOP
ratio.
"""

import argparse
import itertools
import multiprocessing
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cropr_kernels as cropr
from benchmarks.models.deployment import create, image_size
from benchmarks.models.timing import relative_difference
from benchmarks.utils.results import RESULTS, Results, Row, environment
from benchmarks.utils.runtimes import Call, onnxruntime_call, openvino_call
from cropr_kernels.pruning.deployment import deployed_copy
from cropr_kernels.utils.flops import flop_counter
from cropr_kernels.utils.timing import LEAST_ROUNDS, time_interleaved

TOLERANCES = {"bfloat16": 0.3}  # a near-tie may prune another token
FLOAT32_TOLERANCE = 2e-3
CPU = torch.device("cpu")


class Network(NamedTuple):
    """A model at a rate."""

    model: str
    rate: int
    merge: bool

    def path(self, folder: Path, suffix: str) -> Path:
        way = "merge" if self.merge else "drop"
        return folder / f"{self.model}-{way if self.rate else 'unpruned'}{self.rate}{suffix}"

    def images(self, batch: int) -> Tensor:
        torch.manual_seed(0)
        return torch.randn(batch, 3, image_size(self.model), image_size(self.model))

    def pruned(self) -> Any:
        """Create the model with calibrated queries."""
        model = cropr.apply(
            create(self.model, "cpu", torch.float32),
            rate=self.rate,
            merge=self.merge,
            num_outputs=0,
        )
        if self.rate:
            cropr.calibrate(model, self.images(4))
        return model

    def exported(self, folder: Path) -> Path:
        """Export the model as ONNX, unless the file is there."""
        path = self.path(folder, ".onnx")
        if not path.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cropr.export(self.pruned(), self.images(1), path, dynamic_batch=True)
        return path

    def expected(self, batch: int, folder: Path) -> tuple[Tensor, int]:
        """The output of eager PyTorch and its FLOPs, computed once."""
        path = self.path(folder, f"-{batch}.pt")
        if not path.exists():
            eager, images = deployed_copy(self.pruned(), engine=False), self.images(batch)
            with flop_counter() as counter:
                output = eager(images)
            torch.save((output, counter.get_total_flops()), path)
        return torch.load(path)


def half_engine(network: Network, folder: Path) -> Call:
    half = deployed_copy(network.pruned(), equal_counts=True).to(torch.bfloat16)
    return lambda images: half(images.to(torch.bfloat16))


def compiled(network: Network, folder: Path) -> Call:
    return torch.compile(deployed_copy(network.pruned(), engine=False), dynamic=False)


RUNTIMES: dict[str, Callable[[Network, Path], Call]] = {
    "eager": lambda network, folder: deployed_copy(network.pruned(), engine=False),
    # Equal counts, as files have
    "engine": lambda network, folder: deployed_copy(network.pruned(), equal_counts=True),
    "engine, bfloat16": half_engine,
    "onnxruntime": lambda network, folder: onnxruntime_call(network.exported(folder)),
    "OpenVINO": lambda network, folder: openvino_call(network.exported(folder), "f32"),
    "OpenVINO, bfloat16": lambda network, folder: openvino_call(network.exported(folder), "bf16"),
    "torch.compile": compiled,
}


@torch.no_grad()
def measure(
    runtime: str, networks: list[Network], batch: int, folder: Path, seconds: float
) -> list[Row]:
    """Check and time networks, the unpruned one first, in a runtime; a row for each pruned one.

    Raises:
        RuntimeError: the runtime computes something else than eager PyTorch.
    """
    calls: dict[Network, Callable[[], Tensor]] = {}
    differences: dict[Network, float] = {}
    flops: dict[Network, int] = {}
    precision = runtime.rpartition(", ")[2]
    tolerance = TOLERANCES.get(precision, FLOAT32_TOLERANCE)
    for network in networks:
        calls[network] = partial(RUNTIMES[runtime](network, folder), network.images(batch))
        expected, flops[network] = network.expected(batch, folder)
        differences[network] = relative_difference(calls[network](), expected)
        if not differences[network] < tolerance:
            raise RuntimeError(
                f"{runtime} differs from eager by {differences[network]:.1e} of its norm, allowed "
                f"are {tolerance:g}"
            )
    warm_up = time_interleaved(calls, CPU, 1)
    once = sum(timing.seconds for timing in warm_up.values())
    times = time_interleaved(calls, CPU, max(LEAST_ROUNDS, int(seconds / once)))
    unpruned = networks[0]
    rows: list[Row] = []
    for network in networks[1:]:
        before, after = times[unpruned], times[network]
        ratio = flops[unpruned] / flops[network]
        rows.append(
            {
                "model": network.model,
                "batch": batch,
                "runtime": runtime,
                "rate": network.rate,
                "merge": network.merge,
                "unpruned_ms": round(1e3 * before.seconds, 3),
                "pruned_ms": round(1e3 * after.seconds, 3),
                "spread": round(max(before.spread, after.spread), 4),
                "speedup": round(before.seconds / after.seconds, 4),
                "flop_ratio": round(ratio, 4),
                "share": round(before.seconds / after.seconds / ratio, 4),
                "difference": float(f"{max(differences[unpruned], differences[network]):.1e}"),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = ["vit_small_patch16_224", "vit_base_patch16_224"]
    parser.add_argument("--models", nargs="+", default=models)
    parser.add_argument("--rates", nargs="+", type=int, default=[8, 12])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--files", type=Path, default=Path("build/exported"))
    parser.add_argument("--seconds", type=float, default=20.0, help="timing of one process")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, default=RESULTS / "exported.json")
    options = parser.parse_args()
    os.makedirs(options.files, exist_ok=True)
    keys = ("model", "batch", "runtime")
    results = Results(options.out, environment("cpu"), keys)
    cells = itertools.product(options.models, options.batches, options.runtimes)
    for model, batch, runtime in results.remaining(cells, options.minutes):
        pruned = [
            Network(model, rate, merge)
            for rate, merge in itertools.product(options.rates, (True, False))
            if runtime != "torch.compile" or (rate, merge) == (8, True)
        ]
        networks = [Network(model, 0, False), *pruned]
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            arguments = (runtime, networks, batch, options.files, options.seconds)
            rows = process.submit(measure, *arguments).result()
        [eager, *_] = [
            row
            for row in [*results.rows, *rows]
            if (row["model"], row["batch"], row["runtime"]) == (model, batch, "eager")
        ]
        results.add(
            *(
                row | {"over_eager": round(eager["unpruned_ms"] / row["pruned_ms"], 4)}
                for row in rows
            )
        )
        for row in rows:
            print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
