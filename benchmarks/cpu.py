"""Prune on the CPU against its rivals, one thread, interleaved runs: ratios within one run.

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
    check,
    compiled,
    copy,
    environment,
    make_inputs,
    name_of,
    num_keep,
    ours,
    published,
    quantile,
    save,
    sort_and_index_select,
)
from tqdm import tqdm

RIVALS: dict[str, Callable[..., Any]] = {
    "prune": ours,
    "copy of x": copy,
    "published": published,
    "sort + index_select": sort_and_index_select,
}


def time_interleaved(functions: dict[str, Callable[..., Any]], args: tuple[Any, ...], seconds: float) -> dict:
    """Seconds of each call, taking turns; the results are freed outside the clock.

    The order changes every round: whoever runs second finds x in the cache.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    turns, shuffler = list(functions), random.Random(0)
    deadline, rounds = time.perf_counter() + seconds, 0
    while rounds < 7 or time.perf_counter() < deadline:
        shuffler.shuffle(turns)
        for name in turns:
            function = functions[name]
            start = time.perf_counter()
            result = function(*args)
            stop = time.perf_counter()
            del result
            if rounds > 1:
                times[name].append(stop - start)
        rounds += 1
    return times


@torch.inference_mode()
def measure(shape: tuple[int, int, int], dtype: torch.dtype, seconds: float, with_compile: bool) -> dict[str, Any]:
    x, query = make_inputs(shape, dtype, "cpu")
    keep = num_keep(shape[1])
    check(x, query, keep)
    functions = dict(RIVALS)
    if with_compile:
        functions |= {f"compiled {name}": compiled(RIVALS[name]) for name in ("published", "sort + index_select")}
    times = time_interleaved(functions, (x, query, keep), seconds)
    median = {name: quantile(values, 0.5) for name, values in times.items()}
    row: dict[str, Any] = {"shape": list(shape), "model": CPU_SHAPES[shape], "dtype": name_of(dtype), "keep": keep}
    row["runs"] = len(times["prune"])
    row["prune / copy of x"] = median["prune"] / median["copy of x"]
    for name in functions:
        if name not in ("prune", "copy of x"):
            row[f"{name} / prune"] = median[name] / median["prune"]
    row["spread of prune (p90 / p10)"] = quantile(times["prune"], 0.9) / quantile(times["prune"], 0.1)
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
