"""Comparison of methods by which images keep different numbers of tokens, at equal mean FLOPs."""

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.accuracy.agreement import outputs, percent_equal, relative_error
from benchmarks.accuracy.data import DATA, TRAIN, VAL, load_model, read_photos
from benchmarks.utils.results import RESULTS, Results, Row, environment
from cropr_kernels.models.vit import ViT

TOLERANCE = 0.007  # of mean FLOPs
ATTEMPTS = 8  # at a rate of equal FLOPs


class Forward(NamedTuple):
    """The images of a run through one network."""

    log_probs: Tensor  # (B, classes)
    tokens: Tensor | None  # (B, N, D), normed, by position; None: some are dropped
    flops: Tensor  # (B,) float64
    overflows: float | None = None  # share of batches above the capacity


class Methods(Protocol):
    """Methods on one network."""

    unpruned: float  # FLOPs of an image

    def constant_flops(self, rate: int) -> float:
        """FLOPs of an image at the constant rate of merging."""
        ...

    def __call__(self, images: Tensor, method: str, rate: float) -> Forward:
        """Run images (B, C, H, W) by a method at a rate: the higher, the fewer FLOPs."""
        ...


def parse_options(description: str | None, methods: Sequence[str], out: str) -> argparse.Namespace:
    """The command line of a comparison, whose results are in the file `out`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=300)
    # Costs and quotas were chosen on others
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=int, nargs="+", default=[4, 8, 12, 15])
    parser.add_argument("--sets", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--out", type=Path, default=RESULTS / out)
    return parser.parse_args()


def at_equal_flops(
    forward: Callable[[float], Forward], rate: float, goal: float, unpruned: float
) -> tuple[float, Forward]:
    """The rate, and its run, at which the mean FLOPs are `goal`.

    From the saved FLOPs of one rate, until two rates have the goal between them.

    Args:
        forward: run at a rate; FLOPs fall with it.
        rate: to begin with.
        goal, unpruned: FLOPs of an image.
    """
    result = forward(rate)
    above: tuple[float, float] | None = None
    below: tuple[float, float] | None = None
    for _ in range(ATTEMPTS):
        mean = result.flops.mean().item()
        if abs(mean / goal - 1) <= TOLERANCE:
            break
        if mean > goal:
            above = (rate, mean)
        else:
            below = (rate, mean)
        if above is None or below is None:
            rate *= min(max((unpruned - goal) / max(unpruned - mean, 1.0), 0.4), 2.5)
        else:
            share = (above[1] - goal) / (above[1] - below[1])
            rate = above[0] + share * (below[0] - above[0])
        result = forward(rate)
    return rate, result


def figures(result: Forward, expected: Tensor, expected_tokens: Tensor, prefix: int) -> Row:
    """Agreement, divergence and error of features against the unpruned model's."""
    divergence = (expected.exp() * (expected - result.log_probs)).sum(1)
    row = {
        "agreement": round(percent_equal(result.log_probs.argmax(1), expected.argmax(1)), 2),
        "KL": round(divergence.mean().item(), 5),
        "KL median": round(divergence.median().item(), 5),
        "KL 95th": round(divergence.quantile(0.95).item(), 5),
    }
    if result.tokens is not None:
        error = relative_error(result.tokens[:, prefix:], expected_tokens[:, prefix:])
        row["features"] = round(error, 4)
    return row


@torch.inference_mode()
def compare(
    options: argparse.Namespace,
    make: Callable[[ViT, Tensor], Methods],
    start: Mapping[str, float],
) -> None:
    """Compare every method at every rate with the unpruned model, on the photos of every seed.

    Args:
        options: from `parse_options`.
        make: the methods on a plain model, calibrated on photos (B, C, H, W).
        start: method -> rate to begin with, over R of the constant rate; default 1.
    """
    base, _ = load_model(options.data)
    env = environment("cpu") | {"photos": options.photos, "model": "vit_tiny_patch16_224"}
    results = Results(options.out, env, keys=("data", "seed", "rate", "method"))
    cells = itertools.product(options.sets, options.seeds, options.rates, options.methods)
    found: dict[tuple[str, str], float] = {}  # the rate of equal FLOPs, over R
    for (data, seed), seed_cells in itertools.groupby(
        results.remaining(cells), key=lambda cell: cell[:2]
    ):
        torch.manual_seed(seed)
        calibration, _ = read_photos(options.data / DATA[data], TRAIN, options.photos, seed)
        images, _ = read_photos(options.data / DATA[data], VAL, options.photos, seed)
        expected, expected_tokens = outputs(base, images)
        if expected_tokens is None:
            raise RuntimeError("equal_flops: the unpruned model has no tokens at all positions")
        methods = make(base, calibration)
        for cell in tqdm(seed_cells, desc=f"{data}, seed {seed}", mininterval=5):
            _, _, rate, method = cell
            goal = methods.constant_flops(rate)
            first = rate * found.get((data, method), start.get(method, 1.0))
            forward = partial(methods, images, method)
            exact, result = at_equal_flops(forward, first, goal, methods.unpruned)
            found[data, method] = exact / rate
            mean = result.flops.mean().item()
            row = {
                "mean rate": round(exact, 2),
                "FLOPs over constant": round(mean / goal, 4),
                "FLOPs 95th over mean": round(result.flops.quantile(0.95).item() / mean, 3),
                "FLOPs saved": round(methods.unpruned / mean, 3),
            }
            if result.overflows is not None:
                row["overflows"] = round(result.overflows, 3)
            measured = figures(result, expected, expected_tokens, base.num_prefix_tokens)
            results.add(dict(zip(results.keys, cell)) | measured | row)
