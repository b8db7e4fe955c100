"""Where in a network tokens should leave it: schedules at equal FLOPs or equal speed, without labels and training.

python -m benchmarks.accuracy.schedules --data FOLDER --plan      first: chooses them, with latency measured here
python -m benchmarks.accuracy.schedules --data FOLDER [--photos 400] [--seeds 5 6 7]
python -m benchmarks.accuracy.schedules --data FOLDER --speed

FOLDER as in data.py. For --plan and --speed nothing else should run. The plan holds the counts of every schedule, so
that agreement and speed are of the same ones (schedules_plan.json, or --planned FILE); another plan asks for another
run of both. Each seed draws its own photos: as many to calibrate on, from the training split, as to compare on, from
the validation split. A run that is cut off goes on where it stopped.

Groups and schedules:
  R = ...          at the FLOPs of a constant rate: constant, once (after block 4), what is lost by block l as l^1.3,
                   R_l as l^1.3; and tuned: `cropr.tune` for the speed that the constant rate has in the plan's run
  DiffRate, ...    the counts that it publishes, see counts.py, and the constant rate and l^1.3 at their FLOPs.
                   Theirs acts between attention and MLP and also in the last block, ours behind each but the last
  POMT, batch ...  Pruning One More Token, and the constant rate at its FLOPs

Of POMT (arXiv 2407.05941) this is theirs, by its code: to prune once, in the fourth of twelve blocks; to measure the
latency of the network at every number of tokens n, and its accuracy with all but n tokens dropped at random before the
first block; to keep the n of the highest utility, with alpha = 1/2 (counts.py); and its ranking of tokens
(selection.py), which is a method of its own here, beside Cropr's queries at the same counts. This is ours: accuracy is
agreement with the unpruned network, on photos without labels, at every fourth n and straight in between; latency is
that of the engine, with tokens leaving after the first block, where the first module is; by Cropr's queries tokens
leave behind the fourth block, not within; and n tokens are kept, where its code keeps two more than it chose.
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
from benchmarks.utils.results import RESULTS, Results, environment
from benchmarks.utils.timing import quantile, speed_up, timed
from cropr_kernels.tuning import interpolate

RATES = (5, 11, 14)  # 1.2, 1.5 and 1.7 times fewer FLOPs
SIZE = 224  # pixels a side
ONCE_AFTER = 4  # blocks, of twelve
CHOSEN_ON = 0  # the seed of the photos on which POMT estimates accuracy
MERGES = {"dropping": False, "merging": True}
RANKED = "POMT's ranking"
Row = dict[str, Any]


class Network:
    """What schedules must know of a model."""

    def __init__(self, base: Any):
        self.prefix, self.dim = base.num_prefix_tokens, base.embed_dim
        self.tokens, self.depth = self.prefix + base.grid**2, len(base.blocks)
        self.modules = self.depth - 1

    def flops(self, keep: Sequence[int]) -> int:
        return counting.block_flops([self.tokens, *keep], self.dim)

    def fitted(self, lost: counting.Lost, keep: Sequence[int]) -> list[int]:
        """Counts at the FLOPs of others."""
        return counting.fitted(lost, self.flops(keep), self.tokens, self.dim, self.modules, self.prefix)

    def constant(self, rate: int) -> list[int]:
        return cropr.Schedule(rate=rate).counts(self.tokens, self.depth, self.prefix)

    def once(self, kept: int) -> list[int]:
        return counting.once(ONCE_AFTER, kept, self.tokens, self.modules)


def unmeasured(network: Network) -> Iterator[Row]:
    """The schedules that no latency decides."""
    for rate in RATES:
        group, keep = f"R = {rate}", network.constant(rate)
        goal = network.flops(keep)
        yield {"group": group, "schedule": "constant", "keep": keep}
        once = counting.fitted_once(ONCE_AFTER, goal, network.tokens, network.dim, network.modules, network.prefix)
        yield {"group": group, "schedule": "once", "keep": once}
        yield {"group": group, "schedule": "l^1.3", "keep": network.fitted(counting.late, keep)}
        yield {"group": group, "schedule": "R_l as l^1.3", "keep": network.fitted(counting.later, keep)}
    for (name, published), left in counting.DIFFRATE.items():
        group, keep = f"DiffRate, {name}, {published} GFLOPs", counting.diffrate(left)
        yield {"group": group, "schedule": "DiffRate", "keep": keep}
        yield {"group": group, "schedule": "constant", "keep": network.fitted(counting.even, keep)}
        yield {"group": group, "schedule": "l^1.3", "keep": network.fitted(counting.late, keep)}


def estimated_accuracy(base: Any, images: Tensor, step: int) -> dict[int, float]:
    """Agreement, in percent, with so many random tokens left before the first block, by their number."""
    expected, network = log_probabilities(base, images), Network(base)
    generator = torch.Generator().manual_seed(CHOSEN_ON)

    def run(batch: Tensor, n: int) -> Tensor:
        x, _ = base.embed(batch)
        patches = torch.randperm(network.tokens - network.prefix, generator=generator)[: n - network.prefix]
        x = x[:, torch.cat([torch.arange(network.prefix), patches + network.prefix])]
        for block in base.blocks:
            x = block(x)
        return base.forward_head(base.norm(x))

    found, least = {}, network.prefix + 1
    for n in tqdm([*range(network.tokens, least, -step), least], desc="accuracy", mininterval=5):
        answers = torch.cat([run(batch, n) for batch in images.split(50)]).log_softmax(1)
        found[n] = agreement(answers, expected)[0]
    return found


def build(base: Any, model: Any, keep: Sequence[int], method: str) -> Any:
    """A method with these counts; `model` holds the calibrated queries."""
    if method == RANKED:
        return Reduced(base, SYSTEMS["POMT"], keep).eval()
    own = pruned(base, keep=list(keep), merge=MERGES[method])
    own.cropr.load_state_dict(model.cropr.state_dict())
    return deploy(own, base)


def plan(options: argparse.Namespace, base: Any) -> None:
    """Every schedule, those that a latency decides for each batch size."""
    network, model = Network(base), calibrated(base, torch.randn(8, 3, SIZE, SIZE))
    rows = [row | {"batch": None} for row in unmeasured(network)]
    photos, _ = read_photos(options.data / DATA["Tiny-ImageNet"], TRAIN, options.estimate, CHOSEN_ON)
    accuracy = interpolate(estimated_accuracy(base, photos, 4), 1)
    numbers = range(network.tokens, network.prefix, -options.step)
    stacks = {n: build(base, model, [n] * network.modules, "dropping") for n in numbers}
    for batch in options.batches:
        images = torch.randn(batch, 3, SIZE, SIZE)
        models = {f"R = {rate}": build(base, model, network.constant(rate), "dropping") for rate in RATES}
        times = timed(models | {"unpruned": unpruned(base)}, images, options.rounds)
        for group in models:
            goal = speed_up(times["unpruned"], times[group])["speed-up"]
            tuned = cropr.tune(model, images, speedup=max(goal, 1.0), rounds=options.tune_rounds)
            row = {"group": group, "schedule": f"tuned, batch {batch}", "keep": tuned.keep, "batch": batch}
            rows.append(row | {"goal": goal, "measured": round(tuned.measured, 3)})
        seconds = {n: quantile(own, 0.5) for n, own in timed(stacks, images, options.curve_rounds).items()}
        kept = counting.one_more_token(seconds, accuracy)
        group, keep = f"POMT, batch {batch}", network.once(kept)
        row = {"group": group, "schedule": "POMT", "keep": keep, "batch": batch, "kept": kept}
        row["latency"] = {n: round(own / seconds[network.tokens], 4) for n, own in seconds.items()}
        rows.append(row | {"accuracy": {n: round(accuracy[n], 2) for n in numbers}})
        rows.append(
            {"group": group, "schedule": "constant", "keep": network.fitted(counting.even, keep), "batch": batch}
        )
    env = environment("cpu") | {"model": "vit_tiny_patch16_224", "rounds": options.rounds, "photos": options.estimate}
    groups = list(dict.fromkeys(row["group"] for row in rows))
    rows.sort(key=lambda row: groups.index(row["group"]))
    Results(options.planned, env).replace(rows)


def planned(path: Path) -> list[tuple[str, str, tuple[int, ...], str]]:
    """Group, schedule, counts and method of everything to measure.

    Raises:
        FileNotFoundError: there is no plan yet.
    """
    if not path.exists():
        raise FileNotFoundError(f"schedules: there is no plan at {path}: run it with --plan first")
    cells = []
    for row in Results(path, {}, keys=("group", "schedule")).rows:
        own = (RANKED,) if row["schedule"] == "POMT" else ()
        cells += [(row["group"], row["schedule"], tuple(row["keep"]), method) for method in (*MERGES, *own)]
    return cells


def compare(options: argparse.Namespace, base: Any) -> None:
    """Every schedule and method against the unpruned model, on the photos of every seed."""
    env = environment("cpu") | {"photos": options.photos, "model": "vit_tiny_patch16_224"}
    results = Results(options.out, env, keys=("data", "seed", "group", "schedule", "keep", "method"))
    image, every = torch.randn(1, 3, SIZE, SIZE), planned(options.planned)
    whole, flops = gflops(unpruned(base), image), {}
    cells = ((data, seed, *cell) for data, seed, cell in itertools.product(DATA, options.seeds, every))
    for (data, seed), of_seed in itertools.groupby(results.remaining(cells), key=lambda cell: cell[:2]):
        calibration, _ = read_photos(options.data / DATA[data], TRAIN, options.photos, seed)
        images, _ = read_photos(options.data / DATA[data], VAL, options.photos, seed)
        expected, model = log_probabilities(base, images), calibrated(base, calibration)
        for cell in tqdm(of_seed, desc=f"{data}, seed {seed}", mininterval=5):
            keep, method = cell[4:]
            network = build(base, model, keep, method)
            if (keep, method) not in flops:
                flops[keep, method] = whole / gflops(network, image)
            same, divergence = agreement(log_probabilities(network, images), expected)
            row = dict(zip(results.keys, cell)) | {"FLOPs": round(flops[keep, method], 3)}
            results.add(row | {"agreement": round(same, 2), "KL": round(divergence, 4)})


def speed(options: argparse.Namespace, base: Any) -> None:
    """Every schedule and method against the unpruned model on the engine, in turns of one call in shuffled order."""
    model, rows, every = calibrated(base, torch.randn(8, 3, SIZE, SIZE)), [], planned(options.planned)
    models: dict[Any, Any] = {cell: build(base, model, *cell[2:]) for cell in every} | {"unpruned": unpruned(base)}
    for batch in options.batches:
        times = timed(models, torch.randn(batch, 3, SIZE, SIZE), options.rounds)
        plain = times.pop("unpruned")
        for cell, own in times.items():
            row = dict(zip(("group", "schedule", "keep", "method"), cell))
            rows.append(row | {"batch": batch, **speed_up(plain, own)})
    env = environment("cpu") | {"model": "vit_tiny_patch16_224", "rounds": options.rounds}
    Results(options.out, env).replace(rows)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--plan", action="store_true", help="choose the schedules")
    parser.add_argument("--speed", action="store_true", help="measure time instead of agreement")
    parser.add_argument("--photos", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6, 7])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="of --plan and --speed")
    parser.add_argument("--rounds", type=int, default=50, help="of --plan and --speed")
    parser.add_argument("--tune-rounds", type=int, default=5, help="of --plan: those of cropr.tune")
    parser.add_argument("--curve-rounds", type=int, default=9, help="of --plan: those of the latency curve")
    parser.add_argument("--step", type=int, default=1, help="of --plan: between numbers of tokens of that curve")
    parser.add_argument("--estimate", type=int, default=256, help="of --plan: photos on which accuracy is estimated")
    parser.add_argument("--planned", type=Path, default=RESULTS / "schedules_plan.json")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.out = options.out or RESULTS / f"schedules{'_speed' if options.speed else ''}.json"
    base, _ = load_model(options.data)
    (plan if options.plan else speed if options.speed else compare)(options, base)


if __name__ == "__main__":
    main()
