"""Prune on a CUDA GPU against its rivals: replayed graphs, cold and hot L2, medians; a file after every cell.

python benchmarks/gpu.py [--minutes 9] [--out benchmarks/results/gpu_ops.json]

A run that stops at its minutes goes on where it stopped when started again with the same --out.

Cold: every replay works on another copy of x, and the copies together are several times the L2. Hot: always one.
Bytes counted: x read once for the scores and once for the copy, every row written once, indices and scores on top.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    GPU_SHAPES,
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
    topk_and_index_select,
)

COLD_BYTES = 400 << 20


def capture(function: Callable[..., Any], inputs: list[torch.Tensor], *args: Any) -> torch.cuda.CUDAGraph:
    """One graph that calls the function once on each input."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(inputs[0], *args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in inputs:
            function(x, *args)
    return graph


def replay(graphs: dict[str, torch.cuda.CUDAGraph], calls: int, rounds: int = 25) -> dict[str, list[float]]:
    """Microseconds of one call, the graphs taking turns."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for round_ in range(rounds):
        for name, graph in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if round_ > 2:
                times[name].append(1e3 * start.elapsed_time(stop) / calls)
    return times


@torch.inference_mode()
def measure(shape: tuple[int, int, int], dtype: torch.dtype, *, cold: bool) -> dict[str, Any]:
    x, query = make_inputs(shape, dtype, "cuda")
    keep = num_keep(shape[1])
    check(x, query, keep)
    copies = min(max(2, COLD_BYTES // x.nbytes), 64) if cold else 8
    inputs = [x.clone() for _ in range(copies)] if cold else [x] * copies
    functions = RIVALS | {"top-k + index_select": topk_and_index_select}
    functions |= {f"compiled {name}": compiled(RIVALS[name]) for name in ("published", "sort + index_select")}
    row: dict[str, Any] = {"shape": list(shape), "model": GPU_SHAPES[shape], "dtype": name_of(dtype), "keep": keep}
    row["L2"] = "cold" if cold else "hot"
    graphs = {}
    for name, function in functions.items():
        try:
            graphs[name] = capture(function, inputs, query, keep)
        except RuntimeError as error:  # a rival that cannot be captured is recorded as such
            row[f"{name}: error"] = str(error).splitlines()[0]
    times = replay(graphs, copies)
    for name, values in times.items():
        row[f"{name}, us"] = round(quantile(values, 0.5), 2)
        row[f"{name}, us p10 p90"] = [round(quantile(values, q), 2) for q in (0.1, 0.9)]
    moved = 3 * x.nbytes + x.shape[0] * x.shape[1] * (8 + 4)
    row["prune, GB/s"] = round(moved / row["prune, us"] / 1e3, 1)
    for name in times:
        if name not in ("prune", "copy of x"):
            row[f"{name} / prune"] = round(row[f"{name}, us"] / row["prune, us"], 3)
    row["prune / copy of x"] = round(row["prune, us"] / row["copy of x, us"], 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_ops.json")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no cell after so long (default: 9)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    env, started = environment("cuda"), time.monotonic()
    rows: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    done = {(tuple(row["shape"]), row["dtype"], row["L2"]) for row in rows}
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for shape in GPU_SHAPES:
            for cold in (True, False):
                if (shape, name_of(dtype), "cold" if cold else "hot") in done:
                    continue
                if time.monotonic() - started > 60 * options.minutes:
                    print("out of minutes: start again to go on")
                    return
                rows.append(measure(shape, dtype, cold=cold))
                save(options.out, env, rows)
                print(
                    rows[-1]["dtype"], shape, rows[-1]["L2"],
                    {k: v for k, v in rows[-1].items() if " / " in k or k == "prune, us"},
                    flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
