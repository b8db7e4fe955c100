"""Prune on the CPU against its rivals, one thread, taking turns: ratios within one run.

python benchmarks/cpu.py [--seconds 3] [--threads 1] [--compile] [--out benchmarks/results/cpu_ops.json]
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    CPU_SHAPES,
    RESULTS,
    RIVALS,
    check,
    compiled,
    environment,
    make_inputs,
    name_of,
    num_keep,
    quantile,
    save,
)
from tqdm import tqdm

TURN = 2e-3  # seconds


def time_turns(
    functions: dict[str, Callable[..., Any]], args: tuple[Any, ...], seconds: float
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of a call, the functions taking turns in an order that changes every round.

    A turn lasts at least TURN. Its first call finds the caches as the others left them; the rest run back to back.

    Returns:
        Per function the calls that ran back to back (a turn's mean), and the first calls of each turn.
    """
    steady: dict[str, list[float]] = {name: [] for name in functions}
    first: dict[str, list[float]] = {name: [] for name in functions}
    turns, shuffler = list(functions), random.Random(0)
    deadline, rounds = time.perf_counter() + seconds, 0
    while rounds < 7 or time.perf_counter() < deadline:
        shuffler.shuffle(turns)
        for name in turns:
            calls: list[float] = []
            while len(calls) < 2 or sum(calls) < TURN:
                start = time.perf_counter()
                result = functions[name](*args)
                calls.append(time.perf_counter() - start)
                del result
            if rounds > 1:
                first[name].append(calls[0])
                steady[name].append(sum(calls[1:]) / len(calls[1:]))
        rounds += 1
    return steady, first


@torch.inference_mode()
def measure(shape: tuple[int, int, int], dtype: torch.dtype, seconds: float, with_compile: bool) -> dict[str, Any]:
    x, query = make_inputs(shape, dtype, "cpu")
    keep = num_keep(shape[1])
    check(x, query, keep)
    functions = dict(RIVALS)
    if with_compile:
        functions |= {f"compiled {name}": compiled(RIVALS[name]) for name in ("published", "sort + index_select")}
    steady, first = time_turns(functions, (x, query, keep), seconds)
    median = {name: quantile(values, 0.5) for name, values in steady.items()}
    row: dict[str, Any] = {"shape": list(shape), "model": CPU_SHAPES[shape], "dtype": name_of(dtype), "keep": keep}
    row["turns"] = len(steady["prune"])
    row["prune / copy of x"] = median["prune"] / median["copy of x"]
    for name in functions:
        if name not in ("prune", "copy of x"):
            row[f"{name} / prune"] = median[name] / median["prune"]
    row["prune / copy of x, first call"] = quantile(first["prune"], 0.5) / quantile(first["copy of x"], 0.5)
    row["spread of prune (p90 / p10)"] = quantile(steady["prune"], 0.9) / quantile(steady["prune"], 0.1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="time per cell (default: 3)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of both rivals")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_ops.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    env, rows = environment("cpu"), []
    cells = [(shape, dtype) for dtype in (torch.float32, torch.bfloat16) for shape in CPU_SHAPES]
    for shape, dtype in tqdm(cells, desc="cpu ops", mininterval=1):
        rows.append(measure(shape, dtype, options.seconds, options.compile))
        save(options.out, env, rows)
    for row in rows:
        ratios = "  ".join(
            f"{name} {value:.2f}" for name, value in row.items() if " / " in name and "spread" not in name
        )
        print(f"{row['dtype']:9}{row['shape']!s:17}{ratios}")
    print(f"goals: prune / copy of x <= 2.5, published / prune >= 4, sort + index_select / prune >= 1.5\n{options.out}")


if __name__ == "__main__":
    main()
