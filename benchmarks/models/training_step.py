"""A training step with Cropr against one without, and the cost of the auxiliary path.

python -m benchmarks.models.training_step [--models vit_large_patch16_224 ...] [--batch 128] [--out
FILE]

Ratios within a run; on a GPU also milliseconds and peak memory. A step is forward, loss and
backward, under bfloat16 autocast, without the optimizer. An interrupted run resumes.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import cropr_kernels as cropr
from benchmarks.utils.results import RESULTS, Results, Row, environment
from benchmarks.utils.timing import quantile, seconds_of


def step_of(model: Any, target: Tensor) -> Callable[[Tensor], Tensor]:
    def step(images: Tensor) -> Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            result = model(images)
            if isinstance(result, tuple):
                loss = cropr.loss(
                    cross_entropy, result[0].float(), [aux.float() for aux in result[1]], target
                )
            else:
                loss = cross_entropy(result.float(), target)
        loss.backward()
        return loss.detach()

    return step


def measure(name: str, batch: int, rate: int, device: str, rounds: int) -> Row:
    def fresh() -> Any:
        torch.manual_seed(0)
        return cropr.create_vit(name).to(device).train()

    models = {
        "unpruned": fresh(),
        "Cropr": cropr.apply(fresh(), rate=rate),
        "Cropr, no auxiliary path": cropr.apply(fresh(), rate=rate, num_outputs=0),
    }
    size = models["unpruned"].config.img_size
    images = torch.randn(batch, 3, size, size, device=device)
    target = torch.randint(0, 1000, (batch,), device=device)
    steps = {key: step_of(model, target) for key, model in models.items()}
    row: Row = {"model": name, "batch": batch, "rate": rate}
    for key, step in steps.items():
        if images.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        if not torch.isfinite(step(images)):
            raise RuntimeError(f"{name}, {key}: the loss is not finite; not timed")
        if images.is_cuda:
            row[f"{key}, peak MiB"] = torch.cuda.max_memory_allocated() >> 20
    times: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        for key, step in steps.items():
            times[key].append(seconds_of(step, images))
    median = {key: quantile(values, 0.5) for key, values in times.items()}
    if images.is_cuda:
        row |= {f"{key}, ms": round(1e3 * value, 3) for key, value in median.items()}
    row["unpruned / Cropr"] = round(median["unpruned"] / median["Cropr"], 3)
    row["auxiliary path adds"] = round(median["Cropr"] / median["Cropr, no auxiliary path"] - 1, 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--models", nargs="+", default=["vit_small_patch16_224", "vit_large_patch16_224"]
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or RESULTS / f"{options.device}_training.json"
    results = Results(out, environment(options.device), keys=("model", "batch", "rate"))
    for cell in results.remaining((name, options.batch, options.rate) for name in options.models):
        results.add(measure(*cell, options.device, options.rounds))
        print(results.rows[-1], flush=True)


if __name__ == "__main__":
    main()
