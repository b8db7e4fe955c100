"""Token reduction without labels and training: agreement with the pretrained model, and speed.

python -m benchmarks.accuracy.off_the_shelf --data FOLDER [--photos 400] [--seeds 5 6 7] [--rates 4
8 12 15] [--speed]

FOLDER as in data.py. Each seed draws its photos: for calibration from the training split, and as
many for comparison from the validation split. --speed times every method instead (on an otherwise
idle machine): see off_the_shelf_speed.json. An interrupted run resumes.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import cropr_kernels as cropr
from benchmarks.accuracy.agreement import (
    agreement,
    calibrated,
    outputs,
    percent_equal,
    relative_error,
)
from benchmarks.accuracy.data import DATA, TRAIN, VAL, load_model, read_photos
from benchmarks.baselines.matching import CroprMerge
from benchmarks.baselines.network import Reduced
from benchmarks.baselines.registry import OFF_THE_SHELF, SYSTEMS
from benchmarks.models.deployment import deploy, pruned, unpruned
from benchmarks.utils.results import RESULTS, Results, environment
from benchmarks.utils.timing import speed_up, timed
from cropr_kernels.models.vit import ViT

MERGES = {
    "merge": cropr.Merge(),
    "merge, no choice of the redundant": cropr.Merge(candidates=1),
    "merge, half as many candidates": cropr.Merge(candidates=1.5),
    "merge, sizes do not protect": cropr.Merge(size_weight=0),
}
# Cropr's merge step by step, with parts of it left out or replaced; slower than the engine.
PLAIN: dict[str, Any] = {
    "checkerboard": False,
    "cost_weight": 0.0,
    "keep_norms": False,
    "size_exponent": 1.0,
}
EXPERIMENTS: dict[str, tuple[cropr.Merge, dict[str, Any]]] = {
    "merge, no checkerboard": (cropr.Merge(), {"checkerboard": False}),
    "merge, candidates by similarity alone": (cropr.Merge(), {"cost_weight": 0.0}),
    "merge, norms of means": (cropr.Merge(), {"keep_norms": False}),
    "merge, attention by whole sizes": (cropr.Merge(), {"size_exponent": 1.0}),
    "merge, Ward's loss": (cropr.Merge(), {"ward": True}),
    "merge, none of these": (cropr.Merge(candidates=1.5), PLAIN),  # the package's first version
}
METHODS = [*OFF_THE_SHELF, "calibrated", *MERGES, *EXPERIMENTS]


def build(base: ViT, model: Any, name: str, rate: int) -> Callable[[Tensor], Tensor]:
    """Build a method at a rate; `model` holds the calibrated queries."""
    depth = len(base.blocks)
    tokens = base.num_prefix_tokens + base.grid**2
    counts = cropr.Schedule(rate=rate).counts(tokens, depth, base.num_prefix_tokens)
    if name in SYSTEMS:
        return Reduced(base, SYSTEMS[name], counts).eval()
    if name in EXPERIMENTS:
        merge, options = EXPERIMENTS[name]
        layers = enumerate(module.query() for module in model.cropr)

        def make(*_: int) -> CroprMerge:
            layer, query = next(layers)
            return CroprMerge(query, merge, layer, base.grid, **options)

        return Reduced(base, make, counts).eval()
    if name in MERGES:
        merging = pruned(base, rate=rate, merge=MERGES[name])
        merging.cropr.load_state_dict(model.cropr.state_dict())
        return deploy(merging, base)
    return cropr.set_rate(deploy(model, base), rate)


def compare(options: argparse.Namespace, base: ViT, classes: list[str]) -> None:
    """Compare every method at every rate with the unpruned model, on the photos of every seed."""
    env = environment("cpu") | {"photos": options.photos, "model": "vit_tiny_patch16_224"}
    results = Results(options.out, env, keys=("data", "seed", "rate", "method"))
    cells = itertools.product(DATA, options.seeds, options.rates, options.methods)
    for (data, seed), seed_cells in itertools.groupby(
        results.remaining(cells), key=lambda cell: cell[:2]
    ):
        torch.manual_seed(seed)
        calibration, _ = read_photos(options.data / DATA[data], TRAIN, options.photos, seed)
        images, names = read_photos(options.data / DATA[data], VAL, options.photos, seed)
        target = torch.tensor([classes.index(name) if name in classes else -1 for name in names])
        # The model's head knows the classes of Tiny-ImageNet alone
        has_labels = bool((target >= 0).all())
        expected, expected_tokens = outputs(base, images)
        model = calibrated(base, calibration)
        for cell in tqdm(seed_cells, desc=f"{data}, seed {seed}", mininterval=5):
            _, _, rate, name = cell
            log_probs, tokens = outputs(build(base, model, name, rate), images)
            percent_agreed, divergence = agreement(log_probs, expected)
            row = dict(zip(results.keys, cell)) | {
                "agreement": round(percent_agreed, 2),
                "KL": round(divergence, 4),
            }
            # The method covers all positions
            if tokens is not None and expected_tokens is not None:
                prefix = base.num_prefix_tokens
                row["features"] = round(
                    relative_error(tokens[:, prefix:], expected_tokens[:, prefix:]), 4
                )
            if has_labels:
                row["top-1"] = round(percent_equal(log_probs.argmax(1), target), 2)
                row["top-1 unpruned"] = round(percent_equal(expected.argmax(1), target), 2)
            results.add(row)


def speed(options: argparse.Namespace, base: ViT) -> None:
    """Time every method at every rate, interleaved, against the unpruned model on the engine."""
    model = calibrated(base, torch.randn(8, 3, 224, 224))
    env = environment("cpu") | {
        "batch": options.batch,
        "model": "vit_tiny_patch16_224",
        "rounds": options.rounds,
    }
    pairs = itertools.product(options.rates, options.methods)
    models = {(rate, name): build(base, model, name, rate) for rate, name in pairs}
    models[0, "unpruned"] = unpruned(base)
    times = timed(models, torch.randn(options.batch, 3, 224, 224), options.rounds)
    unpruned_times = times[0, "unpruned"]
    rows = [
        {"rate": rate, "method": name, **speed_up(unpruned_times, times[rate, name])}
        for rate, name in times
    ]
    Results(options.out, env).replace(rows)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=400)
    # Options were chosen on 0 to 4
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6, 7])
    parser.add_argument("--rates", type=int, nargs="+", default=[4, 8, 12, 15])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--speed", action="store_true", help="measure time instead of agreement")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.out = options.out or RESULTS / f"off_the_shelf{'_speed' if options.speed else ''}.json"
    base, classes = load_model(options.data)
    if options.speed:
        speed(options, base)
    else:
        compare(options, base, classes)


if __name__ == "__main__":
    main()
