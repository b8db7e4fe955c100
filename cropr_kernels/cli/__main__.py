"""The `cropr` command."""

import argparse
import importlib.metadata
import importlib.util
import platform
import sys
from typing import Any

import torch

from .. import ops
from ..models.adapters import find_spec
from ..models.blocks import takes_extra_dimension
from ..models.naming import create_model
from ..pruning.api import apply, deploy, remove
from ..utils.flops import flop_counter
from .bench import add_parser as add_benching
from .calibrate import add_parser as add_calibration
from .export import add_parser as add_exporting
from .infer import add_parser as add_inference
from .map import add_parser as add_mapping
from .train import add_parsers as add_training
from .tune import add_parser as add_tuning


def info() -> str:
    """What is installed and what it runs on, one fact per line."""
    facts = {
        "cropr_kernels": importlib.metadata.version("cropr_kernels"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "not installed",
        **{name.replace("_", " "): value for name, value in ops.build_info().items()},
        "library for C++": ops.cpp_library() or "not built",
        "cpu threads": torch.get_num_threads(),
        "cuda": "no GPU in reach",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["cuda"] = f"{properties.name}, sm_{properties.major}{properties.minor}"
    for op in sorted(ops.NAMES):
        kernels = {"CPU": "C++", "CUDA": "Triton"}
        has = [
            f"{key} ({language})"
            for key, language in kernels.items()
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"cropr::{op}", key)
        ]
        facts[f"cropr::{op}"] = ", ".join(has)
    return _lines(facts)


def _lines(facts: dict[str, Any]) -> str:
    width = max(len(name) for name in facts)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items())


@torch.inference_mode()
def model_info(name: str, rate: int, *, llf: bool, merge: bool = False) -> str:
    """How a model would be pruned and what would run it, one fact per line."""
    model = create_model(name).eval()
    facts = {"model": f"{name}, {type(model).__module__}.{type(model).__name__}"}
    counted: dict[int, float] = {}
    known = find_spec(model)
    grid = known.grid
    for pruned_rate in (0, rate):
        apply(model, rate=pruned_rate, llf=llf, merge=merge, num_outputs=0)
        deployed = deploy(model)
        image = torch.zeros(1, 3, *(count * side for count, side in zip(grid, model.patch_embed.patch_size)))
        with flop_counter() as counter:
            deployed(image)
        counted[pruned_rate] = counter.get_total_flops() / 2e9
        stack = deployed.cropr
        remove(model)
    tokens = model.num_prefix_tokens + grid[0] * grid[1]
    counts = stack.config.counts(tokens, len(model.blocks), model.num_prefix_tokens)
    facts["tokens"] = f"{tokens} of width {model.embed_dim}, {model.num_prefix_tokens} of them never pruned"
    facts["blocks"] = f"{len(model.blocks)} x {type(model.blocks[0]).__name__}"
    facts["kept after each block"] = " ".join(map(str, counts)) + (", all in the last block" if llf else "")
    facts["GFLOPs an image"] = f"{counted[0]:.1f} unpruned, {counted[rate]:.1f} at rate {rate}"
    facts["engine"] = (
        f"off, the functional ops run it: {stack.engine_reason}" if stack.engine is None else "zero-copy, every block"
    )
    if stack.config.merge is not None:
        facts["merging"] = str(stack.config.merge)
        width = model.embed_dim // model.blocks[0].attn.num_heads
        room = takes_extra_dimension(width, torch.bfloat16)
        facts["log(size) in attention"] = (
            "one more dimension of 16-bit heads on CUDA, else an additive bias"
            if room
            else f"an additive bias: heads of width {width} leave no room for one more dimension"
        )
    return _lines(facts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cropr", description="Token Cropr for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    about = commands.add_parser("info", help="versions, build facts and kernels; or how a model would be pruned")
    about.add_argument("model", nargs="?", help="a preset of cropr_kernels or a model of timm, with random weights")
    about.add_argument("--rate", type=int, default=8, help="tokens dropped after each block (default: 8)")
    about.add_argument("--llf", action="store_true", help="Last Layer Fusion")
    about.add_argument("--merge", action="store_true", help="tokens that leave merge into those that stay")
    about.set_defaults(run=run_info)
    add_calibration(commands)
    add_mapping(commands)
    add_exporting(commands)
    add_benching(commands)
    add_inference(commands)
    add_tuning(commands)
    add_training(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # An error of a process that reads data brings that process's traceback along: the last line says it.
        message = lines[-1] if "DataLoader worker process" in lines[0] else "\n".join(lines)
        print(f"cropr {options.command}: {message}", file=sys.stderr)
        return 1
    return 0


def run_info(options: argparse.Namespace) -> None:
    if options.model is None:
        print(info())
    else:
        print(model_info(options.model, options.rate, llf=options.llf, merge=options.merge))


if __name__ == "__main__":
    sys.exit(main())
