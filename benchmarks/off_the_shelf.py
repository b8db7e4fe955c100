"""Token reduction without labels and without training: how much of a pretrained model's answers is left, how fast.

python benchmarks/off_the_shelf.py --data FOLDER [--photos 400] [--seeds 2 3 4] [--rates 4 8 12 15] [--speed]

FOLDER holds tinyimagenet100_64.npz and imagenette_160.npz (buf, offsets, labels, split: encoded photos) and a ViT-Ti.
Each seed draws its own photos: as many to calibrate on, from the training split, as to compare on, from the validation
split. --speed times every method instead (nothing else should run): see off_the_shelf_speed.json. A run that is cut off
goes on where it stopped.
"""

import argparse
import copy
import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, environment, quantile, save
from networks import deploy
from rivals import OFF_THE_SHELF, SYSTEMS, Reduced
from torch import Tensor
from tqdm import tqdm

import cropr_kernels as cropr
from cropr_kernels.models.factory import load_weights

DATA = {"Tiny-ImageNet": "tinyimagenet100_64.npz", "Imagenette": "imagenette_160.npz"}
WEIGHTS = "vit_tiny_p16_224_tin200_fp16.safetensors"
MERGES = {
    "merge": cropr.Merge(),
    "merge, no choice of the redundant": cropr.Merge(candidates=1),
    "merge, twice as many candidates": cropr.Merge(candidates=2),
    "merge, sizes do not protect": cropr.Merge(size_weight=0),
    "merge, similarity of keys": cropr.Merge(similarity="keys"),
    "merge, plain attention": cropr.Merge(proportional=False),
    "merge, none of these": cropr.Merge(candidates=1, size_weight=0),
}
METHODS = [*(name for name in OFF_THE_SHELF if name != "ATS, trimmed"), "calibrated", *MERGES]


class Encoded:
    """Encoded photos in one .npz file: those of a split that a seed draws."""

    def __init__(self, path: Path, split: int, count: int, seed: int):
        archive = np.load(path)
        self.bytes, self.offsets = archive["buf"], archive["offsets"]
        self.chosen = np.random.default_rng(seed).permutation(np.flatnonzero(archive["split"] == split))[:count]
        self.names = [str(archive["classes"][archive["labels"][i]]).split()[0] for i in self.chosen]
        self.boxes = archive["boxes"][self.chosen] if "boxes" in archive else None

    def __len__(self) -> int:
        return len(self.chosen)

    def photo(self, index: int) -> Any:
        """A Pillow image."""
        from PIL import Image

        i = self.chosen[index]
        return Image.open(io.BytesIO(self.bytes[self.offsets[i] : self.offsets[i + 1]].tobytes())).convert("RGB")


def patches_in(boxes: Tensor) -> Tensor:
    """(B, 196) bool: which patches, at 224 px, have their centre in the box (B, 4) of a photo of 64 pixels."""
    centres = (torch.arange(14) * 16 + 8 + 16) / 4
    columns = (boxes[:, :1] <= centres) & (boxes[:, 2:3] >= centres)
    rows = (boxes[:, 1:2] <= centres) & (boxes[:, 3:] >= centres)
    return (rows[:, :, None] & columns[:, None]).flatten(1)


