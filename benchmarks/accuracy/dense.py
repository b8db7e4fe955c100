"""Common parts of the dense benchmarks: defaults of the recipe, and a resumable sweep."""

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import cropr_kernels as cropr
from benchmarks.accuracy.data import WEIGHTS
from benchmarks.baselines.fusions import OTHER_FUSIONS, FusedSegmenter
from benchmarks.baselines.modules import MODULES, replace_modules
from benchmarks.baselines.registry import FUSIONS
from benchmarks.utils.results import Results, environment
from cropr_kernels.pruning.model import is_pruned
from cropr_kernels.train import Config, build, train
from cropr_kernels.train.data import load_data
from cropr_kernels.utils.flops import flop_counter

FUSED = {FUSIONS[fusion].name: fusion for fusion in OTHER_FUSIONS}  # by the name of the method


def arguments(
    doc: str | None, methods: dict[str, Any], epochs: int, lr: float
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    return parser


def shared_options(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Options of every run."""
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
    """Build the network of a method, based on the one that the configuration describes."""
    torch.manual_seed(config.seed)  # for random tokens
    task = build.task(config, num_classes)
    method = name.removeprefix("LLF, ")
    if method in FUSED:
        return FusedSegmenter(
            task.backbone,
            num_classes,
            grid=task.grid,
            fusion=FUSED[method],
            ignore_index=config.ignore_index,
        )
    if method in MODULES:
        replace_modules(task.backbone, MODULES[method])
    return task


@torch.no_grad()
def restored_errors(
    task: Any, data: Any, side: int, photos: int = 16
) -> dict[str, dict[int, float]]:
    """Relative error of the normed tokens in the first full block, against no pruning.

    Squared error over the variance of the unpruned tokens, by the number of blocks before a patch
    was pruned; patches that were never pruned have the depth of the network. Empty if there is no
    fusion.
    """
    backbone = task.eval().backbone
    if not is_pruned(backbone) or backbone.cropr.config.llf is None:
        return {}
    images = torch.stack([data.val[i][0][:, :side, :side] for i in range(photos)])
    config = backbone.cropr.config
    fused = backbone.blocks[-config.full_blocks]
    block_inputs: list[Tensor] = []

    def keep_patches(block: Any, args: tuple[Tensor, ...]) -> None:
        block_inputs.append(args[0][:, backbone.num_prefix_tokens :])

    handle = fused.register_forward_pre_hook(keep_patches)
    pruned_after = cropr.pruning_map(backbone, images).flatten(1)
    cropr.set_rate(backbone, 0).forward_features(images)
    handle.remove()
    backbone.cropr.config = config
    restored, unpruned = map(fused.norm1, block_inputs)
    variance = (unpruned - unpruned.mean((0, 1))).square().sum(2).mean()
    error = (restored - unpruned).square().sum(2) / variance
    depths = pruned_after.unique()
    return {
        "restored": {
            int(depth): round(error[pruned_after == depth].mean().item(), 4) for depth in depths
        }
    }


def sweep(
    options: argparse.Namespace,
    out: Path,
    recipe: Callable[[int, str], Config],
    flops_of: Callable[[Any], Any],
) -> None:
    """Train every method with every seed, save each; flops_of(task) runs a forward to count."""
    env = environment("cuda" if torch.cuda.is_available() else "cpu")
    recorded = ("epochs", "lr", "batch", "photos", "one_category")
    env |= {name: value for name, value in vars(options).items() if name in recorded}
    results = Results(out, env, keys=("seed", "method"))
    cells = list(results.remaining(itertools.product(options.seeds, options.methods)))
    for seed, name in tqdm(cells, desc="methods"):
        config = recipe(seed, name)
        data = load_data(config)
        task = build_task(config, name, len(data.classes))
        with tempfile.TemporaryDirectory() as folder:
            metrics = train(config, folder, data=data, task=task)
        with torch.no_grad(), flop_counter() as counter:
            flops_of(task.to("cpu").eval().requires_grad_(False))
        figures = {
            key: value
            for key, value in metrics.items()
            if key not in ("skipped", "images", "seconds", "aux")
        }
        figures |= {"GFLOPs": round(counter.get_total_flops() / 2e9, 3)}
        if config.task == "segmentation":
            figures |= restored_errors(task, data, config.img_size[0])
        results.add({"seed": seed, "method": name, **figures})
        print(results.rows[-1], flush=True)
