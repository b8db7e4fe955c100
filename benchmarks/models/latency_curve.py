"""Latency curve: time of a stack of blocks against the number of tokens. A file after every count.

python -m benchmarks.models.latency_curve [--model vit_large_patch16_224] [--batch 64] [--dtype
bfloat16] [--step 1]
                                          [--out FILE]

Matrix kernels work in tiles, so time falls in steps: a schedule should land just below one (see the
plot, which needs matplotlib). On a GPU an interrupted run resumes.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch

import cropr_kernels as cropr
from benchmarks.utils.plots import plot_latency_curve
from benchmarks.utils.results import RESULTS, Results, Row, environment
from benchmarks.utils.timing import graphed, quantile, seconds_of


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="vit_large_patch16_224")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs=2, default=[8, 256], metavar=("FIRST", "LAST"))
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = (
        options.out
        or RESULTS / f"{options.device}_latency_curve_{options.model}_b{options.batch}.json"
    )
    blocks = (
        cropr.create_vit(options.model, depth=4)
        .eval()
        .to(options.device, getattr(torch, options.dtype))
        .blocks
    )
    stack = torch.nn.Sequential(*blocks)
    env: dict[str, Any] = environment(options.device)
    env |= {"model": options.model, "blocks": 4, "batch": options.batch, "dtype": options.dtype}
    results = Results(out, env, ("tokens",) if options.device == "cuda" else ())
    rows = [row | {"relative": 1e-3 * row["ms"]} for row in results.rows]  # of an interrupted run
    width = blocks[0].norm1.weight.shape[0]
    first, last = options.tokens
    for (tokens,) in results.remaining(
        (tokens,) for tokens in range(first, last + 1, options.step)
    ):
        x = torch.randn(
            options.batch, tokens, width, device=options.device, dtype=getattr(torch, options.dtype)
        )
        forward = graphed(stack) if x.is_cuda else stack
        forward(x)
        calls = max(1, min(20, int(0.01 / seconds_of(forward, x))))
        median = quantile([seconds_of(forward, x, calls) for _ in range(options.rounds)], 0.5)
        rows.append(
            {"tokens": tokens, "relative": median} | ({"ms": 1e3 * median} if x.is_cuda else {})
        )
        results.replace(relative_to_last(rows))
    if importlib.util.find_spec("matplotlib"):
        plot_latency_curve(out.with_suffix(".png"), results.rows, env)
    else:
        print("no plot: matplotlib is not installed")
    print(out)


def relative_to_last(rows: list[Row]) -> list[Row]:
    """Divide the times by that of the longest sequence measured."""
    return [row | {"relative": round(row["relative"] / rows[-1]["relative"], 4)} for row in rows]


if __name__ == "__main__":
    main()
