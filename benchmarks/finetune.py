"""After fine-tuning, is merging still better than dropping? A short run of the ViT-Ti, with calibrated queries, fixed.

python benchmarks/finetune.py --data FOLDER [--photos 1600] [--compare 800] [--seeds 2 3 4] [--rate 15] [--out FILE]

FOLDER as in off_the_shelf.py; Tiny-ImageNet alone, whose classes the head knows. Every seed draws its own photos;
all methods see the same ones in the same order. Photos are flipped at random, and not augmented otherwise.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, environment, save
from off_the_shelf import DATA, WEIGHTS, read_photos
from torch import Tensor
from tqdm import tqdm

import cropr_kernels as cropr
from cropr_kernels.models.factory import load_weights

METHODS: dict[str, dict[str, Any]] = {
    "no pruning": {"rate": 0},
    "dropping": {},
    "merging": {"merge": True},
}


def train(model: Any, images: Tensor, target: Tensor, learning_rate: float, batch: int, seed: int) -> None:
    """One epoch, AdamW, warm-up over a tenth of the steps and then a cosine to zero."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator).split(batch)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    warm = max(len(order) // 10, 1)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-2, total_iters=warm)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(order) - warm)
    rates = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [warm])
    model.train()
    for chosen in tqdm(order, mininterval=5, leave=False):
        flips = torch.rand(len(chosen), generator=generator) < 0.5
        pixels = torch.where(flips[:, None, None, None], images[chosen].flip(3), images[chosen])
        output, _ = model(pixels)
        optimizer.zero_grad()
        F.cross_entropy(output, target[chosen]).backward()
        optimizer.step()
        rates.step()


@torch.inference_mode()
def accuracy(model: Any, images: Tensor, target: Tensor) -> float:
    guesses = torch.cat([model(batch) for batch in images.split(50)]).argmax(1)
    return round(100 * (guesses == target).double().mean().item(), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=1600)
    parser.add_argument("--compare", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--rate", type=int, default=15)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULTS / "finetune.json")
    options = parser.parse_args()
    base, about = load_weights(options.data / WEIGHTS)
    classes = about["classes"].split()
    env = environment("cpu") | {
        name: getattr(options, name) for name in ("photos", "compare", "learning_rate", "batch")
    }
    rows: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for seed in options.seeds:
        file = options.data / DATA["Tiny-ImageNet"]
        (images, names), (held_out, held_names) = (
            read_photos(file, split, count, seed) for split, count in ((0, options.photos), (1, options.compare))
        )
        target, held = (torch.tensor([classes.index(name) for name in some]) for some in (names, held_names))
        queries = cropr.calibrate(cropr.apply(copy.deepcopy(base), rate=options.rate, num_outputs=0), images[:400])
        for name in options.methods:
            how = METHODS[name]
            if any(row["seed"] == seed and row["method"] == name for row in rows):
                continue
            torch.manual_seed(seed)
            model = cropr.apply(copy.deepcopy(base), **{"rate": options.rate, "num_outputs": 0, **how})
            model.cropr.load_state_dict(queries.cropr.state_dict())
            model.cropr.requires_grad_(False)
            before = accuracy(cropr.deploy(model), held_out, held)
            train(model, images, target, options.learning_rate, options.batch, seed)
            row = {"seed": seed, "rate": how.get("rate", options.rate), "method": name, "top-1 before": before}
            rows.append(row | {"top-1 after": accuracy(cropr.deploy(model), held_out, held)})
            save(options.out, env, rows)
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
