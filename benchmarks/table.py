"""Every system of the paper's tables, side by side: speed, GFLOPs, peak memory, and the published figures beside them.

python benchmarks/table.py [classification fusions architecture precision] [--models vit_tiny_patch16_224 ...]
                           [--batches 8] [--dtype float32] [--rounds 15] [--minutes 9] [--out FILE]

Within a cell all systems run on the same network with the same weights, and take turns. They leave the same number of
tokens after each block, as far as their schedule has the same name. Weights are random: accuracy is that of accuracy.py
and segmentation.py, which report.py puts beside it. A run that stops at its minutes goes on where it stopped.
"""

import argparse
import copy
import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import RESULTS, environment, name_of, save
from networks import Published, deploy, measure
from rivals import SYSTEMS, Reduced
from rivals.stands import Stand
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import cropr_kernels as cropr
from cropr_kernels.tasks import Segmenter
from cropr_kernels.tasks.segmentation import FUSIONS
from cropr_kernels.utils.flops import flop_counter

GROUPS = ("classification", "fusions", "architecture", "precision")
# By depth. The paper's rate at 24 blocks; at 12 the rates at which accuracy.py trains.
SCHEDULES: dict[int, dict[str, dict[str, Any]]] = {
    12: {"dec": {"rate": 14}, "dec, LLF": {"rate": 17}, "const": {"const": (4, 79)}, "const, LLF": {"const": (4, 60)}},
    24: {"dec": {"rate": 8}, "dec, LLF": {"rate": 8}, "const": {"const": (8, 79)}, "const, LLF": {"const": (8, 79)}},
}


Build = Callable[[], dict[str, Any]]  # the systems of one network by name; one of them is "unpruned"


class Row(NamedTuple):
    """A line of the paper's table of classification (ViT-L, ImageNet-1k); published is None for what it has not."""

    system: str
    schedule: str
    published: tuple[float, float] | None = None  # accuracy, thousands of images a second


ROWS = (
    Row("random", "dec, LLF", (83.8, 1.50)),
    Row("variance", "dec, LLF", (84.3, 1.50)),
    Row("pixel variance", "dec, LLF"),
    Row("attention top-k", "dec, LLF", (84.7, 1.45)),
    Row("non-salient", "dec, LLF", (76.4, 1.48)),
    Row("Cropr", "dec, LLF", (85.3, 1.48)),
    Row("k-medoids", "dec", (84.5, 0.31)),
    Row("ATS", "dec", (83.9, 0.49)),
    Row("ATS, trimmed", "dec"),
    Row("DPC-KNN", "dec", (79.2, 1.00)),
    Row("EViT", "dec", (84.5, 1.57)),
    Row("ToMe", "dec", (85.0, 1.55)),
    Row("ToMe, plain attention", "dec"),
    Row("ToMe, fused", "dec"),
    Row("random", "dec"),
    Row("variance", "dec"),
    Row("pixel variance", "dec"),
    Row("attention top-k", "dec"),
    Row("Cropr, merging", "dec"),
    Row("Cropr", "dec", (85.1, 1.61)),
    Row("DynamicViT", "const", (64.4, 1.32)),
    Row("SiT", "const", (83.0, 1.41)),
    Row("Sinkhorn", "const", (56.5, 1.40)),
    Row("PatchMerger", "const", (82.4, 1.40)),
    Row("Cropr", "const", (85.4, 1.43)),
    Row("Cropr", "const, LLF", (85.5, 1.35)),
)
UNPRUNED = (85.8, 0.86)
# mIoU and GFLOPs on ADE20k, EVA-02-L
PUBLISHED_FUSIONS = {
    "unpruned": (56.7, 311),
    "cross_attn": (49.3, 184),
    "concat": (51.8, 172),
    "cross_attn_concat": (51.1, 186),
    "mhsa_concat": (55.2, 186),
    "dtop": (50.1, 174),
    "llf": (56.6, 183),
}


class NonSalient(Stand):
    """Cropr reversed: the lowest scores stay."""

    def forward(self, x: Tensor, num_keep: int, num_prefix: int = 0, *_: Any) -> cropr.Split:
        return cropr.Split(*torch.ops.cropr.prune(x, -self.folded, num_keep, num_prefix))


class SeveralHeads(Stand):
    """The multi-head scorer with projections as published: all tokens are projected to keys, queries are not folded."""

    def __init__(self, module: cropr.Cropr):
        super().__init__(module.query())
        attention: Any = module.aggregator.attention  # type: ignore[union-attr]
        self.num_heads, self.k_proj = attention.num_heads, copy.deepcopy(attention.k_proj)
        self.register_buffer("q", attention.q_proj(module.queries.detach()).detach())

    def forward(self, x: Tensor, num_keep: int, num_prefix: int = 0, *_: Any) -> cropr.Split:
        q, k = (part.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3) for part in (self.q, self.k_proj(x)))
        scores = (q @ k.transpose(2, 3)).sum((1, 2)).float()
        return cropr.Split(*torch.ops.cropr.split(x, scores, num_keep, num_prefix))


