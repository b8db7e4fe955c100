"""`cropr export`: files that run elsewhere, each compared with the model, and how fast they are."""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..exporting import FORMATS, export, load_exported, need_libraries
from ..pruning.api import deploy, set_rate
from ..utils.images import find_named_photos
from ..utils.io import table
from ..utils.progress import Progress
from ..utils.timing import in_turns
from .common import load_with_queries, place_of
from .outputs import check_folder


def run(options: argparse.Namespace) -> None:
    check_folder(options.out)
    for format in options.format:
        need_libraries(format)
    place = place_of(options)
    model, pixels, _ = load_with_queries(options)
    if options.images is None:
        photos = torch.rand(options.batch, 3, *pixels.img_size)
    else:
        paths = find_named_photos(options.images)
        photos = torch.stack([pixels.load(paths[i % len(paths)]) for i in range(options.batch)])
    images = pixels.normalize(photos).to(**place)
    stem, rows = Path(options.model).stem, [["PyTorch", "cropr", "", ""]]
    fast = deploy(model.to(**place))
    plain = set_rate(deploy(model), 0)
    calls: dict[tuple[str, bool], Callable[[Any], Any]] = {("PyTorch", False): plain, ("PyTorch", True): fast}
    with tempfile.TemporaryDirectory() as scratch:
        for format in options.format:
            name = f"{stem}_aoti.pt2" if format == "aoti" else f"{stem}{FORMATS[format]}"
            ops = options.ops if format != "onnx" else None
            how: dict[str, Any] = {"format": format, "ops": ops, "dynamic_batch": options.dynamic_batch}
            label = f"exporting {name}"
            with warnings.catch_warnings(), Progress(label, show=not options.quiet, beat=True):
                warnings.simplefilter("ignore")  # exporters warn of their own deprecations
                done = export(model, images, options.out / name, with_map=options.map, **how)
                bare = export(plain, images, Path(scratch) / name, **how)
            same = ", the same patches are pruned after the same blocks" if done.same_map else ""
            print(f"wrote {done.path}, compared with the model{same}", flush=True)
            for pruned, path in ((True, done.path), (False, bare.path)):
                calls[str(done.path), pruned] = load_exported(path, format)
            rows.append([str(done.path), done.ops, f"{done.path.stat().st_size / 1e6:.1f}", f"{done.difference:.1e}"])
        with torch.inference_mode():
            ready = {name: partial(call, images) for name, call in calls.items()}
            times = in_turns(ready, images.device, options.rounds, show=not options.quiet)
    for row in rows:
        before, after = times[row[0], False], times[row[0], True]
        spread = max(before.spread, after.spread)
        row += [f"{1e3 * before.seconds:.2f}", f"{1e3 * after.seconds:.2f}"]
        row += [f"{before.seconds / after.seconds:.2f}", f"{spread:.0%}"]
    dtype = str(images.dtype).removeprefix("torch.")
    print(f"milliseconds of a batch of {options.batch} on {images.device}, {dtype}; unpruned in the same format")
    print(table(["", "ops", "MB", "difference", "unpruned", "pruned", "speed-up", "spread"], rows, left=2))
