"""Pruning under a detector, by the same recipe: a pretrained ViT-Ti on blood cells (BCCD boxes) or COCO128 (masks).

python benchmarks/detection.py --data FOLDER [--set bccd|coco128] [--epochs 6] [--seeds 2 3 4] [--methods ...]

FOLDER holds bccd/ and coco128/, each with images/ and annotations.json, and the ViT-Ti of off_the_shelf.py. The network
sees 256 x 256, 256 patches; all methods drop 20 after each block (of 10: 22 % are left) by queries that are calibrated
and stay so, unless their name says otherwise, and Last Layer Fusion makes the map whole. COCO128 has no other photos to
measure on: what is measured there is how well it is learned by heart. A run that is cut off goes on where it stopped.
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

LEARNED: dict[str, Any] = dict(rate=20, llf=True, calibrate=128)
PRUNED = LEARNED | dict(fixed_queries=True)
METHODS: dict[str, dict[str, Any]] = {
    "no pruning": {},
    "Cropr": PRUNED,
    "random": PRUNED | dict(calibrate=0),
    "variance": PRUNED | dict(calibrate=0),
    "Cropr, learned queries": LEARNED,
    "Cropr, windows": LEARNED | dict(rate=5, calibrate=0, window=8, global_blocks=(2, 5, 8, 11)),
}
STANDS = {"random": Random, "variance": Variance}
SIDE = 256


def split_of(source: Path, target: Path) -> tuple[Path, Path]:
    """Annotations of the photos to train on and to measure on."""
    about = json.loads((source / "annotations.json").read_text())
    paths = []
    for split in ("train", "val"):
        images = [image for image in about["images"] if (image.get("split", split) == "val") == (split == "val")]
        ids = {image["id"] for image in images}
        kept = [one for one in about["annotations"] if one["image_id"] in ids]
        paths.append(target / f"{split}.json")
        paths[-1].write_text(json.dumps({**about, "images": images, "annotations": kept}))
    return paths[0], paths[1]


def recipe(options: argparse.Namespace, splits: tuple[Path, Path], seed: int, method: dict[str, Any]) -> Config:
    return Config(
        task="detection",
        masks=options.set == "coco128",
        data=str(options.data / options.set),
        train_split=(".", str(splits[0])),
        val_split=(".", str(splits[1])),
        weights=str(options.data / WEIGHTS),
        img_size=(SIDE, SIDE),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        channels=64,
        epochs=options.epochs,
        warmup_epochs=0.5,
        batch_size=4,
        lr=options.lr,
        layer_decay=0.8,
        head_lr_scale=5.0,
        scale=(0.8, 1.2),
        clip_grad=5.0,
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
    parser.add_argument("--set", choices=["bccd", "coco128"], default="bccd")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or RESULTS / f"detection_{options.set}.json"
    env = environment("cuda" if torch.cuda.is_available() else "cpu")
    env |= {name: getattr(options, name) for name in ("epochs", "lr")}
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.exists() else []
    done = {(row["seed"], row["method"]) for row in rows}
    with tempfile.TemporaryDirectory() as temporary:
        splits = split_of(options.data / options.set, Path(temporary))
        for seed in options.seeds:
            for name in options.methods:
                if (seed, name) in done:
                    continue
                config = recipe(options, splits, seed, METHODS[name])
                data = load_data(config)
                task = build.task(config, len(data.classes))
                if name in STANDS:
                    stack = task.backbone.cropr
                    for i, module in enumerate(stack):
                        stack[i] = STANDS[name](module.query())
                with tempfile.TemporaryDirectory() as folder:
                    reached = train(config, folder, data=data, task=task)
                backbone = task.to("cpu").eval().backbone
                with torch.no_grad(), FlopCounterMode(display=False) as counter:
                    backbone.forward_features(torch.zeros(1, 3, SIDE, SIDE))
                row = {"seed": seed, "method": name, **{key: value for key, value in reached.items() if "AP" in key}}
                rows.append(row | {"GFLOPs of the backbone": round(counter.get_total_flops() / 2e9, 3)})
                save(out, env, rows)
                print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