def read_photos(path: Path, split: int, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Photos (count, 3, 224, 224), resized to 256, centre crop, mean = std = 0.5; and the name of each one's class."""
    archive, photos = Encoded(path, split, count, seed), []
    for i in range(len(archive)):
        image = archive.photo(i)
        image = image.resize((256, 256), 3)  # bicubic
        photos.append(torch.from_numpy(np.array(image.crop((16, 16, 240, 240)))))
    return (torch.stack(photos).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5, archive.names


def build(base: Any, model: Any, name: str, rate: int) -> Callable[[Tensor], Tensor]:
    """A method at a rate; `model` holds the calibrated queries."""
    depth, tokens = len(base.blocks), base.num_prefix_tokens + base.grid**2
    counts = cropr.schedule.rate(tokens, depth, rate, base.num_prefix_tokens)
    if name in SYSTEMS:
        return Reduced(base, SYSTEMS[name], counts).eval()
    if name in MERGES:
        merging = cropr.apply(copy.deepcopy(base), rate=rate, merge=MERGES[name], num_outputs=0)
        merging.cropr.load_state_dict(model.cropr.state_dict())
        return deploy(merging, base)
    return cropr.set_rate(deploy(model, base), rate)


def log_probabilities(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(50)]).log_softmax(1)


def calibrated(base: Any, images: Tensor) -> Any:
    return cropr.calibrate(cropr.apply(copy.deepcopy(base), rate=8, num_outputs=0), images)


def agreement(options: argparse.Namespace, base: Any, classes: list[str]) -> None:
    env = environment("cpu") | {"photos": options.photos, "model": "vit_tiny_patch16_224"}
    rows: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    done = {(row["data"], row["seed"], row["rate"], row["method"]) for row in rows}
    for data, file in DATA.items():
        for seed in options.seeds:
            cells = [(rate, name) for rate in options.rates for name in options.methods]
            cells = [(rate, name) for rate, name in cells if (data, seed, rate, name) not in done]
            if not cells:
                continue
            torch.manual_seed(seed)
            calibration, _ = read_photos(options.data / file, 0, options.photos, seed)
            images, names = read_photos(options.data / file, 1, options.photos, seed)
            target = torch.tensor([classes.index(name) if name in classes else -1 for name in names])
            known = bool((target >= 0).all())  # the model's head knows the classes of Tiny-ImageNet alone
            expected, model = log_probabilities(base, images), calibrated(base, calibration)
            top1 = 100 * (expected.argmax(1) == target).double().mean().item()
            for rate, name in tqdm(cells, desc=f"{data}, seed {seed}", mininterval=5):
                got = log_probabilities(build(base, model, name, rate), images)
                same = (got.argmax(1) == expected.argmax(1)).double().mean().item()
                divergence = (expected.exp() * (expected - got)).sum(1).mean().item()
                row: dict[str, Any] = {"data": data, "seed": seed, "rate": rate, "method": name}
                row |= {"agreement": round(100 * same, 2), "KL": round(divergence, 4)}
                if known:
                    row["top-1"] = round(100 * (got.argmax(1) == target).double().mean().item(), 2)
                    row["top-1 unpruned"] = round(top1, 2)
                rows.append(row)
                save(options.out, env, rows)


def speed(options: argparse.Namespace, base: Any) -> None:
    """Every method at every rate against the unpruned model on the engine, in turns of one call in shuffled order."""
    images = torch.randn(options.batch, 3, 224, 224)
    model, rows = calibrated(base, torch.randn(8, 3, 224, 224)), []
    env = environment("cpu") | {"batch": options.batch, "model": "vit_tiny_patch16_224", "rounds": options.rounds}
    plain = deploy(cropr.apply(copy.deepcopy(base), rate=0, num_outputs=0), base)
    cells = {(rate, name): build(base, model, name, rate) for rate in options.rates for name in options.methods}
    cells[0, "unpruned"] = plain
    times: dict[tuple[int, str], list[float]] = {cell: [] for cell in cells}
    order, shuffler = list(cells), random.Random(0)
    for turn in tqdm(range(options.rounds + 2), mininterval=5):
        shuffler.shuffle(order)
        for cell in order:
            start = time.perf_counter()
            cells[cell](images)
            if turn >= 2:
                times[cell].append(time.perf_counter() - start)
    unpruned = quantile(times[0, "unpruned"], 0.5)
    for rate, name in cells:
        own = times[rate, name]
        rows.append({"rate": rate, "method": name, "speed-up": round(unpruned / quantile(own, 0.5), 3)})
        rows[-1]["p10 p90"] = [round(unpruned / quantile(own, q), 3) for q in (0.9, 0.1)]
    save(options.out, env, rows)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])  # options were chosen on 0 and 1
    parser.add_argument("--rates", type=int, nargs="+", default=[4, 8, 12, 15])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--speed", action="store_true", help="measure time instead of agreement")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.out = options.out or RESULTS / f"off_the_shelf{'_speed' if options.speed else ''}.json"
    base, about = load_weights(options.data / WEIGHTS)
    if options.speed:
        speed(options, base.eval())
    else:
        agreement(options, base.eval(), about["classes"].split())


if __name__ == "__main__":
    main()
