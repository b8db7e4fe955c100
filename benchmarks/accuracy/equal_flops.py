"""Runs whose images keep different numbers of tokens, at equal mean FLOPs."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from benchmarks.accuracy.agreement import percent_equal, relative_error
from benchmarks.accuracy.data import DATA
from benchmarks.utils.results import RESULTS, Row

TOLERANCE = 0.007  # of mean FLOPs
ATTEMPTS = 8  # at a rate of equal FLOPs


class Forward(NamedTuple):
    """The images of a run through one network."""

    log_probs: Tensor  # (B, classes)
    tokens: Tensor | None  # (B, N, D), normed, by position; None: some are dropped
    flops: Tensor  # (B,) float64
    overflows: float | None = None  # share of batches above the capacity


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
