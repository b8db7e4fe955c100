"""Restoring pruned tokens without training: variants of Last Layer Fusion off the shelf.

python -m benchmarks.accuracy.restoring --data FOLDER [--photos 300] [--seeds 2 3 4] [--rates 4 8 12
14 15 17] [--speed]

FOLDER as in data.py. Each seed draws its photos: for calibration from the training split, and as
many for comparison from the validation split. Tokens are dropped or merged, by calibrated queries.
Agreement, KL and features compare with the unpruned model; features: squared error of the patch
tokens after the last norm, relative to their variance. An interrupted run resumes. --speed times
the fusions of the package on its engine instead (on an otherwise idle machine): see
restoring_speed.json.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import cropr_kernels as cropr
from benchmarks.accuracy.agreement import agreement, calibrated
from benchmarks.accuracy.counts import block_flops
from benchmarks.accuracy.data import DATA, TRAIN, VAL, load_model, read_photos
from benchmarks.baselines import restores
from benchmarks.baselines.restores import Departure, Trunk
from benchmarks.models.deployment import deploy, pruned, unpruned
from benchmarks.utils.results import RESULTS, Results, Row, environment
from benchmarks.utils.timing import quantile, speed_up, timed
from cropr_kernels.models.vit import ViT

MERGES = {"drop": None, "merge": cropr.Merge()}
FITTED = 100  # photos for the least squares of SCALED
BATCH = 50


class Method(NamedTuple):
    """A restore and the number of blocks after it; without a restore there is no fusion."""

    restore: Callable[[Trunk], Tensor] | None
    blocks: int = 1


SCALED = "host's change, scaled per channel"
METHODS = {
    "no LLF": Method(None),
    "left": Method(restores.as_pruned),
    "copy of the host": Method(restores.parent_copied),
    "host's change": Method(restores.parent_changed),
    "2 hosts' change": Method(partial(restores.parent_changed, count=2)),
    "4 hosts' change": Method(partial(restores.parent_changed, count=4)),
    "host's change, host by keys": Method(partial(restores.parent_changed, keys=True)),
    "host's change, host chosen anew at the last pruning": Method(
        lambda trunk: restores.parent_rechosen(trunk, -1)
    ),
    "host's change, host chosen anew at each pruning": Method(restores.parent_rechosen),
    "host's change, two last blocks": Method(restores.parent_changed, 2),
    "host's change, behind the last block": Method(restores.parent_changed, 0),
}  # and SCALED, whose factors are solved for
FUSIONS = {  # of the package
    "no LLF": False,
    "left": "as_pruned",
    "host's change": "track_parent",
    "host's change, two last blocks": cropr.Fusion("track_parent", 2),
    "host's change, behind the last block": cropr.Fusion(blocks=0),
}


def flop_ratio(counts: Sequence[int], tokens: int, dim: int, blocks: int) -> float:
    """Ratio of unpruned FLOPs to those of these counts, if the last `blocks` see all tokens."""
    depth = len(counts) + 1
    fused = [tokens, *counts][: depth - blocks] + [tokens] * blocks
    return block_flops([tokens] * depth, dim) / block_flops(fused, dim)


class Photos(NamedTuple):
    """Photos of one seed, and the outputs of the unpruned model."""

    fitted: Tensor  # calibration photos for SCALED
    images: Tensor  # for comparison
    logits: Tensor
    features: Tensor  # (photos, patches, D), after the last norm
    queries: list[Tensor]


def read_seed(base: ViT, options: argparse.Namespace, data: str, seed: int) -> Photos:
    path = options.data / DATA[data]
    prefix = base.num_prefix_tokens
    calibration, _ = read_photos(path, TRAIN, options.photos, seed)
    images, _ = read_photos(path, VAL, options.photos, seed)
    queries = [module.query() for module in calibrated(base, calibration).cropr]
    tokens = torch.cat([base.forward_features(batch) for batch in images.split(BATCH)])
    return Photos(
        calibration[:FITTED], images, base.forward_head(tokens), tokens[:, prefix:], queries
    )


def solve(base: ViT, photos: Photos, counts: list[int], merge: cropr.Merge | None) -> Tensor:
    """Solve for the factors of SCALED."""
    trunks = []
    expected = []
    for images in photos.fitted.split(BATCH):
        departures = restores.run_trunk(base, photos.queries, images, counts, merge)
        trunks.append(restores.entering(base, departures, 1))
        x, _ = base.embed(images)
        for block in base.blocks[:-1]:
            x = block(x)
        expected.append(x)
    return restores.channel_factors(trunks, expected)


def run_method(
    base: ViT, departures: list[Departure], method: Method
) -> tuple[Tensor, Tensor | None]:
    """Logits, and the patch tokens after the last norm; None if some are missing."""
    prefix = base.num_prefix_tokens
    if method.restore is None:
        tokens = restores.run_without_fusion(base, departures)
    else:
        x = method.restore(restores.entering(base, departures, method.blocks))
        tokens = restores.run_fusion(base, x, method.blocks)
    is_full = tokens.shape[1] == departures[0].before.shape[1]
    return base.forward_head(tokens), tokens[:, prefix:] if is_full else None


def measure(
    base: ViT, photos: Photos, rate: int, merge: cropr.Merge | None, methods: dict[str, Method]
) -> Iterator[Row]:
    """Yield a row for each method; the blocks before the fusion run once for all methods."""
    tokens = base.num_prefix_tokens + base.grid**2
    counts = cropr.Schedule(rate=rate).counts(tokens, len(base.blocks), base.num_prefix_tokens)
    if SCALED in methods:
        factors = solve(base, photos, counts, merge)
        methods = methods | {SCALED: Method(partial(restores.change_scaled, factors=factors))}
    logits: dict[str, list[Tensor]] = {name: [] for name in methods}
    errors: dict[str, list[float]] = {name: [] for name in methods}
    for images, expected in zip(photos.images.split(BATCH), photos.features.split(BATCH)):
        departures = restores.run_trunk(base, photos.queries, images, counts, merge)
        for name, method in methods.items():
            method_logits, features = run_method(base, departures, method)
            logits[name].append(method_logits)
            if features is not None:
                errors[name].append((features - expected).square().sum().item())
    variance = (photos.features - photos.features.mean((0, 1))).square().sum().item()
    for name, method in methods.items():
        percent_agreed, divergence = agreement(
            torch.cat(logits[name]).log_softmax(1), photos.logits.log_softmax(1)
        )
        row = {"method": name, "agreement": round(percent_agreed, 2), "KL": round(divergence, 4)}
        if errors[name]:
            row["features"] = round(sum(errors[name]) / variance, 4)
        blocks = 0 if method.restore is None else method.blocks
        yield row | {"flop ratio": round(flop_ratio(counts, tokens, base.embed_dim, blocks), 3)}


def speed(options: argparse.Namespace, base: ViT) -> None:
    """Time the package's fusions on the engine, against no pruning and tokens as pruned."""
    model = calibrated(base, torch.randn(8, 3, 224, 224))
    models: dict[tuple[Any, ...], Any] = {(0, "", ""): unpruned(base)}
    for rate, tokens, llf in itertools.product(options.rates, MERGES, FUSIONS):
        fused = pruned(base, rate=rate, merge=MERGES[tokens] or False, llf=FUSIONS[llf])
        fused.cropr.load_state_dict(model.cropr.state_dict(), strict=False)
        models[rate, tokens, llf] = deploy(fused, base)
    times = timed(models, torch.randn(options.batch, 3, 224, 224), options.rounds)
    plain = times.pop((0, "", ""))
    rows = []
    for (rate, tokens, llf), seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[rate, tokens, "left"])]  # of the same round
        row = {"rate": rate, "tokens": tokens, "method": llf, **speed_up(plain, seconds)}
        rows.append(row | {"times left": round(quantile(ratios, 0.5), 4)})
    env = environment("cpu") | {
        "batch": options.batch,
        "model": "vit_tiny_patch16_224",
        "rounds": options.rounds,
    }
    Results(options.out, env).replace(rows)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=300)
    # Options were chosen on 0 and 1
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--rates", type=int, nargs="+", default=[4, 8, 12, 14, 15, 17])
    parser.add_argument("--speed", action="store_true", help="measure time instead")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.out = options.out or RESULTS / f"restoring{'_speed' if options.speed else ''}.json"
    base, _ = load_model(options.data)
    if options.speed:
        return speed(options, base)
    env = environment("cpu") | {"photos": options.photos, "model": "vit_tiny_patch16_224"}
    results = Results(options.out, env, keys=("data", "seed", "rate", "tokens", "method"))
    # measure() replaces the restore of SCALED
    candidates = METHODS | {SCALED: Method(restores.parent_changed)}
    cells = results.remaining(
        itertools.product(DATA, options.seeds, options.rates, MERGES, candidates)
    )
    for (data, seed), seed_cells in itertools.groupby(cells, key=lambda cell: cell[:2]):
        photos = read_seed(base, options, data, seed)
        groups = itertools.groupby(seed_cells, key=lambda cell: cell[2:4])
        for (rate, tokens), group in tqdm(groups, desc=f"{data}, seed {seed}", mininterval=5):
            methods = {name: candidates[name] for *_, name in group}
            cell = {"data": data, "seed": seed, "rate": rate, "tokens": tokens}
            results.add(
                *(cell | row for row in measure(base, photos, rate, MERGES[tokens], methods))
            )


if __name__ == "__main__":
    main()
