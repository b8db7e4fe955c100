"""What it costs to launch an op of the engine, as a multiple of PyTorch's layer_norm; the driver is a mock.

python -m benchmarks.kernels.launch_cost [--out benchmarks/results/launch_cost.json]

A row is an op: through Triton's front end, and from a plan. Tensors are one image of ViT-S, on the CPU; kernels are
compiled and launched, none runs, and what the driver takes for a launch is left out. The least of all rounds counts.
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
    """The launcher and the arguments of each op."""
    n, count, dim, keep = 197, 150, 384, 142
    x, rows = torch.randn(1, n, dim).bfloat16(), torch.randn(1, count, dim).bfloat16()
    gamma, weight, bias = (torch.randn(dim).bfloat16() for _ in range(3))
    idx = torch.arange(count)[None].clone()
    sizes, parent = torch.ones(1, n), torch.arange(n)[None].clone()
    safe, candidates = idx[:, : count - 16].clone(), idx[:, count - 16 :].clone()
    heads, table = torch.randn(1, n, 6, 64).bfloat16(), torch.randn(n - 1, 128)
    return {
        "gather_norm": (residual.gather_norm, (x, idx, weight, bias, 1e-6)),
        "add_norm_": (residual.add_norm_, (x, idx, rows, gamma, weight, bias, 1e-6)),
        "add_select_": (residual.add_select_, (x, idx, rows, gamma, torch.randn(dim), keep, 1, None, 0.0, None)),
        "merge_": (merge.merge_, (x, safe, candidates, sizes, parent, keep, 1)),
        "parent_offsets_": (parent_offsets.parent_offsets_, (x, safe, candidates, parent, 1)),
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--calls", type=int, default=100, help="of each op in a round")
    parser.add_argument("--out", type=Path, default=RESULTS / "launch_cost.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(options.out, environment("cpu"), keys=("op",))
    norm, weight = torch.nn.functional.layer_norm, torch.randn(384).bfloat16()
    token = torch.randn(1, 384).bfloat16(), (384,), weight, weight
    with tempfile.TemporaryDirectory() as folder, mock_cuda(Path(folder)) as cuda, torch.inference_mode():
        for name, (launcher, args) in calls().items():
            op = getattr(cuda.ops, name)
            with cuda.recording() as launched:
                op(*args)
                first = [one[:4] for one in launched]
                launched.clear()
                op(*args)
                if not replayed() or [one[:4] for one in launched] != first:
                    raise SystemExit(f"{name}: the plan does not launch what Triton launched")
            sides = {"norm": (norm, token), "triton": (launcher, args), "plan": (op, args)}
            least = dict.fromkeys(sides, float("inf"))
            for _ in range(options.rounds):
                for side, call in sides.items():
                    least[side] = min(least[side], microseconds(*call, options.calls))
            row = {"op": name} | {side: round(least[side] / least["norm"], 2) for side in ("triton", "plan")}
            results.replace([*(old for old in results.rows if old["op"] != name), row])
            print(
                f"{name:12} through Triton {row['triton']:6.1f}   plan {row['plan']:5.2f}   of a layer_norm", flush=True
            )


if __name__ == "__main__":
    main()
