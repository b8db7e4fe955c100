"""CPU time to launch an op of the engine, relative to PyTorch's layer_norm; the driver is a mock.

python -m benchmarks.kernels.launch_cost [--out benchmarks/results/launch_cost.json]

A row is an op: through Triton's front end, and from recorded launches (column "plan"). Tensors are
one image of ViT-S, on the CPU; kernels are compiled and launched, none runs, and the time of the
driver is not included. The fastest round counts.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.mock_driver import mock_cuda
from benchmarks.utils.results import RESULTS, Results, environment
from cropr_kernels.ops.extension import replayed
from cropr_kernels.ops.triton import merge, parent_offsets, prune, residual


def calls() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Launcher and arguments by op."""
    n, count, dim, keep = 197, 150, 384, 142
    x = torch.randn(1, n, dim).bfloat16()
    rows = torch.randn(1, count, dim).bfloat16()
    gamma, weight, bias = (torch.randn(dim).bfloat16() for _ in range(3))
    idx = torch.arange(count)[None].clone()
    sizes = torch.ones(1, n)
    parent = torch.arange(n)[None].clone()
    target_idx = idx[:, : count - 16].clone()
    candidate_idx = idx[:, count - 16 :].clone()
    heads = torch.randn(1, n, 6, 64).bfloat16()
    table = torch.randn(n - 1, 128)
    return {
        "gather_norm": (residual.gather_norm, (x, idx, weight, bias, 1e-6)),
        "add_norm_": (residual.add_norm_, (x, idx, rows, gamma, weight, bias, 1e-6)),
        "add_select_": (
            residual.add_select_,
            (x, idx, rows, gamma, torch.randn(dim), keep, 1, None, 0.0, None),
        ),
        "merge_": (merge.merge_, (x, target_idx, candidate_idx, sizes, parent, keep, 1)),
        "parent_offsets_": (
            parent_offsets.parent_offsets_,
            (x, target_idx, candidate_idx, parent, 1),
        ),
        "add_parents": (parent_offsets.add_parents, (x, parent)),
        "rotate_": (residual.rotate_, (heads, table, None, 1, False)),
        "prune": (prune.prune, (x, torch.randn(dim), keep, 1, None)),
    }


def microseconds(call: Callable[..., Any], args: tuple[Any, ...], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call(*args)
    return (time.perf_counter() - start) / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--calls", type=int, default=100, help="of each op in a round")
    parser.add_argument("--out", type=Path, default=RESULTS / "launch_cost.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(options.out, environment("cpu"), keys=("op",))
    norm = torch.nn.functional.layer_norm
    weight = torch.randn(384).bfloat16()
    token = (torch.randn(1, 384).bfloat16(), (384,), weight, weight)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock_cuda(Path(folder)) as cuda,
        torch.inference_mode(),
    ):
        for name, (launcher, args) in calls().items():
            op = getattr(cuda.ops, name)
            with cuda.recording() as launched:
                op(*args)
                first = [launch[:4] for launch in launched]
                launched.clear()
                op(*args)
                if not replayed() or [launch[:4] for launch in launched] != first:
                    raise SystemExit(f"{name}: the recorded launches differ from Triton's")
            sides = {"norm": (norm, token), "triton": (launcher, args), "plan": (op, args)}
            best = dict.fromkeys(sides, float("inf"))
            for _ in range(options.rounds):
                for side, call in sides.items():
                    best[side] = min(best[side], microseconds(*call, options.calls))
            row = {"op": name} | {
                side: round(best[side] / best["norm"], 2) for side in ("triton", "plan")
            }
            results.replace([*(row for row in results.rows if row["op"] != name), row])
            print(
                f"{name:12} through Triton {row['triton']:6.1f}   plan {row['plan']:5.2f}   of a "
                "layer_norm",
                flush=True,
            )


if __name__ == "__main__":
    main()
