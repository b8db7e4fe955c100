"""Networks of the paper's tables by name; those of one table share one set of weights."""

import itertools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import cropr_kernels as cropr
from benchmarks.baselines.fusions import OTHER_FUSIONS, FusedSegmenter
from benchmarks.baselines.modules import NonSalient, Published, PublishedMultiHead
from benchmarks.baselines.network import Reduced
from benchmarks.baselines.registry import ON_HOST, ROWS, SCHEDULES, SYSTEMS, Schedule
from benchmarks.baselines.scorers import MultiHeadCropr
from benchmarks.models.deployment import create, deploy, pruned, unpruned, with_modules
from cropr_kernels.models.vit import ViT
from cropr_kernels.tasks import Segmenter


def scheduled(plain: ViT, schedule: Schedule, **options: Any) -> Any:
    return pruned(plain, **SCHEDULES[len(plain.blocks)][schedule], llf="LLF" in schedule, **options)


def for_inference(models: dict[str, Any]) -> dict[str, Any]:
    return {name: model.eval().requires_grad_(False) for name, model in models.items()}


def systems(plain: ViT) -> dict[str, Any]:
    """Every row of the classification table by name, the unpruned network, and the plain one."""
    models = {"unpruned": unpruned(plain), "plain": plain}
    prefix = plain.num_prefix_tokens
    depth = len(plain.blocks)
    for system, schedule, _ in ROWS:
        if system in ON_HOST and next(plain.parameters()).is_cuda:
            continue
        if system.startswith("Cropr"):
            model = deploy(scheduled(plain, schedule, merge=system == "Cropr, merging"), plain)
        elif system == "non-salient":
            model = with_modules(scheduled(plain, schedule), plain, NonSalient)
        else:
            token_schedule = cropr.Schedule(**SCHEDULES[depth][schedule])
            counts = token_schedule.counts(prefix + plain.grid**2, depth, prefix, "LLF" in schedule)
            model = Reduced(plain, SYSTEMS[system], counts, llf="LLF" in schedule)
        models[f"{system} | {schedule}"] = model
    return for_inference(models)


def architectures(plain: ViT) -> dict[str, Any]:
    """The paper's scorer and one with heads and projections, each folded and as published."""
    simple = scheduled(plain, "dec")
    width = plain.embed_dim
    num_heads = plain.config.num_heads
    heads = scheduled(
        plain, "dec", make_module=lambda layer, block: MultiHeadCropr(width, 1, num_heads=num_heads)
    )
    return for_inference(
        {
            "unpruned": unpruned(plain),
            "plain": plain,
            "simple": deploy(simple, plain),
            "simple, as published": with_modules(simple, plain, Published),
            "several heads, folded": deploy(heads, plain),
            "several heads, as published": with_modules(heads, plain, PublishedMultiHead),
        }
    )


class PatchLogits(torch.nn.Module):
    """A segmenter up to the logits of its patches: the rest is the same for all fusions."""

    def __init__(self, segmenter: Segmenter):
        super().__init__()
        self.segmenter = segmenter

    def forward(self, images: Tensor) -> Tensor:
        return self.segmenter.logits(images)[0]


def fusions(name: str, size: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Segmenters of 150 classes by fusion; 6/7 of the patches are pruned, as in the paper."""
    grid = size // 16
    plain = create(name, device, dtype, patch_size=16, img_size=size, num_classes=0)
    rate = round(grid**2 * 0.86 / (len(plain.blocks) - 1) / 4) * 4
    models: dict[str, Any] = {
        "unpruned": Segmenter(plain, 150, grid=(grid, grid)),
        "llf": Segmenter(deploy(pruned(plain, rate=rate, llf=True), plain), 150, grid=(grid, grid)),
    }
    for fusion in OTHER_FUSIONS:
        backbone = deploy(pruned(plain, rate=rate), plain)
        models[fusion] = FusedSegmenter(backbone, 150, grid=(grid, grid), fusion=fusion)
    return for_inference(
        {name: PatchLogits(model).to(device, dtype) for name, model in models.items()}
    )


def precisions(device: str) -> dict[str, tuple[AbstractContextManager[Any], list[SDPBackend]]]:
    """Precisions and attention kernels of the paper's ablation of throughput."""

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device, dtype=torch.bfloat16)

    flash = [
        SDPBackend.FLASH_ATTENTION,
        *([SDPBackend.CUDNN_ATTENTION] if device == "cuda" else []),
    ]
    return {
        "float32": (nullcontext(), [SDPBackend.MATH]),
        "autocast": (autocast(), [SDPBackend.MATH]),
        "autocast, FlashAttention": (autocast(), flash),
    }


class WithPrecision(torch.nn.Module):
    """A model that runs in one of `precisions`."""

    def __init__(self, model: Any, precision: str, device: str):
        super().__init__()
        self.model = model
        self.precision = precision
        self.device = device

    def forward(self, images: Tensor) -> Tensor:
        context, attention = precisions(self.device)[self.precision]
        with context, sdpa_kernel(attention):
            return self.model(images)


def by_precision(name: str, size: int, device: str) -> dict[str, Any]:
    """Unpruned, Cropr and ToMe in every precision; "unpruned" alone is in float32."""
    plain = create(name, device, torch.float32, img_size=size)
    prefix = plain.num_prefix_tokens
    tokens = plain.grid**2 + prefix
    depth = len(plain.blocks)
    rate = round(tokens * 14 / 197 / 4 * 12 / depth) * 4
    models = {
        "unpruned": unpruned(plain),
        "Cropr": deploy(pruned(plain, rate=rate), plain),
        "ToMe": Reduced(
            plain, SYSTEMS["ToMe"], cropr.Schedule(rate=rate).counts(tokens, depth, prefix)
        ).eval(),
    }
    cells = {
        f"{key} | {precision}": WithPrecision(models[key], precision, device)
        for precision, key in itertools.product(precisions(device), models)
    }
    return {"unpruned": cells["unpruned | float32"], **cells}
