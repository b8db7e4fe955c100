"""`cropr info`: versions, build and device, or the pruning of a model."""

import argparse
import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

from cropr_kernels import __version__

from .. import ops
from ..inference.loading import load_model
from ..models.adapters import find_spec
from ..models.blocks import takes_extra_dimension
from ..pruning.api import remove, set_rate
from ..pruning.deployment import deployed_copy
from ..utils.flops import flop_counter


def run(options: argparse.Namespace) -> None:
    facts = build_facts() if options.model is None else model_facts(options)
    width = max(map(len, facts))
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items()))


def versions() -> dict[str, str]:
    """Versions of the main libraries, and the default device of commands."""
    device = f"cpu, {torch.get_num_threads()} threads, no GPU found"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = f"{properties.name}, sm_{properties.major}{properties.minor}"
    return {
        "cropr_kernels": __version__,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton")
        if importlib.util.find_spec("triton")
        else "not installed",
        "device": device,
    }


def build_facts() -> dict[str, Any]:
    """Versions, build facts, and the kernels of every op."""
    facts = {
        **versions(),
        "python": platform.python_version(),
        **{name.replace("_", " "): value for name, value in ops.build_info().items()},
        "library for C++": ops.cpp_library() or "not built",
    }
    for op in sorted(ops.NAMES):
        facts[f"cropr::{op}"] = ", ".join(
            f"{key} ({language})"
            for key, language in (("CPU", "C++"), ("CUDA", "Triton"))
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"cropr::{op}", key)
        )
    return facts


@torch.inference_mode()
def model_facts(options: argparse.Namespace) -> dict[str, Any]:
    """Schedule, FLOPs and engine of a model under these options."""
    model, pixels, *_ = load_model(options, pretrained=False)
    spec = find_spec(model)
    image = torch.zeros(1, 3, *pixels.img_size)
    deployed = deployed_copy(model, equal_counts=True)  # the image is blank
    modules = deployed.cropr
    depth = len(spec.blocks)
    gflops = []
    for variant in (deployed, set_rate(deployed_copy(model), 0)):
        with flop_counter() as counter:
            variant(image)
        gflops.append(counter.get_total_flops() / 2e9)
    tokens = spec.num_scheduled(modules.config.grid)
    counts = modules.config.counts(tokens, depth, spec.num_prefix)
    num_full = modules.config.full_blocks
    full_blocks = ""
    if num_full:
        full_blocks = (
            ", all in the last block" if num_full == 1 else f", all in the last {num_full} blocks"
        )
    thresholds = model.cropr.thresholds
    remove(model)
    engine_off = f"off, the functional ops run it: {modules.engine_reason}"
    facts = {
        "model": f"{options.model}, {type(model).__module__}.{type(model).__name__}",
        "tokens": f"{tokens}{' in a window' * (spec.window > 0)} of width {spec.dim}, "
        f"{spec.num_prefix} of them never pruned",
        "blocks": f"{depth} x {type(spec.blocks[0]).__name__}",
        "kept after each block": " ".join(map(str, counts)) + full_blocks,
        "GFLOPs an image": f"{gflops[1]:.3g} unpruned, {gflops[0]:.3g} at "
        f"{modules.config.schedule}",
        "engine": engine_off if modules.engine is None else "zero-copy, every block",
    }
    if thresholds is not None:
        facts["counts of photos"] = (
            f"up to rate {thresholds.rates[-1]:g} as many tokens as each needs, these on average"
        )
    if modules.config.merge is not None:
        width = spec.dim // spec.num_heads
        facts["merging"] = str(modules.config.merge)
        facts["log(size) in attention"] = (
            "one more dimension of 16-bit heads on CUDA, else an additive bias"
            if takes_extra_dimension(width, torch.bfloat16)
            else f"an additive bias: heads of width {width} leave no room for one more dimension"
        )
    return facts
