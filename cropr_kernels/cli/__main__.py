"""The `cropr` command."""

import argparse
import importlib.metadata
import sys

from . import bench, calibrate, export, infer, info, map, train, tune


def main(arguments: list[str] | None = None) -> int:
    """Run one command; what is wrong is one message on stderr, and the exit status 1."""
    parser = argparse.ArgumentParser(prog="cropr", description="Token Cropr for PyTorch.")
    parser.add_argument("--version", action="version", version=importlib.metadata.version("cropr_kernels"))
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (info, calibrate, map, tune, bench, export, infer, train):
        command.add_parser(commands)
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


if __name__ == "__main__":
    sys.exit(main())