def apply(plain: Any, schedule: str, **options: Any) -> Any:
    how = SCHEDULES[len(plain.blocks)][schedule]
    return cropr.apply(copy.deepcopy(plain), **how, llf="LLF" in schedule, **{"num_outputs": 0, **options})


def unpruned(plain: Any) -> Any:
    """On the engine."""
    return deploy(cropr.apply(copy.deepcopy(plain), rate=0, num_outputs=0), plain)


def with_modules(model: Any, plain: Any, make: Callable[[Any], Any]) -> Any:
    """A pruned model on the functional ops, with others in place of its Cropr modules."""
    other = deploy(model, plain, engine=False)
    for i, module in enumerate(model.cropr):
        other.cropr[i] = make(module)
    return other


def systems(plain: Any) -> dict[str, Any]:
    """Every row of the classification table by its name, the unpruned network on the engine, and the plain one."""
    models = {"unpruned": unpruned(plain), "plain": plain}
    prefix, depth = plain.num_prefix_tokens, len(plain.blocks)
    for system, schedule, _ in ROWS:
        if system.startswith("Cropr"):
            model = deploy(apply(plain, schedule, merge=system == "Cropr, merging"), plain)
        elif system == "non-salient":
            model = with_modules(apply(plain, schedule), plain, lambda module: NonSalient(module.query()))
        else:
            resolved = cropr.schedule.resolve(**SCHEDULES[depth][schedule])
            counts = resolved(prefix + plain.grid**2, depth, prefix, "LLF" in schedule)
            model = Reduced(plain, SYSTEMS[system], counts, llf="LLF" in schedule)
        models[f"{system} | {schedule}"] = model
    return {name: model.eval().requires_grad_(False) for name, model in models.items()}


def architectures(plain: Any) -> dict[str, Any]:
    """Scorers: the paper's, the same as published, and one with heads and projections, folded and as published."""
    simple = apply(plain, "dec")
    heads = apply(plain, "dec", num_outputs=1, num_heads=plain.config.num_heads)
    models = {
        "unpruned": unpruned(plain),
        "plain": plain,
        "simple": deploy(simple, plain),
        "simple, as published": with_modules(simple, plain, lambda module: Published(module.query())),
        "several heads, folded": deploy(heads, plain),
        "several heads, as published": with_modules(heads, plain, SeveralHeads),
    }
    return {name: model.eval().requires_grad_(False) for name, model in models.items()}


class PatchLogits(torch.nn.Module):
    """A segmenter up to the logits of its patches: what follows is the same for all."""

    def __init__(self, segmenter: Segmenter):
        super().__init__()
        self.segmenter = segmenter

    def forward(self, images: Tensor) -> Tensor:
        return self.segmenter.logits(images).output


def fusions(name: str, size: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """A segmenter of 150 classes by each fusion. About six sevenths of the patches leave, as in the paper."""
    grid = size // 16
    plain = create(name, device, dtype, patch_size=16, img_size=size, num_classes=0)
    modules = len(plain.blocks) - 1
    rate = round(grid**2 * 0.86 / modules / 4) * 4
    models: dict[str, Any] = {"unpruned": Segmenter(plain, 150, grid=(grid, grid))}
    for fusion in FUSIONS:
        pruned = cropr.apply(copy.deepcopy(plain), rate=rate, llf=fusion == "llf", num_outputs=0)
        models[fusion] = Segmenter(deploy(pruned, plain), 150, grid=(grid, grid), fusion=fusion)
    return {name: PatchLogits(model).eval().requires_grad_(False).to(device, dtype) for name, model in models.items()}


def gflops(model: Any, image: Tensor) -> float:
    """Multiply-adds of one image, as the paper counts."""
    with flop_counter() as counter:
        model(image)
    return round(counter.get_total_flops() / 2e9, 3)


def peak_mib(model: Any, images: Tensor) -> float:
    """The most memory that one forward holds beside weights and images, in MiB: what the profiler saw allocated."""
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(images)
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it says that it started and stopped
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        model(images)
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return round(peak / 2**20, 1)


def cell(models: dict[str, Any], image: Tensor, batch: int, mode: str, rounds: int) -> list[dict[str, Any]]:
    """One row a system, measured in turns.

    Raises:
        RuntimeError: an output is not finite, or the engine does not compute what the plain network computes.
    """
    images = image.repeat(batch, *[1] * (image.ndim - 1))
    for name, model in models.items():
        if not model(images).isfinite().all():
            raise RuntimeError(f"{name}: the output is not finite; not timed")
    figures = measure(models, images, mode, rounds)
    rows = []
    for name, model in models.items():
        row: dict[str, Any] = {"system": name, "GFLOPs": gflops(model, image), "peak MiB": peak_mib(model, images)}
        keys = {"speed-up": f"unpruned / {name}", "error": f"{name}: error"}
        keys |= {key: f"{name}, {key}" for key in ("ms", "images/s", "kernels")}
        rows.append(row | {key: figures[found] for key, found in keys.items() if found in figures})
    return rows


def precisions(device: str) -> dict[str, tuple[AbstractContextManager[Any], list[SDPBackend]]]:
    """The paper's ablation of throughput: what computes, and which attention."""

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device, dtype=torch.bfloat16)

    flash = (
        [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION] if device == "cuda" else [SDPBackend.FLASH_ATTENTION]
    )
    return {
        "float32": (nullcontext(), [SDPBackend.MATH]),
        "autocast": (autocast(), [SDPBackend.MATH]),
        "autocast, FlashAttention": (autocast(), flash),
    }


