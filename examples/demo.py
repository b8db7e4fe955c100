"""A trained Vision Transformer made faster without labels and without training: what that costs, what it buys.

python -m examples.demo                   timm's ViT-Ti, from timm's cache or the internet; with neither a ViT of digits
python -m examples.demo --weights FILE    a Vision Transformer of yours: .safetensors, or a state dict of PyTorch
"""

import argparse
import urllib.request
from pathlib import Path
from typing import NamedTuple

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
TO_FIT, CROPS = ("coffee", "flower", "rocket"), 128  # the photos to calibrate on; the others are compared and shown
ABOUT = """Takes a minute or two on two cores, and 1 MB of disk for pictures.
Pruning is lossy: tokens are merged, and some answers change. Agreement is how often the class stays the same."""
WITHOUT = """No pretrained weights: none in timm's cache, and no internet to download them from (23 MB). Name a file of
yours with make demo ARGS="--weights FILE", or run this once with internet. Until then: a ViT trained on digits."""


class Subject(NamedTuple):
    """A trained model, and images for it."""

    about: str
    model: nn.Module
    to_fit: Tensor  # as the model takes them, to calibrate on
    images: Tensor  # others, to compare on
    labels: Tensor | None  # of those
    pictures: Tensor  # (B, C, H, W) in [0, 1], of what is compared, to look at
    inputs: Tensor  # the same, as the model takes them
    rates: tuple[int, ...]  # the middle one is shown
    batch: int  # images at a time where time is measured


def find_weights() -> str | None:
    """Timm's weights, from its cache or the internet."""
    cached = try_to_load_from_cache(*WEIGHTS)
    if isinstance(cached, str):
        return cached
    try:  # without internet hf_hub_download tries for half a minute
        urllib.request.urlopen(hf_hub_url(*WEIGHTS), timeout=5).close()
    except OSError:
        return None
    return hf_hub_download(*WEIGHTS)


def of_photos(weights: str) -> Subject:
    model, metadata = load_weights(weights)
    pixels = pixels_of(model, metadata["name"])
    height, width = pixels.img_size
    larger = pixels._replace(img_size=(height * 4 // 3, width * 4 // 3), crop_pct=1.0)
    generator = torch.Generator().manual_seed(0)

    def crops(paths: list[Path]) -> Tensor:
        """Random crops of photos, every other one flipped."""
        photos, made = [larger.load(path) for path in paths], []
        for i in range(CROPS):
            top, left = (int(torch.randint(side // 3 + 1, (), generator=generator)) for side in (height, width))
            crop = photos[i % len(photos)][:, top : top + height, left : left + width]
            made.append(crop.flip(2) if i // len(photos) % 2 else crop)
        return pixels.normalize(torch.stack(made))

    paths = sorted(PHOTOS.glob("*.jpg"))
    to_fit, others = ([path for path in paths if (path.stem in TO_FIT) is fits] for fits in (True, False))
    pictures = torch.stack([pixels.load(path) for path in others])
    about = (
        f"{metadata['name']}, {weights},\n"
        f"calibrated on {CROPS} crops of {len(to_fit)} photos, compared on {CROPS} crops of {len(others)} others"
    )
    inputs = pixels.normalize(pictures)
    return Subject(about, model, crops(to_fit), crops(others), None, pictures, inputs, rates=(4, 8, 12), batch=16)


def of_digits() -> Subject:
    model = digits.train(seed=0, rate=0, epochs=digits.EPOCHS).model
    to_fit, _, images, labels = digits.load()
    about = (
        f"a ViT of {digits.MODEL['depth']} blocks and 64 patches, trained on handwritten digits,\n"
        f"calibrated on 256 of them, compared on {len(images)} others"
    )
    shown = images[:8]
    return Subject(
        about, model, to_fit[:256], images, labels, (shown + 1) / 2, shown, rates=(8, 12, 16), batch=len(images)
    )


def show(subject: Subject, out: Path, device: torch.device) -> None:
    """Calibrate, compare and time the model, in one table, and draw what is merged."""
    rates, shown = [0, *subject.rates], subject.rates[1]
    model, images = subject.model.to(device), subject.images.to(device)
    cropr.calibrate(cropr.apply(model, rate=shown, merge=True), subject.to_fit)
    agreed = cropr.agreement(model, images, rates)
    timed = measure(model, images[: subject.batch], rates, graphs=False, rounds=None, show=True)  # checks what it times
    fast = cropr.deploy(model)
    cells = []
    for one, times in zip(agreed, timed):
        row = [f"{one.rate}" if one.rate else "unpruned", f"{100 * one.agreement:.1f}"]
        if subject.labels is not None:
            row.append(f"{digits.accuracy(cropr.set_rate(fast, one.rate), images, subject.labels.to(device)):.1f}")
        row += [f"{times['images_per_second']:.1f}", f"{times['speedup']:.2f}x", f"{times['flop_ratio']:.2f}x"]
        cells.append([*row, f"{times['spread']:.0%}"])
    accuracy = ["accuracy, %"] if subject.labels is not None else []
    head = ["merged per block", "agreement, %", *accuracy, "images/s", "speed-up", "FLOP ratio", "spread"]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"\n{subject.about}; batch {subject.batch}, float32, {where}:")
    print(table(head, cells, left=1))
    if any(above_flops(times["speedup"], times["flop_ratio"]) for times in timed):
        print(f"Some are {ABOVE_FLOPS}.")
    cropr.set_rate(fast, shown)
    inputs = subject.inputs.to(device)
    pruned, merged = out / "pruned.png", out / "merged.png"
    depth = len(fast.cropr.spec.blocks)
    save_pruning_maps(pruned, subject.pictures, cropr.pruning_map(fast, inputs), depth=depth)
    save_merge_maps(merged, subject.pictures, cropr.merge_map(fast, inputs))
    print(f"At {shown}, after which block each patch is merged: {pruned}; which are one token in the end: {merged}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", metavar="FILE", help="weights of a ViT of yours")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)")
    options = parser.parse_args()
    if options.weights is not None and not Path(options.weights).is_file():
        parser.error(f"--weights: no file at {options.weights}")
    options.out.mkdir(parents=True, exist_ok=True)
    print(ABOUT)
    weights = options.weights or find_weights()
    if weights is None:
        print(WITHOUT)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    show(of_digits() if weights is None else of_photos(weights), options.out, device)
    print("So few images tell little. On a folder of yours: cropr calibrate MODEL FOLDER")


if __name__ == "__main__":
    main()
