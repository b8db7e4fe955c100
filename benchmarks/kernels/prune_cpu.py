"""Prune on the CPU against its baselines, one thread, interleaved: ratios within one run.

python -m benchmarks.kernels.prune_cpu [--seconds 6] [--threads 1] [--compile] [--out
benchmarks/results/cpu_ops.json]
"""

import argparse
import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.baselines.prune import PRUNE, check
from benchmarks.kernels.shapes import CPU_SHAPES, make_inputs, num_keep
from benchmarks.utils.results import RESULTS, Results, Row, environment, name_of
from benchmarks.utils.timing import compiled, quantile

TURN = 2e-3  # seconds
PASSES = 6


class InterleavedTimer:
    """Times functions in turns, in an order that changes every round.

    A turn lasts at least TURN. Its first call finds the caches as the other functions left them
    (`first`); the others follow back to back (`back_to_back` holds their mean). Times are in
    seconds.
    """

    def __init__(self, functions: dict[str, Callable[..., Any]]) -> None:
        self.functions = functions
        self.back_to_back: dict[str, list[float]] = {name: [] for name in functions}
        self.first: dict[str, list[float]] = {name: [] for name in functions}
        self.shuffler = random.Random(0)

    def run(self, args: tuple[Any, ...], seconds: float) -> None:
        """Add turns for about this many seconds; the first two rounds only warm up."""
        order = list(self.functions)
        deadline = time.perf_counter() + seconds
        rounds = 0
        while rounds < 4 or time.perf_counter() < deadline:
            self.shuffler.shuffle(order)
            for name in order:
                calls: list[float] = []
                while len(calls) < 2 or sum(calls) < TURN:
                    start = time.perf_counter()
                    result = self.functions[name](*args)
                    calls.append(time.perf_counter() - start)
                    del result
                if rounds > 1:
                    self.first[name].append(calls[0])
                    self.back_to_back[name].append(sum(calls[1:]) / len(calls[1:]))
            rounds += 1


class Cell:
    """One shape and dtype, with its times so far. Its tensors live only while it runs."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, with_compile: bool) -> None:
        self.shape = shape
        self.dtype = dtype
        self.keep = num_keep(shape[1])
        functions = dict(PRUNE)
        if with_compile:
            functions |= {
                f"compiled {name}": compiled(PRUNE[name])
                for name in ("published", "sort + index_select")
            }
        self.timer = InterleavedTimer(functions)

    def run(self, seconds: float) -> None:
        """Check the result, then time it for this many seconds."""
        args = (*make_inputs(self.shape, self.dtype, "cpu"), self.keep)
        check(*args)
        self.timer.run(args, seconds)

    def row(self) -> dict[str, Any]:
        back_to_back = self.timer.back_to_back
        first = self.timer.first
        median = {name: quantile(values, 0.5) for name, values in back_to_back.items()}
        row: Row = {
            "shape": list(self.shape),
            "model": CPU_SHAPES[self.shape],
            "dtype": name_of(self.dtype),
        }
        row |= {"keep": self.keep, "turns": len(back_to_back["prune"])}
        row["prune / copy of x"] = median["prune"] / median["copy of x"]
        for name in back_to_back:
            if name not in ("prune", "copy of x"):
                row[f"{name} / prune"] = median[name] / median["prune"]
        row["prune / copy of x, first call"] = quantile(first["prune"], 0.5) / quantile(
            first["copy of x"], 0.5
        )
        row["spread of prune (p90 / p10)"] = quantile(back_to_back["prune"], 0.9) / quantile(
            back_to_back["prune"], 0.1
        )
        return row


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="time per cell (default: 6)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--compile", action="store_true", help="also time torch.compile of both sequences"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_ops.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = Results(options.out, environment("cpu"))
    pairs = itertools.product((torch.float32, torch.bfloat16), CPU_SHAPES)
    cells = [Cell(shape, dtype, options.compile) for dtype, shape in pairs]
    # Every pass runs every cell, so that a busy minute of the machine affects all of them.
    for cell in tqdm(cells * PASSES, desc="cpu ops", mininterval=1):
        cell.run(options.seconds / PASSES)
        results.replace([cell.row() for cell in cells if cell.timer.back_to_back["prune"]])
    for row in results.rows:
        ratios = "  ".join(
            f"{name} {value:.2f}"
            for name, value in row.items()
            if " / " in name and "spread" not in name
        )
        print(f"{row['dtype']:9}{row['shape']!s:17}{ratios}")
    print(
        "goals: prune / copy of x <= 2.5, published / prune >= 4, sort + index_select / prune >= "
        f"1.5\n{options.out}"
    )


if __name__ == "__main__":
    main()
