"""What pruning costs after fine-tuning: a pretrained ViT-Ti on Tiny-ImageNet, every method by the same recipe.

python -m benchmarks.accuracy.classification --data FOLDER [--photos 1600] [--compare 1000] [--epochs 1]
    [--seeds 2 3 4] [--cells main 2x ablations ...] [--device cpu] [--out FILE]

FOLDER as in data.py. Each seed draws its own photos, to train on from the training split and to compare on
from the validation split; all methods see the same ones in the same order. Methods within a group of cells cost the
same FLOPs, unless their name says otherwise. A run that is cut off goes on where it stopped.
"""

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch

import cropr_kernels as cropr
from benchmarks.accuracy.cells import CELLS
from benchmarks.accuracy.data import DATA, TRAIN, VAL, WEIGHTS, Encoded, Photos, load_model, patches_in
from benchmarks.baselines.learned import ReducedClassifier
from benchmarks.baselines.modules import MODULES, replace_modules
from benchmarks.baselines.network import Reduced
from benchmarks.baselines.registry import ONCE, SYSTEMS
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
    """The network of a method, in place of the one that the configuration describes."""
    torch.manual_seed(config.seed)  # for random tokens
    task = build.task(config, 200)
    kind = name.removesuffix(", LLF").removeprefix("random start, ")
    if kind in ("random", "variance"):
        replace_modules(task.backbone, MODULES[kind])
    elif kind in SYSTEMS:
        base, _ = load_model(Path(config.weights).parent)
        tokens = base.num_prefix_tokens + base.grid**2
        counts = cropr.Schedule(**config.schedule).counts(tokens, len(base.blocks), 1, config.llf)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = Reduced(base, SYSTEMS[kind], counts, llf=config.llf)
        teacher = load_model(Path(config.weights).parent)[0] if kind in ONCE else None
        return ReducedClassifier(network, config.smoothing, teacher=teacher)
    elif kind in SCORERS:
        width = task.backbone.embed_dim
        replace_modules(task.backbone, lambda module, block: SCORERS[kind](width, 200))
    return task


def share_in_box(task: Any, data: Photos) -> float | None:
    """Of the patches kept to the end, the share whose centre lies in the object's box, in percent."""
    if not hasattr(task.backbone, "cropr") or data.encoded.boxes is None:
        return None
    inside, count = 0.0, min(200, len(data))
    boxes = patches_in(torch.as_tensor(data.encoded.boxes[:count]).float()).unflatten(1, (14, 14))
    for i in range(count):
        pruned_after = cropr.pruning_map(task.backbone, data[i][0][None])[0]
        kept = pruned_after == pruned_after.max()
        inside += float((kept & boxes[i]).sum() / kept.sum())
    return round(100 * inside / count, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    options = parser.parse_args()
    _, classes = load_model(options.data)
    env = environment("cuda" if torch.cuda.is_available() else "cpu")
    env |= {name: getattr(options, name) for name in ("photos", "compare", "epochs", "batch", "lr")}
    results = Results(options.out, env, keys=("group", "seed", "method"))
    cells = (  # all methods of a seed before the next one: what there is can be compared
        (group, seed, name)
        for group, seed in itertools.product(options.cells, options.seeds)
        for name in CELLS[group]
        if name in (options.methods or [name])
    )
    for seed, of_seed in itertools.groupby(results.remaining(cells), key=lambda cell: cell[1]):
        encoded = [
            Encoded(options.data / DATA["Tiny-ImageNet"], split, count, seed)
            for split, count in ((TRAIN, options.photos), (VAL, options.compare))
        ]
        for group, _, name in of_seed:
            config = recipe(options, seed, CELLS[group][name])
            transforms = classification_transforms(config)
            data = Data(*(Photos(*parts) for parts in zip(encoded, [classes] * 2, transforms)), classes)
            task = build_task(config, name)
            with tempfile.TemporaryDirectory() as folder:
                reached = train(config, folder, data=data, task=task)
            row: dict[str, Any] = {"group": group, "seed": seed, "method": name, "top-1": reached["top-1"]}
            row |= {"aux": reached["aux"]} if "aux" in reached else {}
            task = task.to("cpu").eval().requires_grad_(False)
            with torch.no_grad(), flop_counter() as counter:
                task(data.val[0][0][None])
            row["GFLOPs"] = round(counter.get_total_flops() / 2e9, 3)
            row["in box"] = share_in_box(task, data.val)
            results.add(row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
