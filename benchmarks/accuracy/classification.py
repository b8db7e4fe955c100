"""Accuracy after fine-tuning a pretrained ViT-Ti on Tiny-ImageNet, one recipe for every method.

python -m benchmarks.accuracy.classification --data FOLDER [--photos 1600] [--compare 1000]
    [--epochs 1] [--seeds 2 3 4] [--cells main 2x ablations ...] [--device cpu] [--out FILE]

FOLDER as in data.py. Each seed draws its photos: for training from the training split, for
comparison from the validation split; all methods see the same photos in the same order. Methods
within a group of cells take the same FLOPs, unless their name says otherwise. An interrupted run
resumes.
"""

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import cropr_kernels as cropr
from benchmarks.accuracy.cells import CELLS
from benchmarks.accuracy.data import (
    DATA,
    TRAIN,
    VAL,
    WEIGHTS,
    Encoded,
    Photos,
    load_model,
    patches_in,
)
from benchmarks.baselines.learned import ReducedClassifier
from benchmarks.baselines.modules import MODULES, replace_modules
from benchmarks.baselines.network import Reduced
from benchmarks.baselines.registry import REDUCE_ONCE, SYSTEMS
from benchmarks.baselines.scorers import SCORERS
from benchmarks.utils.results import RESULTS, Results, environment
from cropr_kernels.train import Config, build, train
from cropr_kernels.train.data import Data, classification_transforms
from cropr_kernels.utils.flops import flop_counter


def recipe(options: argparse.Namespace, seed: int, cell: dict[str, Any]) -> Config:
    return Config(
        weights=str(options.data / WEIGHTS),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        epochs=options.epochs,
        warmup_epochs=0.1 * options.epochs,
        batch_size=options.batch,
        lr=options.lr,
        layer_decay=0.75,
        head_lr_scale=10.0,
        scale=(0.5, 1.0),
        smoothing=0.1,
        amp="bfloat16",
        workers=options.workers,
        seed=seed,
        device=options.device,
        save_steps=10**6,
        **cell,
    )


def build_task(config: Config, name: str) -> Any:
    """Build the network of a method, based on the one that the configuration describes."""
    torch.manual_seed(config.seed)  # for random tokens
    task = build.task(config, 200)
    method = name.removesuffix(", LLF").removeprefix("random start, ")
    if method in ("random", "variance"):
        replace_modules(task.backbone, MODULES[method])
    elif method in SYSTEMS:
        base, _ = load_model(Path(config.weights).parent)
        tokens = base.num_prefix_tokens + base.grid**2
        counts = cropr.Schedule(**config.schedule).counts(tokens, len(base.blocks), 1, config.llf)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = Reduced(base, SYSTEMS[method], counts, llf=config.llf)
        teacher = load_model(Path(config.weights).parent)[0] if method in REDUCE_ONCE else None
        return ReducedClassifier(network, config.smoothing, teacher=teacher)
    elif method in SCORERS:
        width = task.backbone.embed_dim
        replace_modules(task.backbone, lambda module, block: SCORERS[method](width, 200))
    return task


def share_in_box(task: Any, data: Photos) -> float | None:
    """Percentage of the patches kept to the end whose centre lies in the object's box."""
    if not hasattr(task.backbone, "cropr") or data.encoded.boxes is None:
        return None
    inside = 0.0
    count = min(200, len(data))
    boxes = patches_in(torch.as_tensor(data.encoded.boxes[:count]).float()).unflatten(1, (14, 14))
    for i in range(count):
        pruned_after = cropr.pruning_map(task.backbone, data[i][0][None])[0]
        kept = pruned_after == pruned_after.max()
        inside += float((kept & boxes[i]).sum() / kept.sum())
    return round(100 * inside / count, 2)


def count_gflops(task: Any, image: torch.Tensor) -> float:
    """GFLOPs (multiply-adds) of one image."""
    with torch.no_grad(), flop_counter() as counter:
        task(image)
    return round(counter.get_total_flops() / 2e9, 3)


def run_cell(config: Config, name: str, data: Data) -> dict[str, Any]:
    """Train a method; return accuracies, GFLOPs, and the share of its patches on the object."""
    task = build_task(config, name)
    with tempfile.TemporaryDirectory() as folder:
        metrics = train(config, folder, data=data, task=task)
    task = task.to("cpu").eval().requires_grad_(False)
    row = {"top-1": metrics["top-1"]} | ({"aux": metrics["aux"]} if "aux" in metrics else {})
    return row | {
        "GFLOPs": count_gflops(task, data.val[0][0][None]),
        "in box": share_in_box(task, data.val),
    }


def cells_of(options: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    """Yield group, seed and method; all methods of a seed first, to compare partial results."""
    for group, seed in itertools.product(options.cells, options.seeds):
        for name in CELLS[group]:
            if not options.methods or name in options.methods:
                yield group, seed, name


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=1600)
    parser.add_argument("--compare", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--methods", nargs="+", default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.json")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    _, classes = load_model(options.data)
    env = environment("cuda" if torch.cuda.is_available() else "cpu")
    env |= {name: getattr(options, name) for name in ("photos", "compare", "epochs", "batch", "lr")}
    results = Results(options.out, env, keys=("group", "seed", "method"))
    for seed, seed_cells in itertools.groupby(
        results.remaining(cells_of(options)), key=lambda cell: cell[1]
    ):
        path = options.data / DATA["Tiny-ImageNet"]
        encoded = [
            Encoded(path, TRAIN, options.photos, seed),
            Encoded(path, VAL, options.compare, seed),
        ]
        for group, _, name in seed_cells:
            config = recipe(options, seed, CELLS[group][name])
            transforms = classification_transforms(config)
            photos = [
                Photos(split, classes, transform) for split, transform in zip(encoded, transforms)
            ]
            row = {"group": group, "seed": seed, "method": name} | run_cell(
                config, name, Data(*photos, classes)
            )
            results.add(row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
