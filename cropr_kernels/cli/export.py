"""`cropr export`: export a pruned model, compare each file with the model, and time it."""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..exporting import FORMATS, export, load_exported, need_libraries
from ..inference.loading import device_and_dtype, load_with_queries
from ..pruning.api import set_rate
from ..pruning.deployment import deploy
from ..utils.images import find_named_photos
from ..utils.io import table
from ..utils.progress import Progress
from ..utils.tensorrt import unsupported_nodes
from ..utils.timing import time_interleaved
from .outputs import check_folder


def run(options: argparse.Namespace) -> None:
    check_folder(options.out)
    for format in options.format:
        need_libraries(format)
    device, dtype = device_and_dtype(options)
    model, pixels, *_ = load_with_queries(options)
    if options.images is None:
        photos = torch.rand(options.batch, 3, *pixels.img_size)
    else:
        paths = find_named_photos(options.images)
        photos = torch.stack([pixels.load(paths[i % len(paths)]) for i in range(options.batch)])
    images = pixels.normalize(photos).to(device, dtype)
    stem = Path(options.model).stem
    rows = [["PyTorch", "cropr", "", ""]]
    fast = deploy(model.to(device, dtype))
    plain = set_rate(deploy(model), 0)
    calls: dict[tuple[str, bool], Callable[[Any], object]] = {
        ("PyTorch", False): plain,
        ("PyTorch", True): fast,
    }
    with tempfile.TemporaryDirectory() as scratch:
        for format in options.format:
            name = f"{stem}_aoti.pt2" if format == "aoti" else f"{stem}{FORMATS[format]}"
            ops = options.ops if format not in ("onnx", "openvino") else None
            export_options: dict[str, Any] = {
                "format": format,
                "ops": ops,
                "dynamic_batch": options.dynamic_batch,
            }
            label = f"exporting {name}"
            with warnings.catch_warnings(), Progress(label, show=not options.quiet, ticks=True):
                warnings.simplefilter("ignore")  # exporters warn of their own deprecations
                exported = export(
                    model, images, options.out / name, with_map=options.map, **export_options
                )
                unpruned = export(plain, images, Path(scratch) / name, **export_options)
            agreement = (
                ", the same patches are pruned after the same blocks" if exported.same_map else ""
            )
            print(f"wrote {exported.path}, compared with the model{agreement}", flush=True)
            if format == "onnx":
                for problem in unsupported_nodes(exported.path):
                    print(f"TensorRT: {problem}", flush=True)
            for pruned, path in ((True, exported.path), (False, unpruned.path)):
                calls[str(exported.path), pruned] = load_exported(path, format)
            rows.append(
                [
                    str(exported.path),
                    exported.ops,
                    f"{_size(exported.path) / 1e6:.1f}",
                    f"{exported.difference:.1e}",
                ]
            )
        with torch.inference_mode():
            forwards = {name: partial(call, images) for name, call in calls.items()}
            times = time_interleaved(
                forwards, images.device, options.rounds, show=not options.quiet
            )
    for row in rows:
        before = times[row[0], False]
        after = times[row[0], True]
        spread = max(before.spread, after.spread)
        row += [f"{1e3 * before.seconds:.2f}", f"{1e3 * after.seconds:.2f}"]
        row += [f"{before.seconds / after.seconds:.2f}", f"{spread:.0%}"]
    dtype_name = str(images.dtype).removeprefix("torch.")
    print(
        f"milliseconds of a batch of {options.batch} on {images.device}, {dtype_name}; unpruned "
        "in the same format"
    )
    print(
        table(
            ["", "ops", "MB", "difference", "unpruned", "pruned", "speed-up", "spread"],
            rows,
            left_aligned=2,
        )
    )


def _size(path: Path) -> int:
    """Bytes of a file, and of the weights beside it."""
    weights = path.with_suffix(".bin")
    return path.stat().st_size + (weights.stat().st_size if path.suffix == ".xml" else 0)
