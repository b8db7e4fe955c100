"""Schedules at equal FLOPs or equal speed, without labels and training.

python -m benchmarks.accuracy.schedules --data FOLDER --plan      first: chooses them, with latency
measured here python -m benchmarks.accuracy.schedules --data FOLDER [--photos 400] [--seeds 5 6 7]
python -m benchmarks.accuracy.schedules --data FOLDER --speed

FOLDER as in data.py. --plan and --speed need an otherwise idle machine. The plan holds the counts
of every schedule, so that agreement and speed are of the same schedules (schedules_plan.json, or
--planned FILE); after a new plan both must run again. Each seed draws its photos: for calibration
from the training split, and as many for comparison from the validation split. An interrupted run
resumes.

Groups and schedules:
  R = ...          at the FLOPs of a constant rate: constant, once (after block 4), tokens lost
                   after block l as l^1.3, R_l as l^1.3; and tuned: `cropr.tune` for the speed of
                   the constant rate in the plan's run
  DiffRate, ...    its published counts, see counts.py, and the constant rate and l^1.3 at their
  FLOPs. DiffRate
                   reduces between attention and MLP, in the last block too; Cropr after every block
                   but the last
  POMT, batch ...  Pruning One More Token, and the constant rate at its FLOPs

From POMT (arXiv 2407.05941) and its code: prune once, in the fourth of twelve blocks; measure the
latency of the network at every number of tokens n, and its accuracy with all but n random tokens
dropped before the first block; keep the n of the highest utility, with alpha = 1/2 (counts.py);
rank tokens as in selection.py, which is a separate method here, besides Cropr's queries at the same
counts. Our changes: accuracy is agreement with the unpruned network, on photos without labels, at
every fourth n, interpolated linearly; latency is that of the engine, with tokens leaving after the
first block, at the first module; with Cropr's queries tokens leave after the fourth block, not
within it; and n tokens are kept, two fewer than in the authors' code.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import cropr_kernels as cropr
from benchmarks.accuracy import counts as counting
from benchmarks.accuracy.agreement import agreement, calibrated, log_probabilities
from benchmarks.accuracy.data import DATA, TRAIN, VAL, load_model, read_photos
from benchmarks.baselines.network import Reduced
from benchmarks.baselines.registry import SYSTEMS
from benchmarks.models.deployment import deploy, pruned, unpruned
from benchmarks.models.timing import gflops
from benchmarks.utils.results import RESULTS, Results, Row, environment
from benchmarks.utils.timing import quantile, speed_up, timed
from cropr_kernels.models.vit import ViT
from cropr_kernels.tuning import interpolate

RATES = (5, 11, 14)  # 1.2, 1.5 and 1.7 times fewer FLOPs
SIZE = 224  # pixels a side
ONCE_AFTER = 4  # blocks, of twelve
CHOSEN_ON = 0  # the seed of the photos on which POMT estimates accuracy
MERGES = {"dropping": False, "merging": True}
RANKED = "POMT's ranking"


class Network:
    """Dimensions of a model that schedules depend on."""

    def __init__(self, base: ViT):
        self.prefix = base.num_prefix_tokens
        self.dim = base.embed_dim
        self.tokens = self.prefix + base.grid**2
        self.depth = len(base.blocks)
        self.modules = self.depth - 1

    def flops(self, keep: Sequence[int]) -> int:
        return counting.block_flops([self.tokens, *keep], self.dim)

    def fitted(self, profile: counting.Profile, keep: Sequence[int]) -> list[int]:
        """Counts with a loss profile, at the FLOPs of `keep`."""
        return counting.fitted(
            profile, self.flops(keep), self.tokens, self.dim, self.modules, self.prefix
        )

    def constant(self, rate: int) -> list[int]:
        return cropr.Schedule(rate=rate).counts(self.tokens, self.depth, self.prefix)

    def reduce_once(self, kept: int) -> list[int]:
        return counting.reduce_once(ONCE_AFTER, kept, self.tokens, self.modules)


def fixed_schedules(network: Network) -> Iterator[Row]:
    """Yield the schedules that depend on no latency."""
    for rate in RATES:
        group = f"R = {rate}"
        keep = network.constant(rate)
        goal = network.flops(keep)
        yield {"group": group, "schedule": "constant", "keep": keep}
        counts = counting.fitted_once(
            ONCE_AFTER, goal, network.tokens, network.dim, network.modules, network.prefix
        )
        yield {"group": group, "schedule": "once", "keep": counts}
        yield {
            "group": group,
            "schedule": "l^1.3",
            "keep": network.fitted(counting.rising_total, keep),
        }
        yield {
            "group": group,
            "schedule": "R_l as l^1.3",
            "keep": network.fitted(counting.rising_rate, keep),
        }
    for (name, published), published_counts in counting.DIFFRATE.items():
        group = f"DiffRate, {name}, {published} GFLOPs"
        keep = counting.diffrate(published_counts)
        yield {"group": group, "schedule": "DiffRate", "keep": keep}
        yield {
            "group": group,
            "schedule": "constant",
            "keep": network.fitted(counting.constant_rate, keep),
        }
        yield {
            "group": group,
            "schedule": "l^1.3",
            "keep": network.fitted(counting.rising_total, keep),
        }


def estimated_accuracy(base: ViT, images: Tensor, step: int) -> dict[int, float]:
    """Agreement in percent by the number n of random tokens that enter the first block."""
    expected = log_probabilities(base, images)
    network = Network(base)
    generator = torch.Generator().manual_seed(CHOSEN_ON)

    def logits_at(batch: Tensor, n: int) -> Tensor:
        x, _ = base.embed(batch)
        patches = torch.randperm(network.tokens - network.prefix, generator=generator)[
            : n - network.prefix
        ]
        x = x[:, torch.cat([torch.arange(network.prefix), patches + network.prefix])]
        for block in base.blocks:
            x = block(x)
        return base.forward_head(base.norm(x))

    accuracy = {}
    least = network.prefix + 1
    for n in tqdm([*range(network.tokens, least, -step), least], desc="accuracy", mininterval=5):
        log_probs = torch.cat([logits_at(batch, n) for batch in images.split(50)]).log_softmax(1)
        accuracy[n] = agreement(log_probs, expected)[0]
    return accuracy


def build(base: ViT, model: Any, keep: Sequence[int], method: str) -> Any:
    """Build a method with these counts; `model` holds the calibrated queries."""
    if method == RANKED:
        return Reduced(base, SYSTEMS["POMT"], keep).eval()
    network = pruned(base, keep=list(keep), merge=MERGES[method])
    network.cropr.load_state_dict(model.cropr.state_dict())
    return deploy(network, base)


def tuned_schedules(
    options: argparse.Namespace, base: ViT, model: Any, images: Tensor
) -> Iterator[Row]:
    """Yield `cropr.tune`'s schedule for the speed of each constant rate."""
    network = Network(base)
    models = {
        f"R = {rate}": build(base, model, network.constant(rate), "dropping") for rate in RATES
    }
    times = timed(models | {"unpruned": unpruned(base)}, images, options.rounds)
    batch = len(images)
    for group in models:
        goal = speed_up(times["unpruned"], times[group])["speed-up"]
        tuned = cropr.tune(model, images, speedup=max(goal, 1.0), rounds=options.tune_rounds)
        row = {
            "group": group,
            "schedule": f"tuned, batch {batch}",
            "keep": tuned.keep,
            "batch": batch,
        }
        yield row | {"goal": goal, "measured": round(tuned.measured, 3)}


