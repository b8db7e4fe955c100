"""Merging against dropping after fine-tuning the ViT-Ti shortly, with calibrated, fixed queries.

python -m benchmarks.accuracy.finetune --data FOLDER [--photos 1600] [--compare 800] [--seeds 2 3 4]
[--rate 15]
                                       [--out FILE]

FOLDER as in data.py; Tiny-ImageNet only, as the head knows its classes. Every seed draws its
photos; all methods see the same photos in the same order. Photos are flipped at random, and not
augmented otherwise.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import cropr_kernels as cropr
from benchmarks.accuracy.agreement import calibrated, percent_equal
from benchmarks.accuracy.data import DATA, TRAIN, VAL, load_model, read_photos
from benchmarks.models.deployment import pruned
from benchmarks.utils.results import RESULTS, Results, environment

METHODS: dict[str, dict[str, Any]] = {
    "no pruning": {"rate": 0},
    "dropping": {},
    "merging": {"merge": True},
}


def train(
    model: Any, images: Tensor, target: Tensor, learning_rate: float, batch: int, seed: int
) -> None:
    """Train one epoch: AdamW, warm-up over a tenth of the steps, then a cosine to zero."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator).split(batch)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=learning_rate
    )
    warm = max(len(order) // 10, 1)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-2, total_iters=warm)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(len(order) - warm, 1))
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
    return round(percent_equal(guesses, target), 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    base, classes = load_model(options.data)
    env = environment("cpu") | {
        name: getattr(options, name) for name in ("photos", "compare", "learning_rate", "batch")
    }
    results = Results(options.out, env, keys=("seed", "method"))
    remaining = results.remaining(itertools.product(options.seeds, options.methods))
    for seed, seed_cells in itertools.groupby(remaining, key=lambda cell: cell[0]):
        file = options.data / DATA["Tiny-ImageNet"]
        images, names = read_photos(file, TRAIN, options.photos, seed)
        held_out, held_names = read_photos(file, VAL, options.compare, seed)
        target = torch.tensor([classes.index(name) for name in names])
        held_target = torch.tensor([classes.index(name) for name in held_names])
        queries = calibrated(base, images[:400], options.rate)
        for _, name in seed_cells:
            pruning = {"rate": options.rate} | METHODS[name]
            torch.manual_seed(seed)
            model = pruned(base, **pruning)
            model.cropr.load_state_dict(queries.cropr.state_dict())
            model.cropr.requires_grad_(False)
            top1_before = accuracy(cropr.deploy(model), held_out, held_target)
            train(model, images, target, options.learning_rate, options.batch, seed)
            row = {
                "seed": seed,
                "rate": pruning["rate"],
                "method": name,
                "top-1 before": top1_before,
            }
            results.add(row | {"top-1 after": accuracy(cropr.deploy(model), held_out, held_target)})
            print(results.rows[-1], flush=True)


if __name__ == "__main__":
    main()
