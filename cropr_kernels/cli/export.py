"""`cropr export`: files that run elsewhere, each compared with the model, and how fast they are."""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..exporting import FORMATS, export, load_exported
from ..pruning.api import deploy, set_rate
from ..tuning import medians
from ..utils.io import table
from ..utils.viz import find_named_photos, load_photo
from .common import add_model_arguments, load_pruned


def add_parser(commands: Any) -> None:
    """The command's arguments."""
    parser = commands.add_parser(
        "export",
        help="write a pruned model as ONNX, a torch.export program or an AOTInductor package",
        description="Write a pruned model in each format, compare what it computes with the model, and time it.",
    )
    add_model_arguments(parser)
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["onnx"], help="default: onnx")
    parser.add_argument(
        "--ops", choices=["cropr", "aten"], help="aten: the file needs nothing of this package (default: as fits)"
    )
    parser.add_argument("--images", type=Path, nargs="+", help="photos to compare on (default: random numbers)")
    parser.add_argument("--batch", type=int, default=1, help="images at a time (default: 1)")
    parser.add_argument("--dynamic-batch", action="store_true", help="the file takes batches of any size")
    parser.add_argument("--map", action="store_true", help="also give the block behind which each patch left")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--rounds", type=int, default=15, help="timings of each (default: 15)")
    parser.add_argument("--out", type=Path, default=Path("exported"), help="folder to write to (default: exported)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if options.batch < 1:
        raise ValueError(f"--batch must be >= 1, got {options.batch}")
    loaded, dtype = load_pruned(options), getattr(torch, options.dtype)
    model = loaded.model.to(options.device, dtype)
    if options.images is None:
        pixels = torch.rand(options.batch, 3, loaded.img_size, loaded.img_size, generator=torch.Generator())
    else:
        paths = find_named_photos(options.images)
        pixels = torch.stack([load_photo(paths[i % len(paths)], loaded.img_size) for i in range(options.batch)])
    images = loaded.normalise(pixels).to(options.device, dtype)
    stem = Path(options.model).stem.replace("/", "_")
    fast = deploy(model)
    plain = set_rate(deploy(model), 0)
    rows = [["PyTorch", "cropr", "", ""]]
    calls: dict[tuple[str, bool], Callable[[], Any]] = {}
    calls["PyTorch", False], calls["PyTorch", True] = lambda: plain(images), lambda: fast(images)
    with tempfile.TemporaryDirectory() as scratch:
        for format in options.format:
            name = f"{stem}_aoti.pt2" if format == "aoti" else f"{stem}{FORMATS[format]}"
            how = {"format": format, "ops": options.ops if format != "onnx" else None}
            how["dynamic_batch"] = options.dynamic_batch
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # exporters warn of their own deprecations
                done = export(model, images, options.out / name, with_map=options.map, **how)
                bare = export(plain, images, Path(scratch) / name, **how).path
            if done.same_map:
                print(f"{done.path}: the same patches leave behind the same blocks")
            for pruned, path in ((True, done.path), (False, bare)):
                call = load_exported(path, format)
                calls[str(done.path), pruned] = lambda call=call: call(images)  # type: ignore[misc]
            rows.append([str(done.path), done.ops, f"{done.path.stat().st_size / 1e6:.1f}", f"{done.difference:.1e}"])
        with torch.inference_mode():
            times = medians(calls, images.device, options.rounds, False)
    for row in rows:
        before, after = times[row[0], False], times[row[0], True]
        row += [f"{1e3 * before:.2f}", f"{1e3 * after:.2f}", f"{before / after:.2f}"]
    print(
        f"milliseconds of a batch of {options.batch} on {options.device}, {options.dtype}; unpruned in the same format"
    )
    print(table(["", "ops", "MB", "difference", "unpruned", "pruned", "speed-up"], rows))
