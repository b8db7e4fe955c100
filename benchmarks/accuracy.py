"""What pruning costs after fine-tuning: a pretrained ViT-Ti on Tiny-ImageNet, every method by the same recipe.

python benchmarks/accuracy.py --data FOLDER [--photos 1600] [--compare 1000] [--epochs 1] [--seeds 2 3 4]
                              [--cells main 2x ablations ...] [--device cpu] [--out FILE]

FOLDER as in off_the_shelf.py. Each seed draws its own photos, to train on from the training split and to compare on
from the validation split; all methods see the same ones in the same order. Methods within a group of cells cost the
same FLOPs, unless their name says otherwise. A run that is cut off goes on where it stopped.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, save
from off_the_shelf import DATA, WEIGHTS, Encoded, patches_in
from rivals import ONCE, SYSTEMS, Reduced, ReducedClassifier
from rivals.stands import Random, Variance
from torch import Tensor

import cropr_kernels as cropr
from cropr_kernels.models.factory import load_weights
from cropr_kernels.train import Config, build, train
from cropr_kernels.train.data import Data, classification_transforms
from cropr_kernels.utils.flops import flop_counter


def curve(power: float, total: int = 197, width: int = 192, modules: int = 11) -> list[int]:
    """Counts that fall by (how many blocks lie behind)^power, at the FLOPs of R = 14: over 1, most leave late."""

    def flops(counts: list[int]) -> int:
        return sum(count * (6 * width + count) for count in [total, *counts])

    def counts_of(scale: float) -> list[int]:
        return [max(2, round(total - scale * ((layer + 1) / modules) ** power)) for layer in range(modules)]

    goal = flops(cropr.schedule.rate(total, modules + 1, 14))
    return min((counts_of(scale / 4) for scale in range(4 * total)), key=lambda counts: abs(flops(counts) - goal))


# 1.7 times fewer FLOPs than no pruning: fewer tokens after each block, or once; with the last block whole.
DEC, DEC_LLF, CONST, CONST_LLF = (
    dict(rate=14),
    dict(rate=17, llf=True),
    dict(const=(4, 79)),
    dict(const=(4, 60), llf=True),
)
# The same for other factors. With four blocks whole, dropping once ends at 2.
FACTORS: dict[str, list[dict[str, Any]]] = {
    "1.5x": [dict(rate=11), dict(rate=14, llf=True), dict(const=(4, 103)), dict(const=(4, 88), llf=True)],
    "2x": [dict(ratio=0.863), dict(ratio=0.826, llf=True), dict(const=(4, 51)), dict(const=(4, 27), llf=True)],
    "3x": [dict(ratio=0.756), dict(ratio=0.656, llf=True)],
    "4x": [dict(ratio=0.65), dict(ratio=0.44, llf=True)],
}
STRONG = FACTORS["3x"][0]
CALIBRATED: dict[str, Any] = dict(calibrate=256)

CELLS: dict[str, dict[str, dict[str, Any]]] = {
    "main": {
        "no pruning": {},
        "Cropr": DEC | CALIBRATED,
        "Cropr, LLF": DEC_LLF | CALIBRATED,
        "Cropr, const": CONST | CALIBRATED,
        "Cropr, const, LLF": CONST_LLF | CALIBRATED,
        "variance": DEC,
        "random": DEC,
        "non-salient": DEC | CALIBRATED,
        "Cropr, random start": DEC,
        "Cropr, queries fixed": DEC | CALIBRATED | dict(fixed_queries=True),
    },
    "rivals": {
        "Cropr, merging": DEC | CALIBRATED | dict(merge=True),
        **dict.fromkeys(("attention top-k", "EViT", "ToMe", "ToMe, plain attention", "ATS, trimmed"), DEC),
        **dict.fromkeys(ONCE, CONST),
        **dict.fromkeys(("DPC-KNN, learned weights", "k-medoids", "pixel variance"), DEC),
        **{f"{name}, LLF": DEC_LLF for name in ("attention top-k", "variance", "random")},
        "non-salient, LLF": DEC_LLF | CALIBRATED,
    },
    "schedules": {
        "no pruning": {},
        "Cropr": DEC | CALIBRATED,
        "Cropr, R falls": CALIBRATED | dict(keep=tuple(curve(0.7))),
        "Cropr, merging": DEC | CALIBRATED | dict(merge=True),
        "Cropr, merging, R rises": CALIBRATED | dict(keep=tuple(curve(1.3)), merge=True),
    },
    "last block": {
        "Cropr, LLF": DEC_LLF | CALIBRATED,
        "Cropr, LLF, last block 10x as fast": DEC_LLF | CALIBRATED | dict(last_block_lr_scale=10.0),
        "no pruning, last block 10x as fast": dict(last_block_lr_scale=10.0),
    },
    "ablations": {
        "no MLP": STRONG | CALIBRATED | dict(mlp_ratio=0.0),
        "no stop-gradient": STRONG | CALIBRATED | dict(stop_gradient=False),
        "sampling": STRONG | CALIBRATED | dict(sampling=True),
        "queries fixed": STRONG | CALIBRATED | dict(fixed_queries=True),
        "random start": STRONG,
        "random start, several heads": STRONG | dict(num_heads=3),
    },
}
CROPR = ("Cropr", "Cropr, LLF", "Cropr, const", "Cropr, const, LLF")
for factor, schedules in FACTORS.items():
    dec = schedules[0]
    CELLS[factor] = {
        **{name: schedule | CALIBRATED for name, schedule in zip(CROPR, schedules)},
        "Cropr, merging": dec | CALIBRATED | dict(merge=True),
        **dict.fromkeys(("ToMe", "attention top-k", "variance", "random"), dec),
        "non-salient": dec | CALIBRATED,
    }
STANDS = {"variance": Variance, "random": Random}


class NonSalient(cropr.Cropr):
    """Cropr reversed: what matters least stays."""

    def query(self) -> Tensor:
        return -super().query()

    def predict(self, x: Tensor, log_sizes: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        prediction, scores = super().predict(x, log_sizes)
        return prediction, None if scores is None else -scores


class Photos(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Photos of Tiny-ImageNet with the classes of the pretrained head."""

    def __init__(self, encoded: Encoded, classes: list[str], transform: Any):
        self.encoded, self.transform = encoded, transform
        self.targets = [classes.index(name) for name in encoded.names]

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.encoded.photo(index)), self.targets[index]


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
    task = build.task(config, 200)
    kind = name.removesuffix(", LLF")
    if kind in STANDS:
        stack = task.backbone.cropr
        for i, module in enumerate(stack):
            stack[i] = STANDS[kind](module.query(), task.backbone.blocks[i])
    elif kind in SYSTEMS:
        base = load_weights(config.weights)[0]
        tokens = base.num_prefix_tokens + base.grid**2
        counts = cropr.schedule.resolve(**config.schedule)(tokens, len(base.blocks), 1, config.llf)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = Reduced(base, SYSTEMS[kind], counts, llf=config.llf)
        teacher = load_weights(config.weights)[0] if kind in ONCE else None
        return ReducedClassifier(network, config.smoothing, teacher=teacher)
    if kind == "non-salient":
        for module in task.backbone.cropr:
            module.__class__ = NonSalient
    return task


