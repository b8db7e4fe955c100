"""Full networks: the engine against the alternatives, in one run. A file after every cell.

python -m benchmarks.models.networks [--models vit_large_patch16_224 ...] [--batches 1 8 64 256]
    [--modes eager graph compiled] [--minutes 9] [--out FILE]

Methods: the unpruned model on the same engine, the engine, the functional ops, merging, ToMe, the
published sequence, random pruning, a free slice (drops tokens at no cost: the upper bound), the
plain model, and timm's if timm has it. A run that is out of minutes, or interrupted, resumes.
Weights are random; every cell is checked first.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cropr_kernels as cropr
from benchmarks.baselines.modules import FreeSlice, Published, Random
from benchmarks.baselines.network import Reduced
from benchmarks.baselines.registry import SYSTEMS
from benchmarks.models.deployment import create, deploy, pruned, unpruned, with_modules
from benchmarks.models.timing import measure
from benchmarks.utils.results import RESULTS, Results, environment

# preset, changes to it, rate, Last Layer Fusion; ViT-L and EVA-02-L at 512 px as in the paper
MODELS: dict[str, tuple[str, dict[str, Any], int, bool]] = {
    "vit_small_patch16_224": ("vit_small_patch16_224", {}, 8, False),
    "vit_base_patch16_224": ("vit_base_patch16_224", {}, 8, False),
    "vit_large_patch16_224": ("vit_large_patch16_224", {}, 8, False),
    "vit_large_patch16_384": ("vit_large_patch16_384", {}, 24, False),
    "eva02_large_patch14_448": ("eva02_large_patch14_448", {}, 40, True),
    "eva02_large_patch16_512": (
        "eva02_large_patch14_448",
        {"patch_size": 16, "img_size": 512},
        40,
        True,
    ),
    "vit_base_patch16_1536": ("vit_base_patch16_224", {"img_size": 1536}, 700, True),
}


def build(name: str, device: str, dtype: torch.dtype) -> tuple[dict[str, Any], Tensor]:
    """Build every method of one network, and one image."""
    preset, changes, rate, llf = MODELS[name]
    plain = create(preset, device, dtype, **changes)
    model = pruned(plain, rate=rate, llf=llf)
    merging = pruned(plain, rate=rate, llf=llf, merge=True)
    merging.cropr.load_state_dict(model.cropr.state_dict())
    methods = {"unpruned": unpruned(plain), "engine": deploy(model, plain)}
    methods |= {"functional": deploy(model, plain, engine=False), "merge": deploy(merging, plain)}
    if not (llf or plain.config.rope):
        tokens = plain.num_prefix_tokens + plain.grid**2
        counts = cropr.Schedule(rate=rate).counts(
            tokens, len(plain.blocks), plain.num_prefix_tokens
        )
        methods["ToMe"] = Reduced(plain, SYSTEMS["ToMe"], counts)
    module_types = {"published": Published, "random": Random, "free slice": FreeSlice}
    methods |= {name: with_modules(model, plain, module_types[name]) for name in module_types}
    methods["plain"] = plain
    size = plain.config.img_size
    try:
        import timm

        if not changes and timm.is_model(name):
            methods["timm"] = timm.create_model(name).eval().requires_grad_(False).to(device, dtype)
    except ImportError:
        pass
    return methods, torch.randn(1, 3, size, size, device=device, dtype=dtype)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument(
        "--modes", nargs="+", choices=["eager", "graph", "compiled"], default=["eager", "graph"]
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["bfloat16"]
    )
    parser.add_argument("--methods", nargs="+", help="only these, besides unpruned (default: all)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=9.0, help="start no cell after this time")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or RESULTS / f"{options.device}_networks.json"
    keys = ("model", "dtype", "batch", "mode")
    results = Results(out, environment(options.device), keys)
    modes = [mode for mode in options.modes if mode != "graph" or options.device != "cpu"]
    cells = itertools.product(options.models, options.dtypes, options.batches, modes)
    remaining = results.remaining(cells, options.minutes)
    for (name, dtype), network_cells in itertools.groupby(remaining, key=lambda cell: cell[:2]):
        methods, image = build(name, options.device, getattr(torch, dtype))
        if options.methods:
            methods = {
                key: model
                for key, model in methods.items()
                if key in ("unpruned", *options.methods)
            }
        for cell in network_cells:
            _, _, batch, mode = cell
            row = dict(zip(keys, cell)) | {"rate": MODELS[name][2], "llf": MODELS[name][3]}
            try:
                row |= measure(methods, image.repeat(batch, 1, 1, 1), mode, options.rounds)
            except torch.OutOfMemoryError as error:
                row["error"] = str(error).splitlines()[0]
            results.add(row)
            ratios = {key: value for key, value in row.items() if " / " in key or "error" in key}
            print(name, dtype, batch, mode, ratios, flush=True)


if __name__ == "__main__":
    main()