class Within(torch.nn.Module):
    """A model that runs in a precision and with an attention of its own."""

    def __init__(self, model: Any, precision: str, device: str):
        super().__init__()
        self.model, self.precision, self.device = model, precision, device

    def forward(self, images: Tensor) -> Tensor:
        context, attention = precisions(self.device)[self.precision]
        with context, sdpa_kernel(attention):
            return self.model(images)


def by_precision(name: str, size: int, device: str) -> dict[str, Any]:
    """Unpruned, pruned and merged by ToMe, each in every precision; "unpruned" is that in float32."""
    plain = create(name, device, torch.float32, img_size=size)
    tokens, depth, prefix = plain.grid**2 + plain.num_prefix_tokens, len(plain.blocks), plain.num_prefix_tokens
    rate = round(tokens * 14 / 197 / 4 * 12 / depth) * 4
    models = {
        "unpruned": unpruned(plain),
        "Cropr": deploy(cropr.apply(copy.deepcopy(plain), rate=rate, num_outputs=0), plain),
        "ToMe": Reduced(plain, SYSTEMS["ToMe"], cropr.schedule.rate(tokens, depth, rate, prefix)).eval(),
    }
    cells = {
        f"{key} | {precision}": Within(model, precision, device)
        for precision in precisions(device)
        for key, model in models.items()
    }
    return {"unpruned": cells["unpruned | float32"], **cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], default=[])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", help="by default ViT-Ti and ViT-S on a CPU, ViT-L on a GPU")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 384, 512], help="of precision")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=9.0, help="start no cell after so long")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    gpu = options.device == "cuda"
    names = options.models or (["vit_large_patch16_224"] if gpu else ["vit_tiny_patch16_224", "vit_small_patch16_224"])
    dense = "eva02_large_patch14_448" if gpu else "eva02_small_patch14_224"
    dtype = getattr(torch, options.dtype or ("bfloat16" if gpu else "float32"))
    builds: dict[tuple[str, str, int], Build] = {}
    for name in names:
        size = cropr.vit.PRESETS[name].get("img_size", 224)
        for group, make in (("classification", systems), ("architecture", architectures)):
            builds[group, name, size] = partial(built_on, make, name, options.device, dtype)
    for size in options.sizes:
        builds["precision", names[-1], size] = partial(by_precision, names[-1], size, options.device)
    builds["fusions", dense, 512] = partial(fusions, dense, 512, options.device, dtype)
    run(options, builds, options.batches or ([1, 256] if gpu else [1, 8]), ("eager", "graph") if gpu else ("eager",))


def built_on(make: Callable[[Any], dict[str, Any]], name: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    return make(create(name, device, dtype))


def create(name: str, device: str, dtype: torch.dtype, **changes: Any) -> Any:
    torch.manual_seed(0)
    return cropr.create_vit(name, **changes).eval().requires_grad_(False).to(device, dtype)


def run(
    options: argparse.Namespace, builds: dict[tuple[str, str, int], Build], batches: list[int], modes: tuple[str, ...]
) -> None:
    out = options.out or RESULTS / f"{options.device}_table.json"
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.exists() else []
    keys = ("group", "model", "size", "batch", "mode")
    done = {tuple(row[key] for key in keys) for row in rows}
    started, env = time.monotonic(), environment(options.device)
    for group in options.groups or GROUPS:
        for (of, name, size), build in builds.items():
            built = None
            for batch in batches if of == group else []:
                for mode in modes:
                    where = (group, name, size, batch, mode)
                    if where in done:
                        continue
                    if time.monotonic() - started > 60 * options.minutes:
                        print("out of minutes: start again to go on")
                        return
                    with torch.inference_mode():
                        built = built or build()
                        weight = next(built["unpruned"].parameters())
                        image = torch.randn(1, 3, size, size, device=weight.device, dtype=weight.dtype)
                        found = cell(built, image, batch, mode, options.rounds)
                    about = dict(zip(keys, where)) | {"dtype": name_of(image.dtype)}
                    rows += [about | row for row in found]
                    save(out, env, rows)
                    print(*where, flush=True)
                    for row in found:
                        print("  ", row, flush=True)


if __name__ == "__main__":
    main()
