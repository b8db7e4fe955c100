"""How pruned tokens should be restored where nothing was trained for it: ways of Last Layer Fusion off the shelf.

python -m benchmarks.accuracy.restoring --data FOLDER [--photos 300] [--seeds 2 3 4] [--rates 4 8 12 14 15 17] [--speed]

FOLDER as in data.py. Each seed draws its own photos: as many to calibrate on, from the training
split, as to compare on, from the validation split. Tokens are dropped or merged, by calibrated queries.
Agreement, KL and features are with the unpruned model; features: squared error of the patch tokens behind the last norm
over their variance about their mean. A run that is cut off goes on where it stopped. --speed times the ways that the
package has, on its engine, instead (nothing else should run): see restoring_speed.json.
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
from benchmarks.utils.results import RESULTS, Results, environment
from benchmarks.utils.timing import quantile, speed_up, timed

MERGES = {"drop": None, "merge": cropr.Merge()}
FITTED = 100  # photos that factors are solved on
BATCH = 50


class Method(NamedTuple):
    """How tokens are restored, and how many blocks see them; without a restore there is no fusion."""

    restore: Callable[[Trunk], Tensor] | None
    blocks: int = 1


SCALED = "host's change, scaled per channel"
METHODS = {
    "no LLF": Method(None),
    "left": Method(restores.left),
    "copy of the host": Method(restores.host_copied),
    "host's change": Method(restores.host_changed),
    "2 hosts' change": Method(partial(restores.host_changed, count=2)),
    "4 hosts' change": Method(partial(restores.host_changed, count=4)),
    "host's change, host by keys": Method(partial(restores.host_changed, keys=True)),
    "host's change, host chosen anew at the last pruning": Method(lambda trunk: restores.host_rechosen(trunk, -1)),
    "host's change, host chosen anew at each pruning": Method(restores.host_rechosen),
    "host's change, two last blocks": Method(restores.host_changed, 2),
    "host's change, behind the last block": Method(restores.host_changed, 0),
}  # and SCALED, which has to be solved
FUSIONS = {  # those that the package has
    "no LLF": False,
    "left": "as_pruned",
    "host's change": "track_parent",
    "host's change, two last blocks": cropr.Fusion("track_parent", 2),
    "host's change, behind the last block": cropr.Fusion(blocks=0),
}


def flop_ratio(counts: Sequence[int], tokens: int, dim: int, blocks: int) -> float:
    """How many times fewer FLOPs the blocks take: counts as without LLF, and the last `blocks` see all tokens."""
    seen = [tokens, *counts]
    fused = seen[: len(seen) - blocks] + [tokens] * blocks
    return block_flops([tokens] * len(seen), dim) / block_flops(fused, dim)


class Photos(NamedTuple):
    """Photos of one seed, and what the unpruned model makes of them."""

    fitted: Tensor  # some of those calibrated on
    images: Tensor  # those compared on
    logits: Tensor
    features: Tensor  # (photos, patches, D), behind the last norm
    queries: list[Tensor]


def read(base: Any, options: argparse.Namespace, data: str, seed: int) -> Photos:
    path, prefix = options.data / DATA[data], base.num_prefix_tokens
    calibration, _ = read_photos(path, TRAIN, options.photos, seed)
    images, _ = read_photos(path, VAL, options.photos, seed)
    queries = [module.query() for module in calibrated(base, calibration).cropr]
    tokens = torch.cat([base.forward_features(batch) for batch in images.split(BATCH)])
    return Photos(calibration[:FITTED], images, base.forward_head(tokens), tokens[:, prefix:], queries)


def solve(base: Any, photos: Photos, counts: list[int], merge: cropr.Merge | None) -> Tensor:
    """The factors of the method SCALED."""
    trunks, expected = [], []
    for images in photos.fitted.split(BATCH):
        departures = restores.run_trunk(base, photos.queries, images, counts, merge)
        trunks.append(restores.entering(base, departures, 1))
        x, _ = base.embed(images)
        for block in base.blocks[:-1]:
            x = block(x)
        expected.append(x)
    return restores.channel_factors(trunks, expected)


def run(base: Any, departures: list[Departure], method: Method) -> tuple[Tensor, Tensor | None]:
    """Logits, and all patch tokens behind the last norm, where there are all."""
    prefix = base.num_prefix_tokens
    if method.restore is None:
        tokens = restores.run_without_fusion(base, departures)
    else:
        x = method.restore(restores.entering(base, departures, method.blocks))
        tokens = restores.run_fusion(base, x, method.blocks)
    whole = tokens.shape[1] == departures[0].before.shape[1]
    return base.forward_head(tokens), tokens[:, prefix:] if whole else None


def measure(
    base: Any, photos: Photos, rate: int, merge: cropr.Merge | None, methods: dict[str, Method]
) -> Iterator[dict[str, Any]]:
    """A row for each method: the blocks before the fusion run once for all."""
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
            own, features = run(base, departures, method)
            logits[name].append(own)
            if features is not None:
                errors[name].append((features - expected).square().sum().item())
    variance = (photos.features - photos.features.mean((0, 1))).square().sum().item()
    for name, method in methods.items():
        same, divergence = agreement(torch.cat(logits[name]).log_softmax(1), photos.logits.log_softmax(1))
        row = {"method": name, "agreement": round(same, 2), "KL": round(divergence, 4)}
        if errors[name]:
            row["features"] = round(sum(errors[name]) / variance, 4)
        blocks = 0 if method.restore is None else method.blocks
        yield row | {"flop ratio": round(flop_ratio(counts, tokens, base.embed_dim, blocks), 3)}


def speed(options: argparse.Namespace, base: Any) -> None:
    """What the package's fusions take on the engine, in turns, against no pruning and against tokens as they left."""
    model = calibrated(base, torch.randn(8, 3, 224, 224))
    models: dict[tuple[Any, ...], Any] = {(0, "", ""): unpruned(base)}
    for rate, tokens, llf in itertools.product(options.rates, MERGES, FUSIONS):
        fused = pruned(base, rate=rate, merge=MERGES[tokens] or False, llf=FUSIONS[llf])
        fused.cropr.load_state_dict(model.cropr.state_dict(), strict=False)
        models[rate, tokens, llf] = deploy(fused, base)
    times = timed(models, torch.randn(options.batch, 3, 224, 224), options.rounds)
    plain, rows = times.pop((0, "", "")), []
    for (rate, tokens, llf), own in times.items():
        over = [a / b for a, b in zip(own, times[rate, tokens, "left"])]  # of the same round
        row = {"rate": rate, "tokens": tokens, "method": llf, **speed_up(plain, own)}
        rows.append(row | {"times left": round(quantile(over, 0.5), 4)})
    env = environment("cpu") | {"batch": options.batch, "model": "vit_tiny_patch16_224", "rounds": options.rounds}
    Results(options.out, env).replace(rows)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])  # options were chosen on 0 and 1
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
    every = METHODS | {SCALED: Method(restores.host_changed)}
    cells = results.remaining(itertools.product(DATA, options.seeds, options.rates, MERGES, every))
    for (data, seed), of_seed in itertools.groupby(cells, key=lambda cell: cell[:2]):
        photos = read(base, options, data, seed)
        groups = itertools.groupby(of_seed, key=lambda cell: cell[2:4])
        for (rate, tokens), group in tqdm(groups, desc=f"{data}, seed {seed}", mininterval=5):
            methods = {name: every[name] for *_, name in group}
            where = {"data": data, "seed": seed, "rate": rate, "tokens": tokens}
            results.add(*(where | row for row in measure(base, photos, rate, MERGES[tokens], methods)))


if __name__ == "__main__":
    main()
