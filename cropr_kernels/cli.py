"""The `cropr` command."""

import argparse
import importlib.metadata
import importlib.util
import platform
import sys

import torch

from . import __version__, ops


def info() -> str:
    """What is installed and what it runs on, one fact per line."""
    facts = {
        "cropr_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "not installed",
        **{name.replace("_", " "): value for name, value in ops.build_info().items()},
        "cpu threads": torch.get_num_threads(),
        "cuda": "no GPU in reach",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["cuda"] = f"{properties.name}, sm_{properties.major}{properties.minor}"
    for op in ("scores", "select", "prune", "gather", "restore", "attend"):
        kernels = {"CPU": "C++", "CUDA": "Triton"}
        has = [
            f"{key} ({language})"
            for key, language in kernels.items()
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"cropr::{op}", key)
        ]
        facts[f"cropr::{op}"] = ", ".join(has)
    width = max(len(name) for name in facts)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cropr", description="Token Cropr for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, build facts and the kernels of each op")
    parser.parse_args(arguments)
    print(info())
    return 0


if __name__ == "__main__":
    sys.exit(main())
