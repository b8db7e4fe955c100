"""The `cropr` command."""

import argparse
import sys
from typing import Any

from . import bench, calibrate, export, infer, info, map, train, tune
from .parsing import Parser
from .signals import Signals


class _Version(argparse.Action):
    def __call__(self, parser: Any, *_: Any) -> None:
        print(", ".join(f"{name} {value}" for name, value in info.versions().items()))
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="cropr", description="Token Cropr for PyTorch.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show versions and device, and exit")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for command in (info, calibrate, map, tune, bench, export, infer, train):
        command.add_parser(commands)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status.

    What is wrong is one message on stderr, and the status 1. SIGINT (Ctrl-C) and SIGTERM end a command with one
    sentence, what the same command does next time, and the status 130 or 143, once temporary files are removed.
    """
    options = make_parser().parse_args(arguments)
    with Signals() as signals:
        try:
            options.run(options)
        except BaseException as error:
            if signals.caught:  # libraries may have made another error of it
                print(f"cropr {options.command}: {signals.name}; {options.after_stop}", file=sys.stderr)
                return 128 + signals.caught
            if not isinstance(error, ImportError | OSError | RuntimeError | TypeError | ValueError):
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            # An error of a process that reads data brings that process's traceback along: the last line says it.
            message = lines[-1] if "DataLoader worker process" in lines[0] else "\n".join(lines)
            print(f"cropr {options.command}: {message}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
