"""What the dense benches share: the recipe's defaults, and a sweep over methods that can be cut off."""

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.accuracy.data import WEIGHTS
from benchmarks.baselines.fusions import OTHER_FUSIONS, FusedSegmenter
from benchmarks.baselines.modules import MODULES, replace_modules
from benchmarks.baselines.registry import FUSIONS
from benchmarks.utils.results import Results, environment
from cropr_kernels.train import Config, build, train
from cropr_kernels.train.data import load_data
from cropr_kernels.utils.flops import flop_counter

FUSED = {FUSIONS[fusion].name: fusion for fusion in OTHER_FUSIONS}  # by the name of the method


def arguments(doc: str | None, methods: dict[str, Any], epochs: int, lr: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    return parser


def shared(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Options that every run has."""
    return {
        "weights": str(options.data / WEIGHTS),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "epochs": options.epochs,
        "warmup_epochs": 0.5,
        "lr": options.lr,
        "amp": "bfloat16",
        "workers": 0,
        "seed": seed,
        "device": options.device,
        "eval_epochs": options.epochs,
        "save_steps": 10**6,
    }


def build_task(config: Config, name: str, num_classes: int) -> Any:
    """The network of a method, in place of the one that the configuration describes."""
    torch.manual_seed(config.seed)  # for random tokens
    task = build.task(config, num_classes)
    kind = name.removeprefix("LLF, ")
    if kind in FUSED:
        return FusedSegmenter(
            task.backbone, num_classes, grid=task.grid, fusion=FUSED[kind], ignore_index=config.ignore_index
        )
    if kind in MODULES:
        replace_modules(task.backbone, MODULES[kind])
    return task


def sweep(
    options: argparse.Namespace, out: Path, recipe: Callable[[int, str], Config], flops_of: Callable[[Any], Any]
) -> None:
    """Train every method with every seed, and save after each; flops_of(task) runs what is counted."""
    env = environment("cuda" if torch.cuda.is_available() else "cpu")
    named = ("epochs", "lr", "batch", "photos", "one_category")
    env |= {name: value for name, value in vars(options).items() if name in named}
    results = Results(out, env, keys=("seed", "method"))
    cells = list(results.remaining(itertools.product(options.seeds, options.methods)))
    for seed, name in tqdm(cells, desc="methods"):
        config = recipe(seed, name)
        data = load_data(config)
        task = build_task(config, name, len(data.classes))
        with tempfile.TemporaryDirectory() as folder:
            reached = train(config, folder, data=data, task=task)
        with torch.no_grad(), flop_counter() as counter:
            flops_of(task.to("cpu").eval().requires_grad_(False))
        figures = {key: value for key, value in reached.items() if key not in ("skipped", "images", "seconds", "aux")}
        results.add({"seed": seed, "method": name, **figures, "GFLOPs": round(counter.get_total_flops() / 2e9, 3)})
        print(results.rows[-1], flush=True)
