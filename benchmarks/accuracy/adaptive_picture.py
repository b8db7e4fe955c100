"""docs/counts_by_image.png: a plain and a crowded photo, the tokens they end in, counts by block.

python -m benchmarks.accuracy.adaptive_picture --data FOLDER

FOLDER as in accuracy/data.py; queries and thresholds are calibrated on its training photos.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

import cropr_kernels as cropr
from benchmarks.accuracy.data import DATA, TRAIN, load_model, read_photos
from benchmarks.utils.results import DOCS, ROOT
from cropr_kernels.models.pixels import pixels_of
from cropr_kernels.pruning.maps import counts_by_block
from cropr_kernels.pruning.model import run
from cropr_kernels.pruning.state import PruningOptions
from cropr_kernels.utils.viz import tile_colors

RATE = 8
NUM_PHOTOS = 300  # for calibration
PHOTOS = ("rocket", "astronaut")  # of the example photos those with fewest and most tokens


@torch.no_grad()
def draw(options: argparse.Namespace) -> None:
    base, _ = load_model(options.data)
    pixels = pixels_of(base, "")
    model = cropr.apply(base, rate=RATE, merge=True, num_outputs=0)
    calibration, _ = read_photos(options.data / DATA["Tiny-ImageNet"], TRAIN, NUM_PHOTOS, 0)
    cropr.calibrate(model, calibration)
    fast = cropr.deploy(model)
    shown = [pixels.load(ROOT / "examples" / "photos" / f"{name}.jpg") for name in PHOTOS]
    photos = torch.stack(shown)
    images = pixels.normalize(photos)
    _, state = run(fast, lambda: fast(images), PruningOptions(engine=True))
    counts = counts_by_block(state)
    maps = cropr.merge_map(fast, images)
    constant = [state.num_tokens, *state.counts]
    figure = Figure(figsize=(11, 3 * len(PHOTOS)), layout="constrained")
    axes = figure.subplots(len(PHOTOS), 3, width_ratios=(1, 1, 1.9))
    blocks = range(1, len(constant) + 1)
    for row, name in enumerate(PHOTOS):
        photo, tiles, bars = axes[row]
        photo.imshow(photos[row].permute(1, 2, 0))
        photo.set_title(name)
        tiles.imshow(tile_colors(photos[row], maps[row]).permute(1, 2, 0))
        tiles.set_title(f"{counts[row, -1]} tokens in the last block", fontsize=10)
        bars.bar_label(bars.bar(blocks, counts[row].tolist(), label="its own"), fontsize=8)
        bars.step(
            blocks,
            constant,
            color="gray",
            linestyle="--",
            where="mid",
            label=f"constant, R = {RATE}",
        )
        bars.set(ylim=(0, state.num_tokens * 1.12), ylabel="tokens", xlabel="block", xticks=blocks)
        for axis in (photo, tiles):
            axis.set_axis_off()
    axes[0, 2].legend()
    figure.savefig(options.out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=DOCS / "counts_by_image.png")
    draw(parser.parse_args())


if __name__ == "__main__":
    main()
