"""Calibrated queries against untrained scorers: agreement with the unpruned model on photos nobody labelled.

python benchmarks/calibration.py --data FOLDER [--photos 400] [--seeds 3] [--rates 8 12 15] [--out FILE]

FOLDER holds tinyimagenet100_64.npz (buf, offsets, labels, split: encoded photos) and a ViT-Ti for it. Each seed draws
its own photos: as many to calibrate on, from the training split, as to compare on, from the validation split.
"""

import argparse
import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, environment, save
from networks import Random, Stand
from torch import Tensor
from tqdm import tqdm

import cropr_kernels as cropr
from cropr_kernels.weights import load_weights


class Variance(Stand):
    """Variance of a token over its channels."""

    def forward(self, x: Tensor, num_keep: int, num_prefix: int = 0, scores: Tensor | None = None) -> cropr.Split:
        return cropr.Split(*torch.ops.cropr.split(x, x.float().var(-1), num_keep, num_prefix))


def read_photos(path: Path, split: int, count: int, seed: int) -> Tensor:
    """Photos (count, 3, 224, 224): resized to 256, centre crop, mean = std = 0.5."""
    from PIL import Image

    archive = np.load(path)
    chosen = np.random.default_rng(seed).permutation(np.flatnonzero(archive["split"] == split))[:count]
    photos = []
    for i in chosen:
        encoded = archive["buf"][archive["offsets"][i] : archive["offsets"][i + 1]].tobytes()
        image = Image.open(io.BytesIO(encoded)).convert("RGB").resize((256, 256), Image.Resampling.BICUBIC)
        photos.append(torch.from_numpy(np.array(image.crop((16, 16, 240, 240)))))
    return (torch.stack(photos).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def log_probabilities(model: Any, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(50)]).log_softmax(1)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=int, nargs="+", default=[8, 12, 15])
    parser.add_argument("--out", type=Path, default=RESULTS / "calibration.json")
    options = parser.parse_args()
    base, _ = load_weights(options.data / "vit_tiny_p16_224_tin200_fp16.safetensors")
    base.eval()
    env: dict[str, Any] = environment("cpu") | {"photos": options.photos, "model": "vit_tiny_patch16_224"}
    rows: list[dict[str, Any]] = []
    archive = options.data / "tinyimagenet100_64.npz"
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        calibration, images = (read_photos(archive, split, options.photos, seed) for split in (0, 1))
        expected = log_probabilities(base, images)
        model = cropr.calibrate(cropr.apply(copy.deepcopy(base), rate=8), calibration)
        methods = {"calibrated": cropr.deploy(model)}
        for name, kind in (("random", Random), ("variance", Variance)):
            methods[name] = cropr.deploy(model, engine=False)
            for i, module in enumerate(methods[name].cropr):
                methods[name].cropr[i] = kind(module.query())
        cells = [(rate, name) for rate in options.rates for name in methods]
        for rate, name in tqdm(cells, desc=f"seed {seed}", mininterval=5):
            got = log_probabilities(cropr.set_rate(methods[name], rate), images)
            agreement = (got.argmax(1) == expected.argmax(1)).double().mean().item()
            divergence = (expected.exp() * (expected - got)).sum(1).mean().item()
            rows.append({"seed": seed, "rate": rate, "method": name})
            rows[-1] |= {"agreement": round(100 * agreement, 2), "KL": round(divergence, 4)}
            save(options.out, env, rows)
    for rate in options.rates:
        for name in methods:
            own = [row for row in rows if (row["rate"], row["method"]) == (rate, name)]
            figures = [f"{row['agreement']:.1f} ({row['KL']:.3f})" for row in own]
            print(f"R = {rate:<3}{name:12}agreement (KL)  " + "  ".join(figures))


if __name__ == "__main__":
    main()
