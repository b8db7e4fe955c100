"""What every benchmark shares: shapes, inputs, rivals, a check of each result, and where figures go."""

import json
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cropr_kernels  # noqa: F401  (registers the ops)

RESULTS = Path(__file__).parent / "results"
PREFIX = 1
# (B, N, D) and what it stands for
CPU_SHAPES = {
    (1, 197, 384): "ViT-S/16, 224 px, one image",
    (8, 197, 768): "ViT-B/16, 224 px",
    (32, 197, 1024): "ViT-L/16, 224 px",
    (4, 1025, 1024): "EVA-02-L/16, 512 px",
    (1, 9216, 768): "ViT-B/16, 1536 px, one image",
}
GPU_SHAPES = {
    (1, 197, 1024): "ViT-L/16, 224 px, one image",
    (256, 197, 384): "ViT-S/16, 224 px",
    (256, 197, 1024): "ViT-L/16, 224 px",
    (64, 577, 1024): "ViT-L/16, 384 px",
    (64, 1025, 1024): "EVA-02-L/16, 512 px",
    (8, 9216, 1024): "ViT-L/16, 1536 px",
}
Split = tuple[Tensor, Tensor, Tensor, Tensor]


def num_keep(n: int) -> int:
    """The paper's rates, about 4 % a layer: 188 of 197, 984 of 1025."""
    return n - n // 24 - PREFIX


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=device).to(dtype)
    return x, torch.randn(1, shape[2], generator=generator, device=device).to(dtype)


def ours(x: Tensor, query: Tensor, keep: int) -> Split:
    return torch.ops.cropr.prune(x, query, keep, PREFIX)


def published(x: Tensor, query: Tensor, keep: int) -> Split:
    """The published sequence: logits of every query, their sum, a full sort, every token gathered in that order."""
    scores = (query @ x.transpose(1, 2)).sum(1)
    scores[:, :PREFIX] = float("inf")
    order = scores.argsort(dim=1, descending=True)
    moved = x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return moved[:, :keep], order[:, :keep], moved[:, keep:], order[:, keep:]


def sort_and_index_select(x: Tensor, query: Tensor, keep: int) -> Split:
    """The same with the fastest gather PyTorch has: rows of the flattened batch."""
    batch, n, dim = x.shape
    scores = x @ query.sum(0)
    scores[:, :PREFIX] = float("inf")
    order = scores.argsort(dim=1, descending=True)
    rows = (order + n * torch.arange(batch, device=x.device).unsqueeze(1)).view(-1)
    moved = x.reshape(batch * n, dim).index_select(0, rows).view(batch, n, dim)
    return moved[:, :keep], order[:, :keep], moved[:, keep:], order[:, keep:]


def topk_and_index_select(x: Tensor, query: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Only what stays: top-k instead of a sort, and no pruned tokens (they would be lost to Last Layer Fusion)."""
    batch, n, dim = x.shape
    scores = x @ query.sum(0)
    scores[:, :PREFIX] = float("inf")
    order = scores.topk(keep, dim=1).indices
    rows = (order + n * torch.arange(batch, device=x.device).unsqueeze(1)).view(-1)
    return x.reshape(batch * n, dim).index_select(0, rows).view(batch, keep, dim), order


def copy(x: Tensor, query: Tensor, keep: int) -> Tensor:
    """The floor: read x once, write it once."""
    return x.clone()


RIVALS: dict[str, Callable[..., Any]] = {
    "prune": ours,
    "copy of x": copy,
    "published": published,
    "sort + index_select": sort_and_index_select,
}


def check(x: Tensor, query: Tensor, keep: int) -> None:
    """Refuse to time a wrong result: exact rows, exact order, a selection that float64 agrees with.

    Raises:
        RuntimeError: the result is wrong.
    """
    kept, kept_idx, pruned, pruned_idx = ours(x, query, keep)
    if not torch.equal(torch.ops.cropr.restore(kept, kept_idx, pruned, pruned_idx), x):
        raise RuntimeError("prune then restore does not give x back")
    scores = x.double() @ query.double().sum(0)
    slack = scores.abs().max() * 1e-5
    lowest = scores.gather(1, kept_idx[:, PREFIX:]).min(1).values
    highest = scores.gather(1, pruned_idx).max(1).values
    if not bool((lowest + slack >= highest).all()):
        raise RuntimeError("a pruned token scores higher than a kept one")
    for rival in (published, sort_and_index_select):
        agreeing = torch.isin(rival(x.float(), query.float(), keep)[1][0], kept_idx[0]).double().mean()
        if agreeing < 0.99:
            raise RuntimeError(f"{rival.__name__} keeps other tokens: only {agreeing:.3f} agree")


def environment(device: str) -> dict[str, Any]:
    """Where and with what a figure was measured."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        state = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
        revision = commit.stdout.strip() + ("+changes" if state.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        revision = os.environ.get("CROPR_COMMIT", "unknown")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": revision,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def save(path: Path, env: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write all rows so far, through a temporary file: a run that is cut off loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"environment": env, "rows": rows}, indent=1) + "\n")
    temporary.replace(path)


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True)
