"""The ways back to a whole map, by the same recipe: a pretrained ViT-Ti on street scenes (CamVid), mIoU.

python benchmarks/segmentation.py --data FOLDER [--epochs 8] [--seeds 2 3 4] [--methods ...] [--out FILE]

FOLDER holds camvid/{train,trainannot,val,valannot} and the ViT-Ti of off_the_shelf.py. Photos are resized to 240 x 180,
and the network sees crops of 160 x 160, 100 patches. All methods drop 7 of them after each block, from half of the
epochs on, by queries that are calibrated and stay so, unless their name says otherwise. A run that is cut off goes on
where it stopped.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, save
from networks import Random
from off_the_shelf import WEIGHTS, Variance
from torch.utils.flop_counter import FlopCounterMode

from cropr_kernels.train import Config, build, train
from cropr_kernels.train.data import load_data

LEARNED: dict[str, Any] = dict(rate=7, curriculum=0.5, calibrate=128)
PRUNED = LEARNED | dict(fixed_queries=True)
SIZE, SIDE = (240, 180), 160
METHODS: dict[str, dict[str, Any]] = {
    "no pruning": {},
    "LLF": PRUNED | dict(llf=True),
    "token concatenation": PRUNED | dict(fusion="concat"),
    "cross-attention": PRUNED | dict(fusion="cross_attn"),
    "cross-attention + concatenation": PRUNED | dict(fusion="cross_attn_concat"),
    "MHSA + concatenation": PRUNED | dict(fusion="mhsa_concat"),
    "DToP": LEARNED | dict(fusion="dtop", calibrate=0),
    "LLF, random tokens": PRUNED | dict(llf=True, calibrate=0),
    "LLF, variance": PRUNED | dict(llf=True, calibrate=0),
    "LLF, learned queries": LEARNED | dict(llf=True),
    "LLF, learned queries, random start": LEARNED | dict(llf=True, calibrate=0),
}
STANDS = {"LLF, random tokens": Random, "LLF, variance": Variance}


def shrink(source: Path, target: Path) -> None:
    """Photos and label maps at SIZE."""
    from PIL import Image

    for part in ("train", "trainannot", "val", "valannot"):
        (target / part).mkdir(parents=True)
        how = Image.Resampling.NEAREST if part.endswith("annot") else Image.Resampling.BICUBIC
        for path in sorted((source / part).iterdir()):
            with Image.open(path) as image:
                image.resize(SIZE, how).save(target / part / f"{path.stem}.png")


def recipe(options: argparse.Namespace, folder: Path, seed: int, method: dict[str, Any]) -> Config:
    return Config(
        task="segmentation",
        data=str(folder),
        train_split=("train", "trainannot"),
        val_split=("val", "valannot"),
        num_classes=11,
        ignore_index=11,
        img_size=(SIDE, SIDE),
        weights=str(options.data / WEIGHTS),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        epochs=options.epochs,
        warmup_epochs=0.5,
        batch_size=8,
        lr=options.lr,
        lr_schedule="poly",
        layer_decay=0.9,
        head_lr_scale=10.0,
        scale=(0.75, 1.25),
        color_jitter=0.2,
        amp="bfloat16",
        workers=0,
        seed=seed,
        device=options.device,
        eval_epochs=options.epochs,
        save_steps=10**6,
        **method,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS / "segmentation.json")
    options = parser.parse_args()
    env = environment("cuda" if torch.cuda.is_available() else "cpu")
    env |= {name: getattr(options, name) for name in ("epochs", "lr")}
    rows: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    done = {(row["seed"], row["method"]) for row in rows}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "camvid"
        shrink(options.data / "camvid", folder)
        for seed in options.seeds:
            for name in options.methods:
                if (seed, name) in done:
                    continue
                config = recipe(options, folder, seed, METHODS[name])
                data, task = load_data(config), build.task(config, config.num_classes)
                if name in STANDS:
                    stack = task.backbone.cropr
                    for i, module in enumerate(stack):
                        stack[i] = STANDS[name](module.query())
                with tempfile.TemporaryDirectory() as out:
                    reached = train(config, out, data=data, task=task)
                task = task.to("cpu").eval()
                with torch.no_grad(), FlopCounterMode(display=False) as counter:
                    task(torch.zeros(1, 3, SIDE, SIDE))
                row = {"seed": seed, "method": name, "mIoU": reached["mIoU"], "pixels": reached["pixels"]}
                rows.append(row | {"GFLOPs": round(counter.get_total_flops() / 2e9, 3)})
                save(options.out, env, rows)
                print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
