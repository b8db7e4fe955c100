"""`cropr map`: what a model drops from photos, and after which block."""

import argparse
from pathlib import Path
from typing import Any

import torch

from .. import calibration
from ..models.adapters import find_spec
from ..pruning.api import apply, deploy, set_rate
from ..pruning.maps import pruning_map
from ..utils.viz import find_named_photos, load_photo, save_pruning_frames, save_pruning_maps
from .common import load_model


def add_parser(commands: Any) -> None:
    """The command's arguments."""
    parser = commands.add_parser(
        "map",
        help="pictures of what a pruned model drops from photos, block by block",
        description="Write maps.png (every photo, and over it the block behind which each patch left), and for each "
        "photo NAME.gif, an animation, and NAME_blocks.png, its frames side by side.",
    )
    parser.add_argument("model", help="a model of timm, which downloads its weights, or a local weight file")
    parser.add_argument("images", type=Path, nargs="+", help="photos, or folders of them")
    parser.add_argument("--queries", type=Path, help="what cropr calibrate wrote (default: calibrate on these photos)")
    parser.add_argument("--rate", type=int, default=8, help="tokens dropped after each block (default: 8)")
    parser.add_argument("--llf", action="store_true", help="Last Layer Fusion")
    parser.add_argument("--mean", type=float, nargs=3, help="of the pixels (default: the model's, or 0.5)")
    parser.add_argument("--std", type=float, nargs=3, help="of the pixels (default: the model's, or 0.5)")
    parser.add_argument("--out", type=Path, default=Path("maps"), help="folder to write to (default: maps)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    paths = find_named_photos(options.images)
    loaded = load_model(options.model, options.mean, options.std)
    model = loaded.model
    pixels = torch.stack([load_photo(path, loaded.img_size) for path in paths])
    images = loaded.normalise(pixels)
    apply(model.eval(), rate=0, llf=options.llf, num_outputs=0)
    if options.queries is None:
        calibration.calibrate(model, images)
    else:
        calibration.load_queries(model, options.queries)
    maps = torch.cat([pruning_map(set_rate(deploy(model), options.rate), batch) for batch in images.split(16)])
    depth = len(find_spec(model).blocks)
    options.out.mkdir(parents=True, exist_ok=True)
    first = options.out / "maps.png"
    save_pruning_maps(first, pixels[:8], maps[:8], depth, [path.stem for path in paths[:8]])
    print(f"{first}: {min(len(paths), 8)} photos, dark patches left first")
    names: dict[str, int] = {}
    for path, photo, left in zip(paths, pixels, maps):
        names[path.stem] = names.get(path.stem, 0) + 1  # photos of different folders may have one name
        name = path.stem if names[path.stem] == 1 else f"{path.stem}_{names[path.stem]}"
        save_pruning_frames(options.out / f"{name}.gif", options.out / f"{name}_blocks.png", photo, left, depth)
        print(
            f"{options.out / name}.gif, {name}_blocks.png: {int((left == depth).sum())} of {left.numel()} patches stay"
        )
    if options.queries is None:
        print(f"queries: calibrated on these {len(paths)} photos; cropr calibrate on a few hundred gives better ones")