def pomt_schedules(
    seconds: dict[int, float], accuracy: dict[int, float], network: Network, batch: int
) -> list[Row]:
    """POMT's schedule by latency and accuracy, and the constant rate at its FLOPs."""
    kept = counting.one_more_token(seconds, accuracy)
    keep = network.reduce_once(kept)
    group = f"POMT, batch {batch}"
    row = {"group": group, "schedule": "POMT", "keep": keep, "batch": batch, "kept": kept}
    row["latency"] = {n: round(seconds[n] / seconds[network.tokens], 4) for n in seconds}
    row["accuracy"] = {n: round(accuracy[n], 2) for n in seconds}
    constant = network.fitted(counting.constant_rate, keep)
    return [row, {"group": group, "schedule": "constant", "keep": constant, "batch": batch}]


def choose_schedules(options: argparse.Namespace, base: ViT) -> None:
    """Write the plan: every schedule, with those that depend on latency for each batch size."""
    network = Network(base)
    model = calibrated(base, torch.randn(8, 3, SIZE, SIZE))
    rows = [row | {"batch": None} for row in fixed_schedules(network)]
    photos, _ = read_photos(
        options.data / DATA["Tiny-ImageNet"], TRAIN, options.estimate, CHOSEN_ON
    )
    accuracy = interpolate(estimated_accuracy(base, photos, 4), 1)
    token_counts = range(network.tokens, network.prefix, -options.step)
    models_by_count = {
        n: build(base, model, [n] * network.modules, "dropping") for n in token_counts
    }
    for batch in options.batches:
        images = torch.randn(batch, 3, SIZE, SIZE)
        rows += tuned_schedules(options, base, model, images)
        times = timed(models_by_count, images, options.curve_rounds)
        rows += pomt_schedules(
            {n: quantile(times[n], 0.5) for n in times}, accuracy, network, batch
        )
    env = environment("cpu") | {
        "model": "vit_tiny_patch16_224",
        "rounds": options.rounds,
        "photos": options.estimate,
    }
    groups = list(dict.fromkeys(row["group"] for row in rows))
    rows.sort(key=lambda row: groups.index(row["group"]))
    Results(options.planned, env).replace(rows)