def share_in_box(task: Any, data: Photos) -> float | None:
    """Of the patches that stay to the end, the share whose centre lies in the object's box, in percent."""
    if not hasattr(task.backbone, "cropr") or data.encoded.boxes is None:
        return None
    inside, count = 0.0, min(200, len(data))
    boxes = patches_in(torch.as_tensor(data.encoded.boxes[:count]).float()).unflatten(1, (14, 14))
    for i in range(count):
        left = cropr.pruning_map(task.backbone, data[i][0][None])[0]
        stays = left == left.max()
        inside += float((stays & boxes[i]).sum() / stays.sum())
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
    classes = load_weights(options.data / WEIGHTS)[1]["classes"].split()
    env = environment("cuda" if torch.cuda.is_available() else "cpu")
    env |= {name: getattr(options, name) for name in ("photos", "compare", "epochs", "batch", "lr")}
    rows: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    done = {(row["group"], row["seed"], row["method"]) for row in rows}
    for group in options.cells:
        for seed in options.seeds:  # all methods of a seed before the next one: what there is can be compared
            encoded = [
                Encoded(options.data / DATA["Tiny-ImageNet"], split, count, seed)
                for split, count in ((0, options.photos), (1, options.compare))
            ]
            for name, cell in CELLS[group].items():
                if (group, seed, name) in done or name not in (options.methods or [name]):
                    continue
                config = recipe(options, seed, cell)
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
                rows.append(row)
                save(options.out, env, rows)
                print(row, flush=True)


if __name__ == "__main__":
    main()
