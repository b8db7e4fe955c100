"""`cropr map`: draw where and after which block a model prunes photos."""

import argparse
from collections import Counter
from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path

import torch

from .. import calibration
from ..inference.loading import load_model
from ..models.adapters import find_spec
from ..pruning.deployment import deploy
from ..pruning.maps import merge_map, pruning_map
from ..query_files import load_queries
from ..utils.images import describe_skipped, find_named_photos, printable, read_photos
from ..utils.optional import import_optional
from ..utils.progress import each
from ..utils.viz import save_merge_maps, save_pruning_frames, save_pruning_maps
from .outputs import check_folder


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each photo: its own, with a number where folders hold several of that name.

    No two are equal, also where upper and lower case are.
    """
    stems = [printable(path.stem) for path in paths]
    taken = {stem.casefold() for stem in stems}
    seen: set[str] = set()
    names: list[str] = []
    for stem in stems:
        numbered = (f"{stem}_{number}" for number in count(2))
        name = (
            next(name for name in numbered if name.casefold() not in taken)
            if stem.casefold() in seen
            else stem
        )
        taken.add(name.casefold())
        seen.add(stem.casefold())
        names.append(name)
    return names


def run(options: argparse.Namespace) -> None:
    check_folder(options.out)
    for library in ("PIL.Image", "matplotlib.figure"):
        import_optional(library, "viz", "cropr map")
    show = not options.quiet
    skipped = Counter[str]()
    paths = find_named_photos(options.images, skipped)
    unreadable: list[str] = []
    model, pixels, trained, _ = load_model(options)
    num_photos = len(paths)
    reading = read_photos(each(paths, "reading photos", show=show), pixels.load, unreadable)
    readable = list(islice(reading, options.limit))
    if not readable:
        raise ValueError(f"none of the {num_photos} photos can be read; {unreadable[0]}")
    paths = [path for path, _ in readable]
    names = distinct_names(paths)
    photos = torch.stack([photo for _, photo in readable])
    print(f"photos: {pixels}{describe_skipped(skipped)}")
    print("".join(f"skipped {line}\n" for line in unreadable), end="")
    if len(paths) + len(unreadable) < num_photos:
        print(f"the first {len(paths)} of {num_photos} photos: --limit {num_photos} draws all")
    images = pixels.normalize(photos)
    calibrated = options.queries is None and not trained
    if calibrated:
        calibration.calibrate(model, each(images.split(16), "calibrating", show=show))
    elif options.queries is not None:
        load_queries(model, options.queries)
    fast = deploy(model)
    depth = len(find_spec(model).blocks)
    maps = torch.cat(
        [pruning_map(fast, batch) for batch in each(images.split(16), "pruning", show=show)]
    )
    sheet = options.out / "maps.png"
    save_pruning_maps(sheet, photos[:8], maps[:8], depth, names[:8])
    print(f"{sheet}: {len(names[:8])} photos, dark patches are pruned first")
    if fast.cropr.config.merge is not None:
        sheet = options.out / "merged.png"
        save_merge_maps(sheet, photos[:8], merge_map(fast, images[:8]), names[:8])
        print(f"{sheet}: the same, and the tokens they end in")
    for name, path, photo, photo_map in zip(names, paths, photos, maps):
        save_pruning_frames(
            options.out / f"{name}.gif", options.out / f"{name}_blocks.png", photo, photo_map, depth
        )
        kept = int((photo_map == depth).sum())
        pictures = f"{options.out / name}.gif, {name}_blocks.png"
        print(
            f"{pictures}: {kept} of {photo_map.numel()} patches are kept of {printable(path)}",
            flush=True,
        )
    if calibrated:
        print(
            f"queries: calibrated on these {len(paths)} photos; cropr calibrate on a few hundred "
            "gives better ones"
        )
