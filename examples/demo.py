"""Make a trained Vision Transformer faster without labels and training: agreement and speed.

python -m examples.demo                   timm's ViT-Ti, from timm's cache or the internet; with
neither a ViT of digits python -m examples.demo --weights FILE    a Vision Transformer of yours:
.safetensors, or a state dict of PyTorch
"""

import argparse
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache
from torch import Tensor, nn

import cropr_kernels as cropr
from cropr_kernels.cli.bench import measure
from cropr_kernels.models.factory import load_weights
from cropr_kernels.models.pixels import pixels_of
from cropr_kernels.utils.io import table
from cropr_kernels.utils.timing import ABOVE_FLOPS, above_flops
from cropr_kernels.utils.viz import save_merge_maps, save_pruning_maps
from examples import digits

WEIGHTS = ("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "model.safetensors")
PHOTOS = Path(__file__).parent / "photos"
# The other photos are for comparison and pictures
CALIBRATION_PHOTOS = ("coffee", "flower", "rocket")
CROPS = 128
INTRODUCTION = """Takes a minute or two on two cores, and 1 MB of disk for pictures.
Pruning is lossy: tokens are merged, and some answers change. Agreement is how often the class
stays the same."""
NO_WEIGHTS = """No pretrained weights: none in timm's cache, and no internet to download them from
(23 MB). Name your file with make demo ARGS="--weights FILE", or run this once with internet. Until
then: a ViT trained on digits."""


class Subject(NamedTuple):
    """A trained model and its images."""

    description: str
    model: nn.Module
    calibration: Tensor  # inputs of the model for calibration
    images: Tensor  # other inputs, for comparison
    labels: Tensor | None  # of `images`
    pictures: Tensor  # (B, C, H, W) in [0, 1], to draw
    inputs: Tensor  # the pictures as inputs of the model
    rates: tuple[int, ...]  # pictures are drawn at the middle one
    batch: int  # batch size of the timing


def find_weights() -> str | None:
    """Find timm's weights in its cache or on the internet; None without both."""
    cached = try_to_load_from_cache(*WEIGHTS)
    if isinstance(cached, str):
        return cached
    try:  # hf_hub_download would retry for half a minute without internet
        urllib.request.urlopen(hf_hub_url(*WEIGHTS), timeout=5).close()
    except OSError:
        return None
    return hf_hub_download(*WEIGHTS)


def pretrained_subject(weights: str) -> Subject:
    model, metadata = load_weights(weights)
    pixels = pixels_of(model, metadata["name"])
    height, width = pixels.img_size
    larger = pixels._replace(img_size=(height * 4 // 3, width * 4 // 3), crop_pct=1.0)
    generator = torch.Generator().manual_seed(0)

    def crops(paths: list[Path]) -> Tensor:
        """Random crops of photos, every other one flipped."""
        photos = [larger.load(path) for path in paths]
        batch = []
        for i in range(CROPS):
            top, left = (
                int(torch.randint(side // 3 + 1, (), generator=generator))
                for side in (height, width)
            )
            crop = photos[i % len(photos)][:, top : top + height, left : left + width]
            batch.append(crop.flip(2) if i // len(photos) % 2 else crop)
        return pixels.normalize(torch.stack(batch))

    paths = sorted(PHOTOS.glob("*.jpg"))
    calibration = [path for path in paths if path.stem in CALIBRATION_PHOTOS]
    comparison = [path for path in paths if path.stem not in CALIBRATION_PHOTOS]
    pictures = torch.stack([pixels.load(path) for path in comparison])
    description = (
        f"{metadata['name']}, {weights},\n"
        f"calibrated on {CROPS} crops of {len(calibration)} photos, "
        f"compared on {CROPS} crops of {len(comparison)} others"
    )
    return Subject(
        description,
        model,
        calibration=crops(calibration),
        images=crops(comparison),
        labels=None,
        pictures=pictures,
        inputs=pixels.normalize(pictures),
        rates=(4, 8, 12),
        batch=16,
    )


def digits_subject() -> Subject:
    model = digits.train(seed=0, rate=0, epochs=digits.EPOCHS).model
    train_images, _, images, labels = digits.load()
    description = (
        f"a ViT of {digits.MODEL['depth']} blocks and 64 patches, trained on handwritten digits,\n"
        f"calibrated on 256 of them, compared on {len(images)} others"
    )
    inputs = images[:8]
    return Subject(
        description,
        model,
        calibration=train_images[:256],
        images=images,
        labels=labels,
        pictures=(inputs + 1) / 2,
        inputs=inputs,
        rates=(8, 12, 16),
        batch=len(images),
    )


def measure_rates(subject: Subject, model: nn.Module, device: torch.device) -> list[dict[str, Any]]:
    """Measure agreement, time and, with labels, accuracy at rate 0 and the subject's rates."""
    rates = [0, *subject.rates]
    images = subject.images.to(device)
    agreements = cropr.agreement(model, images, rates)
    # Checks outputs too
    timings = measure(model, images[: subject.batch], rates, graphs=False, rounds=None, show=True)
    fast = cropr.deploy(model)
    rows = []
    for result, times in zip(agreements, timings):
        row = {"rate": result.rate, "agreement": 100 * result.agreement} | times
        if subject.labels is not None:
            row["accuracy"] = digits.accuracy(
                cropr.set_rate(fast, result.rate), images, subject.labels.to(device)
            )
        rows.append(row)
    return rows


def print_table(subject: Subject, rows: list[dict[str, Any]], device: torch.device) -> None:
    accuracy = ["accuracy, %"] if subject.labels is not None else []
    head = [
        "merged per block",
        "agreement, %",
        *accuracy,
        "images/s",
        "speed-up",
        "FLOP ratio",
        "spread",
    ]
    lines = []
    for row in rows:
        cells = [f"{row['rate']}" if row["rate"] else "unpruned", f"{row['agreement']:.1f}"]
        if "accuracy" in row:
            cells.append(f"{row['accuracy']:.1f}")
        cells += [
            f"{row['images_per_second']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['flop_ratio']:.2f}x",
        ]
        lines.append([*cells, f"{row['spread']:.0%}"])
    hardware = f"CPU, {torch.get_num_threads()} thread(s)"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    print(f"\n{subject.description}; batch {subject.batch}, float32, {hardware}:")
    print(table(head, lines, left_aligned=1))
    if any(above_flops(row["speedup"], row["flop_ratio"]) for row in rows):
        print(f"Some are {ABOVE_FLOPS}.")


def show(subject: Subject, out: Path, device: torch.device) -> None:
    """Calibrate, compare and time the model, print one table, and draw merged patches."""
    rate = subject.rates[1]
    model = subject.model.to(device)
    cropr.calibrate(cropr.apply(model, rate=rate, merge=True, num_outputs=0), subject.calibration)
    print_table(subject, measure_rates(subject, model, device), device)
    fast = cropr.set_rate(cropr.deploy(model), rate)
    inputs = subject.inputs.to(device)
    pruned = out / "pruned.png"
    merged = out / "merged.png"
    depth = len(fast.cropr.spec.blocks)
    save_pruning_maps(pruned, subject.pictures, cropr.pruning_map(fast, inputs), depth=depth)
    save_merge_maps(merged, subject.pictures, cropr.merge_map(fast, inputs))
    print(
        f"At {rate}, after which block each patch is merged: {pruned}; which are one token in the "
        f"end: {merged}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", metavar="FILE", help="weights of a ViT of yours")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)"
    )
    options = parser.parse_args()
    if options.weights is not None and not Path(options.weights).is_file():
        parser.error(f"--weights: no file at {options.weights}")
    options.out.mkdir(parents=True, exist_ok=True)
    print(INTRODUCTION)
    weights = options.weights or find_weights()
    if weights is None:
        print(NO_WEIGHTS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    show(digits_subject() if weights is None else pretrained_subject(weights), options.out, device)
    print("So few images tell little. On a folder of yours: cropr calibrate MODEL FOLDER")


if __name__ == "__main__":
    main()
