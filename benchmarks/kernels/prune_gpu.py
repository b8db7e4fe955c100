"""Prune on a CUDA GPU against its baselines: medians of replayed graphs, with cold and hot L2.

python -m benchmarks.kernels.prune_gpu [--minutes 9] [--out benchmarks/results/gpu_ops.json]
[--device cpu]

A run that is out of minutes, or interrupted, resumes with the same --out.

Cold: every replay works on another copy of x, and the copies together are several times the L2.
Hot: always the same. Bytes counted: x read once for the scores and once for the copy, every row
written once, plus indices and scores. With --device cpu one small shape is checked and timed by the
clock, to test this script.
"""

import argparse
import itertools
from functools import partial
from pathlib import Path

import torch

from benchmarks.baselines.prune import PRUNE, check, topk_and_index_select
from benchmarks.kernels.shapes import GPU_SHAPES, make_inputs, num_keep
from benchmarks.utils.results import RESULTS, Results, Row, environment, name_of
from benchmarks.utils.timing import capture, clocked, cold_copies, compiled, quantile, replay


@torch.inference_mode()
def measure(shape: tuple[int, int, int], dtype: torch.dtype, device: str, *, cold: bool) -> Row:
    x, query = make_inputs(shape, dtype, device)
    keep = num_keep(shape[1])
    check(x, query, keep)
    inputs = cold_copies(x) if cold else [x] * 8
    functions = PRUNE | {"top-k + index_select": topk_and_index_select}
    functions |= {
        f"compiled {name}": compiled(PRUNE[name]) for name in ("published", "sort + index_select")
    }
    row: Row = {
        "shape": list(shape),
        "model": GPU_SHAPES.get(shape),
        "dtype": name_of(dtype),
        "keep": keep,
    }
    row["L2"] = "cold" if cold else "hot"
    graphs = {}
    for name, function in functions.items() if x.is_cuda else ():
        try:
            graphs[name] = capture(function, inputs, query, keep)
        except RuntimeError as error:  # the baseline cannot be captured
            row[f"{name}: error"] = str(error).splitlines()[0]
    if x.is_cuda:
        times = replay(graphs, len(inputs))
    else:
        times = clocked(
            {name: partial(call, query=query, keep=keep) for name, call in functions.items()},
            inputs,
            3,
        )
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_ops.json")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="start no cell after this time (default: 9)"
    )
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    shapes = GPU_SHAPES if options.device == "cuda" else [(2, 197, 384)]
    results = Results(options.out, environment(options.device), keys=("shape", "dtype", "L2"))
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    cells = [
        (shape, name_of(dtype), level)
        for dtype, shape, level in itertools.product(dtypes, shapes, ("cold", "hot"))
    ]
    for shape, dtype, level in results.remaining(cells, options.minutes):
        row = measure(shape, getattr(torch, dtype), options.device, cold=level == "cold")
        results.add(row)
        figures = {key: value for key, value in row.items() if " / " in key or key == "prune, us"}
        print(dtype, shape, level, figures, flush=True)


if __name__ == "__main__":
    main()