def planned_cells(path: Path) -> list[tuple[str, str, tuple[int, ...], str]]:
    """Group, schedule, counts and method of each network of the plan.

    Raises:
        FileNotFoundError: there is no plan yet.
    """
    if not path.exists():
        raise FileNotFoundError(f"schedules: there is no plan at {path}: run it with --plan first")
    cells = []
    for row in Results(path, {}, keys=("group", "schedule")).rows:
        rankings = (RANKED,) if row["schedule"] == "POMT" else ()
        cells += [
            (row["group"], row["schedule"], tuple(row["keep"]), method)
            for method in (*MERGES, *rankings)
        ]
    return cells


def compare(options: argparse.Namespace, base: ViT) -> None:
    """Compare every schedule and method with the unpruned model, on the photos of every seed."""
    env = environment("cpu") | {"photos": options.photos, "model": "vit_tiny_patch16_224"}
    results = Results(
        options.out, env, keys=("data", "seed", "group", "schedule", "keep", "method")
    )
    image = torch.randn(1, 3, SIZE, SIZE)
    plan_cells = planned_cells(options.planned)
    unpruned_gflops = gflops(unpruned(base), image)
    flop_ratios: dict[Any, float] = {}
    cells = (
        (data, seed, *cell)
        for data, seed, cell in itertools.product(DATA, options.seeds, plan_cells)
    )
    for (data, seed), seed_cells in itertools.groupby(
        results.remaining(cells), key=lambda cell: cell[:2]
    ):
        calibration, _ = read_photos(options.data / DATA[data], TRAIN, options.photos, seed)
        images, _ = read_photos(options.data / DATA[data], VAL, options.photos, seed)
        expected = log_probabilities(base, images)
        model = calibrated(base, calibration)
        for cell in tqdm(seed_cells, desc=f"{data}, seed {seed}", mininterval=5):
            keep, method = cell[4:]
            network = build(base, model, keep, method)
            if (keep, method) not in flop_ratios:
                flop_ratios[keep, method] = unpruned_gflops / gflops(network, image)
            percent_agreed, divergence = agreement(log_probabilities(network, images), expected)
            row = dict(zip(results.keys, cell)) | {"FLOPs": round(flop_ratios[keep, method], 3)}
            results.add(row | {"agreement": round(percent_agreed, 2), "KL": round(divergence, 4)})


def speed(options: argparse.Namespace, base: ViT) -> None:
    """Time every schedule and method, interleaved, against the unpruned model on the engine."""
    model = calibrated(base, torch.randn(8, 3, SIZE, SIZE))
    plan_cells = planned_cells(options.planned)
    rows = []
    models: dict[Any, Any] = {cell: build(base, model, *cell[2:]) for cell in plan_cells} | {
        "unpruned": unpruned(base)
    }
    for batch in options.batches:
        times = timed(models, torch.randn(batch, 3, SIZE, SIZE), options.rounds)
        plain = times.pop("unpruned")
        for cell, seconds in times.items():
            row = dict(zip(("group", "schedule", "keep", "method"), cell))
            rows.append(row | {"batch": batch, **speed_up(plain, seconds)})
    env = environment("cpu") | {"model": "vit_tiny_patch16_224", "rounds": options.rounds}
    Results(options.out, env).replace(rows)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--plan", action="store_true", help="choose the schedules")
    parser.add_argument("--speed", action="store_true", help="measure time instead of agreement")
    parser.add_argument("--photos", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6, 7])
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8], help="of --plan and --speed"
    )
    parser.add_argument("--rounds", type=int, default=50, help="of --plan and --speed")
    parser.add_argument("--tune-rounds", type=int, default=5, help="of --plan: those of cropr.tune")
    parser.add_argument(
        "--curve-rounds", type=int, default=9, help="of --plan: those of the latency curve"
    )
    parser.add_argument(
        "--step", type=int, default=1, help="of --plan: between numbers of tokens of that curve"
    )
    parser.add_argument(
        "--estimate", type=int, default=256, help="of --plan: photos on which accuracy is estimated"
    )
    parser.add_argument("--planned", type=Path, default=RESULTS / "schedules_plan.json")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.out = options.out or RESULTS / f"schedules{'_speed' if options.speed else ''}.json"
    base, _ = load_model(options.data)
    if options.plan:
        choose_schedules(options, base)
    elif options.speed:
        speed(options, base)
    else:
        compare(options, base)


if __name__ == "__main__":
    main()
