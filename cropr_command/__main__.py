"""The `cropr` command."""

import importlib
import os
import re
import signal
import sys

from .arguments import make_parser
from .signals import Signals


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status.

    What is wrong is one message on stderr, and the status 1. SIGINT (Ctrl-C) and SIGTERM end a command with one
    sentence, which says what is left, and the status 130 or 143, once temporary files are removed.
    """
    with Signals() as signals:
        name, left = "cropr", "nothing was done"
        try:
            options = make_parser().parse_args(arguments)
            name, left = f"cropr {options.command}", options.after_stop.format(**vars(options))
            module, _, function = options.run.rpartition(".")
            getattr(importlib.import_module(f"cropr_kernels.cli.{module}"), function)(options)
            sys.stdout.flush()
        except BrokenPipeError:  # who reads has enough, as head does
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would say so once more as it ends
            return 128 + signal.SIGPIPE
        except BaseException as error:
            if signals.caught:  # libraries may have made another error of it
                if os.environ.get("RANK", "0") == "0":
                    print(f"{name}: {signals.name}; {left}", file=sys.stderr)
                return 128 + signals.caught
            if not isinstance(error, ImportError | OSError | RuntimeError | TypeError | ValueError):
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            # An error of a process that reads data brings that process's traceback along: the last line says it.
            message = lines[-1] if "DataLoader worker process" in lines[0] else "\n".join(lines)
            message = re.sub(rf"^(cropr\.\w+:|{name}) ", "", message)  # what speaks is said already
            print(f"{name}: {message}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
