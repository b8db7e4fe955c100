"""Every system of the paper's tables: speed, GFLOPs and peak memory, beside the published figures.

python -m benchmarks.models.table [classification fusions architecture precision] [--models
vit_tiny_patch16_224 ...]
                                  [--batches 8] [--dtype float32] [--rounds 15] [--minutes 9] [--out
                                  FILE]

Within a cell all systems run on the same network with the same weights, interleaved. Those with the
same schedule keep the same number of tokens after each block. Weights are random: the report adds
accuracy from benchmarks.accuracy. A run that is out of minutes, or interrupted, resumes.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.models.deployment import create, image_size
from benchmarks.models.systems import architectures, by_precision, fusions, systems
from benchmarks.models.timing import cell
from benchmarks.utils.results import RESULTS, Results, environment, name_of

GROUPS = ("classification", "fusions", "architecture", "precision")
# The systems of one network by name; one of them is "unpruned"
Build = Callable[[], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], default=[])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--models", nargs="+", help="default: ViT-Ti and ViT-S on a CPU, ViT-L on a GPU"
    )
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[224, 384, 512], help="of precision"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=9.0, help="start no cell after this time")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    gpu = options.device == "cuda"
    batches = options.batches or ([1, 256] if gpu else [1, 8])
    measure_cells(
        options, builds_of(options, gpu), batches, ("eager", "graph") if gpu else ("eager",)
    )


def builds_of(options: argparse.Namespace, gpu: bool) -> dict[tuple[str, str, int], Build]:
    """Factories of the systems by group, network and image size."""
    names = options.models or (
        ["vit_large_patch16_224"] if gpu else ["vit_tiny_patch16_224", "vit_small_patch16_224"]
    )
    dense = "eva02_large_patch14_448" if gpu else "eva02_small_patch14_224"
    dtype = getattr(torch, options.dtype or ("bfloat16" if gpu else "float32"))
    builds: dict[tuple[str, str, int], Build] = {}
    for name in names:
        size = image_size(name)
        for group, make in (("classification", systems), ("architecture", architectures)):
            builds[group, name, size] = partial(built_on, make, name, options.device, dtype)
    for size in options.sizes:
        builds["precision", names[-1], size] = partial(
            by_precision, names[-1], size, options.device
        )
    builds["fusions", dense, 512] = partial(fusions, dense, 512, options.device, dtype)
    return builds


def built_on(
    make: Callable[[Any], dict[str, Any]], name: str, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    return make(create(name, device, dtype))


def measure_cells(
    options: argparse.Namespace,
    builds: dict[tuple[str, str, int], Build],
    batches: list[int],
    modes: tuple[str, ...],
) -> None:
    keys = ("group", "model", "size", "batch", "mode")
    out = options.out or RESULTS / f"{options.device}_table.json"
    results = Results(out, environment(options.device), keys)

    def cells() -> Iterator[tuple[Any, ...]]:
        for group in options.groups or GROUPS:
            for network in (network for network in builds if network[0] == group):
                yield from ((*network, *point) for point in itertools.product(batches, modes))

    remaining = results.remaining(cells(), options.minutes)
    for network, network_cells in itertools.groupby(remaining, key=lambda cell: cell[:3]):
        with torch.inference_mode():
            models = builds[network]()
            weight = next(models["unpruned"].parameters())
            image = torch.randn(
                1, 3, network[2], network[2], device=weight.device, dtype=weight.dtype
            )
            for cell_key in network_cells:
                rows = cell(models, image, *cell_key[3:], options.rounds)
                columns = dict(zip(keys, cell_key)) | {"dtype": name_of(image.dtype)}
                results.add(*(columns | row for row in rows))
                print(*cell_key, flush=True)
                for row in rows:
                    print("  ", row, flush=True)


if __name__ == "__main__":
    main()
