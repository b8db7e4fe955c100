"""`cropr map`: draw where and after which block a model prunes photos."""

import argparse
from collections import Counter

import torch

from .. import calibration
from ..models.adapters import find_spec
from ..pruning.api import deploy
from ..pruning.maps import merge_map, pruning_map
from ..utils.images import describe_skipped, find_named_photos, printable, read_photos
from ..utils.optional import import_optional
from ..utils.progress import each
from ..utils.viz import save_merge_maps, save_pruning_frames, save_pruning_maps
from .common import load_model
from .outputs import check_folder


def run(options: argparse.Namespace) -> None:
    check_folder(options.out)
    for library in ("PIL.Image", "matplotlib.figure"):
        import_optional(library, "viz", "cropr map")
    show = not options.quiet
    skipped = Counter[str]()
    paths = find_named_photos(options.images, skipped)
    unreadable: list[str] = []
    model, pixels, trained = load_model(options)
    readable = list(read_photos(each(paths, "reading photos", show=show), pixels.load, unreadable))
    if not readable:
        raise ValueError(f"none of the {len(paths)} photos can be read; {unreadable[0]}")
    paths = [path for path, _ in readable]
    photos = torch.stack([photo for _, photo in readable])
    print(f"photos: {pixels}{describe_skipped(skipped)}")
    print("".join(f"skipped {line}\n" for line in unreadable), end="")
    images = pixels.normalize(photos)
    calibrated = options.queries is None and not trained
    if calibrated:
        calibration.calibrate(model, each(images.split(16), "calibrating", show=show))
    elif options.queries is not None:
        calibration.load_queries(model, options.queries)
    fast = deploy(model)
    depth = len(find_spec(model).blocks)
    maps = torch.cat([pruning_map(fast, batch) for batch in each(images.split(16), "pruning", show=show)])
    sheet = options.out / "maps.png"
    titles = [printable(path.stem) for path in paths[:8]]
    save_pruning_maps(sheet, photos[:8], maps[:8], depth, titles)
    print(f"{sheet}: {len(titles)} photos, dark patches are pruned first")
    if fast.cropr.config.merge is not None:
        sheet = options.out / "merged.png"
        save_merge_maps(sheet, photos[:8], merge_map(fast, images[:8]), titles)
        print(f"{sheet}: the same, and the tokens they end in")
    names: dict[str, int] = {}
    for path, photo, photo_map in zip(paths, photos, maps):
        names[path.stem] = names.get(path.stem, 0) + 1  # photos of different folders may have one name
        name = printable(path.stem) if names[path.stem] == 1 else f"{printable(path.stem)}_{names[path.stem]}"
        save_pruning_frames(options.out / f"{name}.gif", options.out / f"{name}_blocks.png", photo, photo_map, depth)
        kept = int((photo_map == depth).sum())
        print(
            f"{options.out / name}.gif, {name}_blocks.png: {kept} of {photo_map.numel()} patches are kept", flush=True
        )
    if calibrated:
        print(f"queries: calibrated on these {len(paths)} photos; cropr calibrate on a few hundred gives better ones")
