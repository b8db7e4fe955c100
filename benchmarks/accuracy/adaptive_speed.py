"""Counts by image against constant ones, at equal images a second.

python -m benchmarks.accuracy.adaptive_speed --data FOLDER [--photos 300] [--seeds 0 1 2] [--rates 4
8 12] [--batches 1 8 32]

As benchmarks.accuracy.adaptive, but the mean rate of an image's own counts is the one at which the
engine takes the time of the constant rate: from the times at three rates, interleaved on the photos
of the first seed, in float32, but at most 1.3 R. Both are timed once more there, and the row has
the ratio. Figures of the constant rate are in adaptive.json.
"""

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import cropr_kernels as cropr
from benchmarks.accuracy.agreement import outputs
from benchmarks.accuracy.budgets import Network
from benchmarks.accuracy.data import DATA, TRAIN, VAL, load_model, read_photos
from benchmarks.accuracy.equal_flops import figures
from benchmarks.utils.results import RESULTS, Results, environment
from cropr_kernels.models.vit import ViT
from cropr_kernels.pruning.model import run
from cropr_kernels.pruning.state import PruningOptions
from cropr_kernels.utils.timing import time_interleaved

CPU = torch.device("cpu")
TIMED = 64  # photos
TRIED = (1.0, 1.15, 1.3)  # mean rates, over R
ROUNDS = 5


class Photos(NamedTuple):
    """A network, and the photos that it is compared on."""

    network: Network
    images: Tensor
    log_probs: Tensor  # of the unpruned model
    tokens: Tensor


def read(base: ViT, options: argparse.Namespace, data: str, seed: int) -> Photos:
    """Read the photos of a seed, and calibrate on those of the training split."""
    torch.manual_seed(seed)
    folder = options.data / DATA[data]
    calibration, _ = read_photos(folder, TRAIN, options.photos, seed)
    images, _ = read_photos(folder, VAL, options.photos, seed)
    log_probs, tokens = outputs(base, images)
    if tokens is None:
        raise RuntimeError("adaptive_speed: the unpruned model has no tokens at all positions")
    return Photos(Network(base, calibration), images, log_probs, tokens)


def classify(network: Network, images: Tensor, batch: int, method: str, rate: float) -> None:
    """Run images in batches, by a method of `Network` at a rate."""
    for part in images.split(batch):
        budget = network.budget(method, rate)
        options = PruningOptions(engine=True, budget=budget, equal_counts=budget is None)
        tokens, _ = run(network.model, partial(network.model.forward_features, part), options)
        network.model.forward_head(tokens)


def rate_of_equal_time(network: Network, images: Tensor, batch: int, rate: int) -> list[float]:
    """The mean rate at which counts by image take the time of the constant rate, and the ratio of
    their images a second there, measured."""
    cropr.set_rate(network.model, rate)
    images = images[: TIMED if batch > 1 else TIMED // 2]
    constant = partial(classify, network, images, batch, "constant", rate)
    tried = [rate * share for share in TRIED]
    calls: dict[float, Callable[[], None]] = {
        mean: partial(classify, network, images, batch, "thresholds", mean) for mean in tried
    }
    times = time_interleaved({0.0: constant} | calls, CPU, ROUNDS)
    # Least squares: time over mean rate is nearly a line
    points = torch.tensor([[mean, 1.0] for mean in tried])
    seconds = torch.tensor([[times[mean].seconds] for mean in tried])
    slope, offset = torch.linalg.lstsq(points, seconds).solution.flatten().tolist()
    equal = (times[0.0].seconds - offset) / slope if slope < 0 else tried[-1]
    equal = min(max(equal, rate / 2), tried[-1])
    again = time_interleaved(
        {
            "constant": constant,
            "own": partial(classify, network, images, batch, "thresholds", equal),
        },
        CPU,
        ROUNDS,
    )
    return [equal, again["constant"].seconds / again["own"].seconds]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    # Above, own counts are not used
    parser.add_argument("--rates", type=int, nargs="+", default=[4, 8, 12])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--sets", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--out", type=Path, default=RESULTS / "adaptive_speed.json")
    options = parser.parse_args()
    base, _ = load_model(options.data)
    env = environment("cpu") | {"photos": options.photos, "model": "vit_tiny_patch16_224"}
    keys = ("data", "rate", "batch", "seed")
    results = Results(options.out, env, keys)
    lists = (options.sets, options.rates, options.batches, options.seeds)
    for data, data_cells in itertools.groupby(
        results.remaining(itertools.product(*lists)), key=lambda cell: cell[0]
    ):
        photos = {seed: read(base, options, data, seed) for seed in options.seeds}
        first = photos[options.seeds[0]]
        equal: dict[tuple[int, int], list[float]] = {}
        for cell in tqdm(data_cells, desc=data, mininterval=5):
            _, rate, batch, seed = cell
            if (rate, batch) not in equal:
                equal[rate, batch] = rate_of_equal_time(first.network, first.images, batch, rate)
            mean, ratio = equal[rate, batch]
            network, images, log_probs, tokens = photos[seed]
            result = network(images, "thresholds", mean)
            row = {
                "mean rate": round(mean, 2),
                "images/s over constant": round(ratio, 4),
                "FLOPs over constant": round(
                    result.flops.mean().item() / network.constant_flops(rate), 4
                ),
            }
            measured = figures(result, log_probs, tokens, base.num_prefix_tokens)
            results.add(dict(zip(keys, cell)) | measured | row)


if __name__ == "__main__":
    main()
